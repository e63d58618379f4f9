"""Which layer first made a value that is no number, found by doing a spoilt step once more with every module under watch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.checkpoint.state import read_scaler
from trainer.distributed.engine import Engine


@dataclass(frozen=True, kw_only=True)
class StepSnapshot:
    """What a step changes before its update: torch's random numbers (of the host, of the device or None) and the loss scale."""

    host: Tensor
    device: Tensor | None
    scaler: dict[str, Any]


def take_snapshot(engine: Engine) -> StepSnapshot:
    """Some microseconds: neither waits for the device."""
    kind = engine.device.type
    own = getattr(torch, kind).get_rng_state(engine.device) if kind != "cpu" else None
    return StepSnapshot(host=torch.get_rng_state(), device=own, scaler=read_scaler(engine))


def restore_rng(engine: Engine, noted: StepSnapshot) -> None:
    """As it was at `take_snapshot`. The weights and moments of a spoilt step need nothing: it has not updated them."""
    torch.set_rng_state(noted.host)
    if noted.device is not None:
        getattr(torch, engine.device.type).set_rng_state(noted.device, engine.device)
    for key, value in noted.scaler.items():
        setattr(engine.handle.optimizer.loss_scaler, key, value)


class NonfiniteWatch:
    """`first`: the first place that was seen, '' while all is finite. `micro`: the micro-batch under way, from 1."""

    def __init__(self) -> None:
        self.first, self.backward, self.micro = "", False, 0

    def begin(self, *_: Any) -> None:
        self.micro += 1

    def look_at_input(self, name: str, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        values = (args, {key: value for key, value in kwargs.items() if "mask" not in key})  # a mask may well hold -inf
        self._look(values, f"what reaches {name} ({type(module).__name__})")

    def look_at_output(self, name: str, module: torch.nn.Module, _: Any, output: Any) -> None:
        self._look(output, f"the output of {name} ({type(module).__name__}){describe_weights(module)}")
        for tensor in find_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.look_at_gradient, f"the gradient of the output of {name} ({type(module).__name__})"))

    def look_at_gradient(self, what: str, gradient: Tensor) -> None:
        if not self.first:
            self._look(gradient, what)
            self.backward = bool(self.first)

    def _look(self, values: Any, what: str) -> None:
        if not self.first and not all(bool(tensor.isfinite().all()) for tensor in find_tensors(values)):
            self.first = f"micro-batch {self.micro}: {what}"


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Floating ones, in tuples, lists, dicts and transformers' outputs."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from find_tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from find_tensors(item)


def describe_weights(module: torch.nn.Module) -> str:
    """ZeRO 3 keeps this rank's part of a weight beside it."""
    own = {name: getattr(p, "ds_tensor", p) for name, p in module._parameters.items() if p is not None}
    broken = [name for name, p in own.items() if p.is_floating_point() and not bool(p.detach().isfinite().all())]
    return f", whose own {' and '.join(broken)} is no number" if broken else ""


@contextmanager
def watch_modules(model: torch.nn.Module) -> Iterator[NonfiniteWatch]:
    """Every module's input, output and gradient, and every trained parameter's gradient. Slow: each look waits for the device."""
    watch = NonfiniteWatch()
    hooks = [model.register_forward_pre_hook(watch.begin)]
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(watch.look_at_input, name or "the model"), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(watch.look_at_output, name or "the model")))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(partial(watch.look_at_gradient, f"the gradient of {name}")))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def gather_first_finding(engine: Engine, watch: NonfiniteWatch) -> str:
    """What was seen first, forward before backward, then by rank. Every rank must call it. A sentence, which says so where nothing was."""
    said = [(watch.backward, watch.first)] * engine.world_size
    if engine.world_size > 1:
        torch.distributed.all_gather_object(said, (watch.backward, watch.first))
    seen = sorted((backward, rank, first) for rank, (backward, first) in enumerate(said) if first)
    if not seen:
        return "Done once more, every layer's output and gradient is finite: only their sum over micro-batches or ranks is not."
    _, rank, first = seen[0]
    others = f"; {len(seen) - 1} other rank(s) saw the like" if len(seen) > 1 else ""
    return f"The first value that is no number: on rank {rank}, {first}{others}."
