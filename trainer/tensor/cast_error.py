"""The error of casting a tensor to another dtype, counted per value: overflow, underflow, lost bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.device.dtype import dtype_name
from trainer.tensor.stream import TensorSource, read_pieces

# Share of a tensor's norm. Rounding to nearest never loses so much of values within the range of the dtype (bfloat16: at most 2^-8 of each).
# More is lost only where values underflow or become denormal.
LOSS_LIMIT = 2.0**-7


@dataclass(frozen=True, kw_only=True)
class CastError:
    """Of one tensor; counts are of values. `overflow`: finite before, infinite after. `underflow`: nonzero before, zero after. `denormal`:
    denormal after. `nan`, `infinite`: in the source. `largest_error`: relative, of values that neither overflow nor underflow. `loss`: norm
    of the error over the tensor's norm, of finite values."""

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
        """Whether the new dtype cannot hold the tensor. A few of millions of values underflow in any float16, and nothing is lost by that."""
        return self.overflow > 0 or self.loss > LOSS_LIMIT

    @property
    def remarks(self) -> str:
        """'' if no value changes its kind."""
        parts = {"overflow": self.overflow, "vanish": self.underflow, "become denormal": self.denormal}
        source = {"NaN in the source": self.nan, "infinite in the source": self.infinite}
        return ", ".join(f"{number:,} {what}" for what, number in (*parts.items(), *source.items()) if number)


def measure_cast_error(name: str, source: TensorSource, dtype: torch.dtype) -> CastError:
    """Reads the tensor once, in pieces."""
    counts = torch.zeros(5, dtype=torch.int64)
    norm, lost, worst = 0.0, 0.0, 0.0
    for piece in read_pieces(source):
        before = piece if piece.dtype == torch.float64 else piece.float()
        after = piece.to(dtype).to(before.dtype)
        counts += count_errors(before, after, torch.finfo(dtype).tiny)
        finite = before.isfinite() & after.isfinite()
        if not bool(finite.all()):
            before, after = before[finite], after[finite]
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
    """(5,) int64: the counts of CastError, in the order of its fields. `smallest`: the smallest normal number of the new dtype."""
    denormal = (after != 0) & (after.abs() < smallest)
    found = (before.isfinite() & after.isinf(), (before != 0) & (after == 0), denormal, before.isnan(), before.isinf())
    return torch.stack([one.sum() for one in found])
