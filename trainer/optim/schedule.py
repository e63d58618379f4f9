"""The learning rate as a pure function of the step."""

import math

from trainer.contract import Optimizer


def lr_at(step: int, steps: int, optimizer: Optimizer) -> float:
    """The rate of step `step`, 1 <= step <= steps.

    Warm-up is linear and reaches `optimizer.lr` at its last step. Then: constant; linear down to zero; or half a cosine down to zero
    (Loshchilov and Hutter, SGDR, arXiv 1608.03983, equation 5, one period). Zero would be reached at step `steps` + 1, so that no step
    has a rate of zero.
    """
    warmup = warmup_steps(steps, optimizer)
    if step <= warmup:
        return optimizer.lr * step / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    return optimizer.lr * DECAY[optimizer.schedule](progress)


def warmup_steps(steps: int, optimizer: Optimizer) -> int:
    """A count when `warmup` >= 1, else a share of all steps, rounded up; at most all steps."""
    warmup = optimizer.warmup if optimizer.warmup >= 1 else optimizer.warmup * steps
    return min(math.ceil(warmup - 1e-9), steps)  # 0.07 x 100 is 7.000000000000001


DECAY = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
