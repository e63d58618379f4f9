"""What becomes of a tensor's values in another type of element, counted value by value: what overflows, what vanishes, what loses bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.device.dtype import dtype_name
from trainer.tensor.stream import TensorSource, read_pieces

# Of a tensor's norm. No rounding to the nearest takes so much from values within the range of a type that we write: bfloat16's is 2^-8 of
# each at most. More is gone where values vanish or lose bits because they are too small for it.
LOSS_LIMIT = 2.0**-7


@dataclass(frozen=True, kw_only=True)
class CastError:
    """Of one tensor; counts are of values. `overflow`: finite before, infinite after. `underflow`: zero after, and not before. `denormal`:
    after, at fewer bits than the type has. `nan`, `infinite`: in the source. `largest_error`: relative, of those that neither overflow nor
    vanish. `loss`: the norm of what is lost over the tensor's own, of finite values."""

    name: str
    before: str
    after: str
    values: int
    overflow: int
    underflow: int
    denormal: int
    nan: int
    infinite: int
    largest_error: float
    loss: float

    @property
    def unfit(self) -> bool:
        """Whether the new type cannot hold it. A few values of millions vanish in any float16, and nothing is lost with them."""
        return self.overflow > 0 or self.loss > LOSS_LIMIT

    @property
    def remarks(self) -> str:
        """'' for a tensor of which there is nothing to say."""
        parts = {"overflow": self.overflow, "vanish": self.underflow, "become denormal": self.denormal}
        source = {"NaN in the source": self.nan, "infinite in the source": self.infinite}
        return ", ".join(f"{number:,} {what}" for what, number in (*parts.items(), *source.items()) if number)


def measure_cast_error(name: str, source: TensorSource, dtype: torch.dtype) -> CastError:
    """A pass over the tensor, a piece at a time."""
    counts = torch.zeros(5, dtype=torch.int64)
    norm, lost, worst = 0.0, 0.0, 0.0
    for piece in read_pieces(source):
        before = piece if piece.dtype == torch.float64 else piece.float()
        after = piece.to(dtype).to(before.dtype)
        counts += count_errors(before, after, torch.finfo(dtype).tiny)
        there = before.isfinite() & after.isfinite()
        if not bool(there.all()):
            before, after = before[there], after[there]
        error, size = (after - before).abs_(), before.abs()
        norm += float(size.square().sum(dtype=torch.float64))
        lost += float(error.square().sum(dtype=torch.float64))
        worst = max(worst, float((error / size).masked_fill_((size == 0) | (after == 0), 0.0).max())) if len(before) else worst
    overflow, underflow, denormal, nan, infinite = counts.tolist()
    return CastError(
        name=name,
        before=dtype_name(source.dtype),
        after=dtype_name(dtype),
        values=torch.Size(source.shape).numel(),
        overflow=overflow,
        underflow=underflow,
        denormal=denormal,
        nan=nan,
        infinite=infinite,
        largest_error=worst,
        loss=(lost / norm) ** 0.5 if norm else 0.0,
    )


def count_errors(before: Tensor, after: Tensor, smallest: float) -> Tensor:
    """(5,) int64: as the fields of Survival, in their order. `smallest`: of the new type's numbers that have all its bits."""
    denormal = (after != 0) & (after.abs() < smallest)
    found = (before.isfinite() & after.isinf(), (before != 0) & (after == 0), denormal, before.isnan(), before.isinf())
    return torch.stack([one.sum() for one in found])
