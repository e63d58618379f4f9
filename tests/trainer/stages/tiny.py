"""The tiny models of conf/, one of every family, as the launcher tells them to the trainer."""

from functools import cache
from pathlib import Path

from launcher.config.compose import compose
from launcher.plan.plan import LocalContext, model_spec
from trainer.contract import ModelSpec

CONF = Path(__file__).resolve().parents[3] / "conf"
MODELS = tuple(sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml")))


@cache
def tiny_model_spec(name: str) -> ModelSpec:
    return model_spec(
        compose([f"model={name}", "tune=null"], CONF), LocalContext(project=CONF.parent, here=CONF.parent, interpreter="", user="")
    )
