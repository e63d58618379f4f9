"""Checkpoints and adapters of the tiny families, random, and a stage after training carried out on them in this process."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.trainer.conftest import make_spec
from tests.trainer.models.conftest import model_spec
from trainer.contract import Kind, ModelSpec, StageSpec, TrainResult, TrainSpec
from trainer.device.device import DEVICES
from trainer.device.rank import Rank
from trainer.models import find_family
from trainer.models.weight import round_weights
from trainer.programs.dispatch import find_program

RANK = Rank(number=0, local=0, world_size=1, device=DEVICES["cpu"], torch_device=torch.device("cpu"))


def write_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> ModelSpec:
    """A random start as a checkpoint; its biases and norms are not what they begin as."""
    spec = model_spec(name)
    family = find_family(spec.family)
    torch.manual_seed(0)
    model = round_weights(family.create(spec), dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    family.create_processor(spec).save(folder)
    return spec


def write_adapter(
    spec: ModelSpec, base: Path, folder: Path, *, whole: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Of every linear layer of the language model, and with `whole` the linear layers of the projector trained whole; by peft."""
    model = find_family(spec.family).load(base, spec, dtype)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    targets = [name for name in linear if re.match(spec.groups["lm"], f"{name}.weight")]
    others = [name for name in linear if re.match(spec.groups["projector"], f"{name}.weight")] if whole else []
    torch.manual_seed(1)
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "modules_to_save": others or None,
        "target_modules": targets,
        **options,
    }
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def stage_spec(kind: Kind, model: ModelSpec, checkpoint: Path, output: Path, **options: Any) -> TrainSpec:
    output.mkdir(exist_ok=True)
    stage = StageSpec(name=kind, kind=kind, trainable=(), checkpoint=str(checkpoint), **options)
    return replace(make_spec(output, output), model=model, stage=stage, run_id=output.name)


def run_program(spec: TrainSpec) -> TrainResult:
    """In a process group of one, which a test brings."""
    return find_program(spec.stage.kind)(spec, RANK, {})
