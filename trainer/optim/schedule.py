"""The learning rate as a pure function of the step. The decays are those of transformers' get_*_schedule functions."""

import math
from collections.abc import Callable

from trainer.contract import Optimizer


def lr_at(step: int, steps: int, optimizer: Optimizer) -> float:
    """The rate of step `step`, 1 <= step <= steps.

    Warm-up is linear and reaches `optimizer.lr` at its last step. (transformers counts it from 0: there the first step has a rate of zero,
    and the peak comes one step later.) Then the rate falls from `lr` to `lr * final_ratio` by the schedule. That end would be reached at
    step `steps` + 1, so that no step has a rate of zero.
    """
    warmup = warmup_steps(steps, optimizer)
    if step <= warmup:
        return optimizer.lr * step / warmup
    factor = DECAY[optimizer.schedule](step - 1 - warmup, steps - warmup, steps, optimizer)
    return optimizer.lr * (factor * (1.0 - optimizer.final_ratio) + optimizer.final_ratio)


def warmup_steps(steps: int, optimizer: Optimizer) -> int:
    """A count when `warmup` >= 1, else a share of all steps, rounded up; at most all steps."""
    return count_share(optimizer.warmup, steps)


def count_share(value: float, steps: int) -> int:
    """Steps of a count (>= 1) or of a share of all steps, rounded up; at most all steps."""
    return min(math.ceil((value if value >= 1 else value * steps) - 1e-9), steps)  # 0.07 x 100 is 7.000000000000001


def fall_linearly(done: int, length: int, steps: int, optimizer: Optimizer) -> float:
    return 1.0 - done / length


def fall_as_cosine(done: int, length: int, steps: int, optimizer: Optimizer) -> float:
    """Half a cosine (Loshchilov and Hutter, SGDR, arXiv 1608.03983, equation 5, one period)."""
    return 0.5 * (1.0 + math.cos(math.pi * (done / length)))


def restart_cosine(done: int, length: int, steps: int, optimizer: Optimizer) -> float:
    """`cycles` periods of equal length, each from the peak (SGDR, with T_mult 1)."""
    return 0.5 * (1.0 + math.cos(math.pi * ((optimizer.cycles * (done / length)) % 1.0)))


def fall_as_power(done: int, length: int, steps: int, optimizer: Optimizer) -> float:
    return float((1.0 - done / length) ** optimizer.power)


def stay_then_fall(done: int, length: int, steps: int, optimizer: Optimizer) -> float:
    """Warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395, section 4.1): the peak until the last share `decay` of all steps, then
    half a cosine, which is the default of transformers' get_wsd_schedule."""
    decay = min(count_share(optimizer.decay, steps), length)
    late = done - (length - decay)
    return 1.0 if late < 0 else 0.5 * (1.0 + math.cos(math.pi * (late / max(1, decay))))


# Name -> factor of the peak, from the steps done since the warm-up, their number, the number of all steps, and the options.
DECAY: dict[str, Callable[[int, int, int, Optimizer], float]] = {
    "constant": lambda *_: 1.0,
    "linear": fall_linearly,
    "cosine": fall_as_cosine,
    "cosine_restarts": restart_cosine,
    "polynomial": fall_as_power,
    "wsd": stay_then_fall,
}
