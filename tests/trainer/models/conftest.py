"""The models of conf/model as ModelSpecs, tiny models that are built once, and conversations with images of several sizes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from launcher.config.schema import Model
from tests.trainer.conftest import make_spec
from trainer.contract import ModelSpec, Source, TrainSpec, decode
from trainer.data.processor import Processor
from trainer.data.rows.sample import Message, Sample
from trainer.models.family import Family
from trainer.models.registry import find_family

CONF = Path(__file__).resolve().parents[3] / "conf" / "model"
TINY = ("tiny_llava", "tiny_qwen2_5_vl", "tiny_internvl", "tiny_qwen2_5_omni", "tiny_minicpm_v_4_6")
TINY += ("tiny_minicpm_v_2_6", "tiny_omnilmm_3b", "tiny_omnilmm_12b")
OURS = ("minicpm_v_2_6", "minicpm_o_2_6", "omnilmm_3b", "omnilmm")  # families with our own model classes
SIZES = ((40, 24), (33, 64), (100, 70), (32, 32))  # width, height


@cache
def read_model(name: str) -> Model:
    model: Model = decode(Model, yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")))
    return model


def model_spec(name: str) -> ModelSpec:
    """As launcher.plan.plan makes it, for a random start."""
    model = read_model(name)
    return ModelSpec(
        name=model.name,
        family=model.family,
        source=Source(kind="random"),
        architecture=asdict(model.architecture),
        groups=model.groups,
        image_token=model.image_token,
        template=model.template,
        attention="sdpa",
    )


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tiny float32 model with its processor, and both saved as a checkpoint."""

    name: str
    family: Family
    model: torch.nn.Module
    processor: Processor
    spec: TrainSpec
    folder: Path


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(name: str) -> Made:
        folder = tmp_path_factory.mktemp(name)
        spec = make_spec(folder / "run", folder / "data")
        spec = replace(spec, model=model_spec(name), data=replace(spec.data, max_length=1024))
        family = find_family(spec.model.family)
        torch.manual_seed(0)
        model, processor = family.create(spec.model).eval(), family.create_processor(spec.model)
        model.save_pretrained(folder)
        processor.save(folder)
        return Made(name=name, family=family, model=model, processor=processor, spec=spec, folder=folder)

    return make


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[[str], Made]) -> Made:
    return make_tiny(request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """An image file with noise for each of SIZES."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tuple(folder / f"{number}.png" for number in range(len(SIZES)))


def talk(*turns: tuple[str, str], images: tuple[Path, ...] = (), row: int = 1) -> Sample:
    """A conversation of questions and answers."""
    messages = [Message(role=role, content=text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]  # type: ignore[arg-type]
    return Sample(id=str(row), images=images, messages=tuple(messages), file="rows.json", row=row)


@pytest.fixture(scope="session")
def samples(pictures: tuple[Path, ...]) -> tuple[Sample, ...]:
    """One image and two turns; two adjacent images and one in a later turn; text only."""
    return (
        talk(("<image>\nWhich digit is this?", "It is 7."), ("And the colour?", "Red."), images=pictures[:1], row=1),
        talk(("<image><image>\nWhat is in these?", "Noise"), ("And <image>?", "More noise, and a square."), images=pictures[1:], row=2),
        talk(("Hello?", "Yes."), row=3),
    )


def to_arguments(batch: dict[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in without}
