"""Finds the layer that first computed a non-finite value, by repeating the step with every module checked."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.state import read_scaler
from trainer.contract.wording import plural
from trainer.distributed.collective import gather_objects
from trainer.distributed.engine import Engine


@dataclass(frozen=True, kw_only=True)
class StepSnapshot:
    """What a step changes before its update: torch's random state (of the host, and of the device or None) and the loss scale."""

    host: Tensor
    device: Tensor | None
    scaler: dict[str, Any]


def take_snapshot(engine: Engine) -> StepSnapshot:
    """Takes microseconds: it does not wait for the device."""
    kind = engine.device.type
    own = getattr(torch, kind).get_rng_state(engine.device) if kind != "cpu" else None
    return StepSnapshot(host=torch.get_rng_state(), device=own, scaler=read_scaler(engine))


def restore_rng(engine: Engine, snapshot: StepSnapshot) -> None:
    """Restore the state at `take_snapshot`. Weights and moments need nothing: a non-finite step does not update them."""
    torch.set_rng_state(snapshot.host)
    if snapshot.device is not None:
        getattr(torch, engine.device.type).set_rng_state(snapshot.device, engine.device)
    for key, value in snapshot.scaler.items():
        setattr(engine.handle.optimizer.loss_scaler, key, value)


class NonfiniteWatch:
    """`first`: the first finding, '' while everything is finite. `micro`: the current micro-batch, from 1."""

    def __init__(self) -> None:
        self.first, self.backward, self.micro = "", False, 0

    def begin(self, *_: Any) -> None:
        self.micro += 1

    def check_input(self, name: str, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        values = (args, {key: value for key, value in kwargs.items() if "mask" not in key})  # a mask may contain -inf
        self._check(values, f"the input of {name} ({type(module).__name__})")

    def check_output(self, name: str, module: torch.nn.Module, _: Any, output: Any) -> None:
        self._check(output, f"the output of {name} ({type(module).__name__}){describe_weights(module)}")
        for tensor in find_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.check_gradient, f"the gradient of the output of {name} ({type(module).__name__})"))

    def check_gradient(self, what: str, gradient: Tensor) -> None:
        if not self.first:
            self._check(gradient, what)
            self.backward = bool(self.first)

    def _check(self, values: Any, what: str) -> None:
        if not self.first and not all(bool(tensor.isfinite().all()) for tensor in find_tensors(values)):
            self.first = f"micro-batch {self.micro}: {what}"


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in tuples, lists, dicts and transformers' outputs."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from find_tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from find_tensors(item)


def describe_weights(module: torch.nn.Module) -> str:
    """Names the module's own weights that are not finite. Under ZeRO 3 this rank's part is in `ds_tensor`."""
    own = {name: getattr(p, "ds_tensor", p) for name, p in module._parameters.items() if p is not None}
    broken = [name for name, p in own.items() if p.is_floating_point() and not bool(p.detach().isfinite().all())]
    return f", whose own {' and '.join(broken)} is not finite" if broken else ""


@contextmanager
def watch_modules(model: torch.nn.Module) -> Iterator[NonfiniteWatch]:
    """Check every module's input, output and gradient, and every trained parameter's gradient. Slow: each check waits for the device."""
    watch = NonfiniteWatch()
    hooks = [model.register_forward_pre_hook(watch.begin)]
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(watch.check_input, name or "the model"), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(watch.check_output, name or "the model")))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(partial(watch.check_gradient, f"the gradient of {name}")))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def gather_first_finding(engine: Engine, watch: NonfiniteWatch) -> str:
    """The first finding as a sentence: forward before backward, then by rank. Every rank must call it."""
    findings = gather_objects((watch.backward, watch.first))
    seen = sorted((backward, rank, first) for rank, (backward, first) in enumerate(findings) if first)
    if not seen:
        return "When the step was repeated, every layer's output and gradient was finite: only a sum over micro-batches or ranks is not."
    _, rank, first = seen[0]
    others = f"; {plural(len(seen) - 1, 'other rank')} found one too" if len(seen) > 1 else ""
    return f"The first non-finite value: on rank {rank}, {first}{others}."
