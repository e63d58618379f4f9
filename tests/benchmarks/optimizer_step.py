"""One update of bfloat16 weights and states: ours with stochastic rounding, compared with torch's AdamW. Prints ns per element.

    python tests/benchmarks/optimizer_step.py [DEVICE] [ELEMENTS]

One tensor with gradients on `cpu` (one thread), `cuda` or `npu`; the best of five updates after a first one.
"""

import sys
import time
from collections.abc import Callable

import torch

from trainer.optim.adamw import StochasticAdamW

RUNS = 5
KINDS: dict[str, Callable[[torch.nn.Parameter], torch.optim.Optimizer]] = {
    "stochastic": lambda p: StochasticAdamW([p], seed=0, lr=1e-3),
    "torch, one kernel": lambda p: torch.optim.AdamW([p], lr=1e-3, fused=True),
    "torch, operations": lambda p: torch.optim.AdamW([p], lr=1e-3, foreach=True),
}


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2**22
    torch.set_num_threads(1)
    for name, make in KINDS.items():
        weight = torch.nn.Parameter(torch.randn(count, device=device).bfloat16())
        weight.grad = torch.randn(count, device=device).bfloat16()
        steps = make(weight)
        seconds = min(time_step(steps, device) for _ in range(RUNS + 1))
        print(f"{name:<20}{seconds / count * 1e9:8.2f} ns per element")


def time_step(steps: torch.optim.Optimizer, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    steps.step()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


if __name__ == "__main__":
    main()
