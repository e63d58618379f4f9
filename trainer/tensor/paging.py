"""A model whose weights are read from disk while it computes: a module loads them before its forward pass and drops them after it. So a
forward pass of any model needs the memory of its largest layer only, on one device, in any storage format.

A module of up to UNIT_BYTES loads all of its parameters at once, also those of submodules that are used without being called, as torch's
MultiheadAttention uses its output projection.
"""

from collections.abc import Callable, Iterator

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

UNIT_BYTES = 2**30  # in float32: a decoder layer of a 7B model takes 0.93 GB
FROZEN_COPY = ".original_module."  # what peft keeps beside a module that is trained whole; never used in a forward pass

ReadTensor = Callable[[str], Tensor]  # name of a parameter -> float32, on the CPU


class Pager:
    """Loads the parameters of `model`, which is on the meta device, to `device` and drops them again."""

    def __init__(self, model: nn.Module, read: ReadTensor, device: torch.device) -> None:
        self.read, self.device = read, device
        self.taken: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter | None]]] = {}
        self.owned = {module: list(parameters_of(module, name)) for name, module in model.named_modules()}
        for module in model.modules():
            if bytes_of(module) <= UNIT_BYTES or not any(True for _ in module.children()):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
            else:
                self._bring(self.owned[module])

    def _enter(self, module: nn.Module, _: object) -> None:
        self.taken[module] = self._bring(owned for part in module.modules() for owned in self.owned[part])

    def _leave(self, module: nn.Module, _: object, __: object) -> None:
        for owner, key, before in self.taken.pop(module):
            owner._parameters[key] = before

    def _bring(self, names: Iterator | list) -> list[tuple[nn.Module, str, nn.Parameter | None]]:
        """Loads those that are not loaded yet."""
        brought = []
        for owner, key, name in names:
            before = owner._parameters[key]
            if before is not None and before.is_meta:
                owner._parameters[key] = nn.Parameter(self.read(name).to(self.device), requires_grad=False)
                brought.append((owner, key, before))
        return brought


def page(model: nn.Module, read: ReadTensor, device: torch.device) -> nn.Module:
    """The same model, on the meta device, able to compute in float32 without gradients."""
    for _, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and not value.is_meta:
                module._parameters[key] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
    Pager(model, read, device)
    return model.eval()


def fill_buffers(model: nn.Module, read: ReadTensor, saved: set[str], device: torch.device) -> None:
    """Give a model on the meta device its buffers: those in `saved` come from the files; the others, as rotary frequencies, are computed
    by a second instance."""
    on_meta = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    twin: dict[str, Tensor] = {}
    if on_meta - saved:
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            twin = dict(type(model)(model.config).named_buffers())  # type: ignore[arg-type]
    for name in on_meta:
        owner, _, key = name.rpartition(".")
        value = read(name) if name in saved else twin[name]
        model.get_submodule(owner)._buffers[key] = value.to(device)


def parameters_of(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, key, full name); tied parameters under each of their names."""
    for key in module._parameters:
        whole = f"{name}.{key}" if name else key
        if FROZEN_COPY not in f".{whole}":
            yield module, key, whole


def bytes_of(module: nn.Module) -> int:
    """In float32."""
    return sum(4 * parameter.numel() for parameter in module.parameters())
