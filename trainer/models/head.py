"""Logits at selected positions only, for model classes without `logits_to_keep`."""

from typing import Any

import torch


def choose_logits(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, whose forward pass accepts `logits_to_keep`, [B, T] bool, and then returns logits (selected, vocabulary).

    Most classes of transformers support it themselves (modeling_utils.slice_logits_to_keep, 5.23). Qwen2.5-Omni and MiniCPM-V would
    compute logits at every position: with a vocabulary of 150,000 tokens the largest tensor of a step.
    """
    wanted: list[torch.Tensor] = []

    def place() -> None:
        """On the whole head, if peft has put an adapter around it since; a head that is trained whole is a copy, with the hook."""
        head = model.get_output_embeddings()
        if hasattr(head, "modules_to_save"):
            return
        inner = getattr(head, "base_layer", None)
        for key, hook in tuple(inner._forward_pre_hooks.items()) if inner is not None else ():
            if hook is choose:
                del inner._forward_pre_hooks[key]
        if choose not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(choose)

    def take(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place()
        wanted[:] = [kwargs["logits_to_keep"]] if "logits_to_keep" in kwargs else []
        return args, {key: value for key, value in kwargs.items() if key != "logits_to_keep"}

    def choose(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0][wanted[0]] if wanted else args[0]

    model.register_forward_pre_hook(take, with_kwargs=True)
    place()
    return model
