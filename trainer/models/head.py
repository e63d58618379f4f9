"""Logits at selected positions only, for model classes without `logits_to_keep`."""

from typing import Any

import torch


def choose_logits(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, whose forward pass accepts `logits_to_keep`, [B, T] bool, and then returns logits (selected, vocabulary).

    Most classes of transformers support it themselves (modeling_utils.slice_logits_to_keep, 5.23). Qwen2.5-Omni and MiniCPM-V would
    compute logits at every position: with a vocabulary of 150,000 tokens the largest tensor of a step.
    """
    wanted: list[torch.Tensor] = []

    def take(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wanted[:] = [kwargs["logits_to_keep"]] if "logits_to_keep" in kwargs else []
        return args, {key: value for key, value in kwargs.items() if key != "logits_to_keep"}

    def choose(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0][wanted[0]] if wanted else args[0]

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.get_output_embeddings().register_forward_pre_hook(choose)
    return model
