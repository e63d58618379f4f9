"""Sets of parameters as whole modules: peft saves modules, and transformers initializes modules."""

from collections.abc import Set

import torch


def find_whole_modules(model: torch.nn.Module, names: Set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The outermost modules whose parameters are all in `names`, and those of `names` that are in none of them."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()} if name else set()
        if own and own <= names and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found), tuple(sorted(name for name in names if not any(name.startswith(f"{outer}.") for outer in found)))


def drop_input_gradients(model: torch.nn.Module) -> None:
    """transformers and peft make the embeddings' outputs require gradients when gradient checkpointing is on. Only reentrant checkpointing
    needs that; ours (trainer.stages.gradient_checkpointing) is not reentrant. Otherwise a frozen vision tower would keep its activations,
    and run backward, for a gradient that is not used."""
    model.disable_input_require_grads()  # type: ignore[operator]
