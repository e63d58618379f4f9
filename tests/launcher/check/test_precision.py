"""Precision is judged by its fields: the combinations that the rules accept are exactly those that DeepSpeed 0.19.8 has."""

import itertools
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.check.precision import PRECISION_RULES
from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.plan.plan import LocalContext, train_spec
from trainer.contract import Precision

ROOT = Path(__file__).parents[3]
PLACE = LocalContext(project=ROOT, interpreter="python", here=ROOT, user="1000:1000")
DTYPES = ("float32", "float16", "bfloat16")
OFF: dict[str, Any] = {"enabled": False}
BF16: dict[str, Any] = {"enabled": True}
PURE = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}

# (weights, optimizer, gradients, loss_scaling, rounding) -> bf16, fp16 and grad_accum_dtype of DeepSpeed's config.
ACCEPTED: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any], str]] = {
    ("float32", "float32", "float32", "none", "nearest"): (OFF, OFF, ""),
    ("bfloat16", "float32", "float32", "none", "nearest"): (BF16, OFF, "fp32"),
    ("bfloat16", "float32", "bfloat16", "none", "nearest"): (BF16, OFF, "bf16"),
    ("bfloat16", "bfloat16", "bfloat16", "none", "nearest"): (PURE, OFF, "bf16"),
    ("bfloat16", "bfloat16", "bfloat16", "none", "stochastic"): (PURE, OFF, "bf16"),
    ("float16", "float32", "float32", "dynamic", "nearest"): (OFF, FP16, "fp32"),
    ("float16", "float32", "float16", "dynamic", "nearest"): (OFF, FP16, "fp16"),
}


@cache
def base() -> Config:
    return compose(("hardware=h200", "model=tiny_llava"), ROOT / "conf")


def of(weights: str, compute: str, optimizer: str, gradients: str, loss_scaling: str, rounding: str) -> Config:
    fields: dict[str, Any] = {"weights": weights, "compute": compute, "optimizer": optimizer, "gradients": gradients}
    precision = Precision(name="mine", loss_scaling=loss_scaling, rounding=rounding, **fields)  # type: ignore[arg-type]
    return resolve(replace(base(), precision=precision)).config


def test_the_rules_accept_what_deepspeed_has_and_the_plan_renders_it() -> None:
    accepted = {}
    for fields in itertools.product(DTYPES, DTYPES, DTYPES, DTYPES, ("none", "dynamic"), ("nearest", "stochastic")):
        config = of(*fields)
        if any(problem for rule in PRECISION_RULES for problem in rule(config, {})):
            continue
        weights, compute, *others = fields
        assert weights == compute
        section = train_spec(config, PLACE, run_id="R").deepspeed
        accepted[weights, *others] = (section["bf16"], section["fp16"], section.get("data_types", {}).get("grad_accum_dtype", ""))
        assert section["zero_optimization"]["stage"] >= (weights != "float32")
    assert accepted == ACCEPTED


@pytest.mark.parametrize("fields", ACCEPTED, ids=" ".join)
def test_deepspeed_reads_the_rendered_keys(fields: tuple[str, ...]) -> None:
    """Its config classes refuse an unknown key, and its engine derives the dtypes that the precision names."""
    settings = pytest.importorskip("deepspeed.runtime.precision_config", reason="DeepSpeed is not installed in this environment")
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="DeepSpeed is not installed in this environment")
    weights, optimizer, gradients, scaling, rounding = fields
    section = train_spec(of(weights, weights, optimizer, gradients, scaling, rounding), PLACE, run_id="R").deepspeed
    bf16, fp16 = settings.DeepSpeedBF16Config(**section["bf16"]), settings.DeepSpeedFP16Config(**section["fp16"])
    assert (bf16.enabled, fp16.enabled) == (weights == "bfloat16", weights == "float16")
    assert not fp16.enabled or (fp16.loss_scale == 0) == (scaling == "dynamic")
    assert bf16.bf16_optimizer_states == (optimizer == "bfloat16")
    assert set(section["zero_optimization"]) <= set(zero.DeepSpeedZeroConfig.model_fields)


@pytest.mark.parametrize(
    ("overrides", "enabled", "gradients"),
    [
        (("precision.weights=float16", "precision.loss_scaling=dynamic"), "fp16", "fp32"),
        (("precision.gradients=bfloat16",), "bf16", "bf16"),
    ],
)
def test_one_field_that_is_changed_is_carried_out(overrides: tuple[str, ...], enabled: str, gradients: str) -> None:
    config = resolve(compose(("hardware=h200", "precision=bf16", *overrides), ROOT / "conf")).config
    section = train_spec(config, PLACE, run_id="R").deepspeed
    assert [name for name in ("bf16", "fp16") if section[name]["enabled"]] == [enabled]
    assert section["data_types"] == {"grad_accum_dtype": gradients}


def test_a_precision_file_of_the_users_own_is_planned(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (ROOT / "conf/precision/bf16.yaml").read_text(encoding="utf-8").replace("name: bf16", "name: mine")
    (tmp_path / "conf/precision/mine.yaml").write_text(text, encoding="utf-8")
    config = resolve(compose(("hardware=h200", "precision=mine"), tmp_path / "conf")).config
    assert train_spec(config, PLACE, run_id="R").deepspeed["bf16"] == {"enabled": True}


def test_without_loss_scaling_a_forced_float16_run_has_none() -> None:
    """run.force overrides the refusal: the plan then does what it says."""
    section = train_spec(of("float16", "float16", "float32", "float32", "none", "nearest"), PLACE, run_id="R").deepspeed
    assert section["fp16"] == {"enabled": True, "loss_scale": 1}
