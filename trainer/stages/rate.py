"""Parameter groups with their own learning rate: a vision tower at a tenth of the language model's, as in published recipes."""

from collections.abc import Mapping

import torch

from trainer.contract import InputRefused, TrainSpec
from trainer.stages.adapter_layout import base_name
from trainer.stages.lora import ADAPTER
from trainer.stages.token_row import TOKEN_ROWS


def find_rates(model: torch.nn.Module, spec: TrainSpec, groups: Mapping[str, str]) -> dict[str, float]:
    """`Staged.rates`. `groups`: name before peft -> group. Adapters and rows of new tokens are trained at
    optimizer.lr. Raises InputRefused for a group that is not
    trained: its rate would have no effect."""
    rates = spec.optimizer.group_lr
    if not rates or spec.stage.kind != "train":
        return {}
    idle = sorted(set(rates) - set(spec.stage.trainable))
    if idle:
        trained = ", ".join(spec.stage.trainable) or "only adapters, which use stage.optimizer.lr"
        raise InputRefused(
            f"stage.optimizer.group_lr: this stage does not train {', '.join(idle)}; it trains {trained}. Remove {', '.join(idle)}."
        )
    trained_names = (
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ADAPTER not in name and TOKEN_ROWS not in name
    )
    found = {name: groups[base_name(name)] for name in trained_names}
    return {name: rates[group] / spec.optimizer.lr for name, group in found.items() if group in rates}
