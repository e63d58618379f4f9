"""The states of the random number generators of Python, NumPy and torch, as plain JSON data."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def read_rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    states: dict[str, Any] = {"accelerator": device.type}
    states |= {"python": random.getstate(), "numpy": (name, keys.tolist(), position, has_gauss, gauss)}
    states["torch"] = torch.get_rng_state().numpy().tobytes().hex()
    states["device"] = getattr(torch, device.type).get_rng_state(device).cpu().numpy().tobytes().hex() if device.type != "cpu" else ""
    return states


def set_rng_state(states: dict[str, Any], device: torch.device) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(read_bytes(states["torch"]))
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(read_bytes(states["device"]), device)


@contextmanager
def keep_rng_state(accelerator: str) -> Iterator[None]:
    """Random numbers drawn within the block do not change those drawn after it."""
    device = torch.device(accelerator)
    states = read_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(states, device)


def read_bytes(text: str) -> Tensor:
    """(n) uint8."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
