"""Parameters by name as whole modules, which is what peft saves and transformers draws."""

from collections.abc import Set

import torch


def find_whole_modules(model: torch.nn.Module, names: Set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The outermost modules all of whose parameters are in `names`, and those of `names` that lie in none of them."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()} if name else set()
        if own and own <= names and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found), tuple(sorted(name for name in names if not any(name.startswith(f"{outer}.") for outer in found)))


def drop_input_gradients(model: torch.nn.Module) -> None:
    """transformers and peft have the embeddings' outputs need a gradient wherever layers are computed twice. Reentrant checkpointing asks for
    that; trainer.stages.gradient_checkpointing's is not reentrant, and a frozen vision tower would be kept, and computed backward, for a gradient that nobody
    reads."""
    model.disable_input_require_grads()  # type: ignore[operator]
