"""A table of rows in a file, such as embeddings, with more rows or other ones than the file has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.tensor.stream import TensorSource, read_pieces


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """`base`: (its rows, width). `rows`: of this table; those behind the base's are the mean of the base's. `replaced`: row -> (width,)."""

    base: TensorSource
    rows: int
    replaced: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.base.shape[1]

    def read(self, start: int, count: int) -> Tensor:
        width, own = self.base.shape[1], self.base.shape[0]
        first, end = start // width, -(-(start + count) // width)
        inside = max(0, min(end, own) - first)
        parts = [self.base.read(first * width, inside * width).view(-1, width)] if inside else []
        if end > max(first, own):
            parts.append(self.mean().expand(end - max(first, own), -1))
        table = torch.cat(parts)
        for row, values in self.replaced.items():
            if first <= row < end:
                table[row - first] = values.to(self.dtype)
        return table.view(-1)[start - first * width : start - first * width + count]

    def read_whole(self) -> Tensor:
        return self.read(0, self.rows * self.base.shape[1]).view(self.shape)

    def mean(self) -> Tensor:
        """(width,), summed in float32."""
        total = torch.zeros(self.base.shape[1])
        for piece in read_pieces(self.base):
            total += piece.sum(dim=0, dtype=torch.float32)
        return (total / self.base.shape[0]).to(self.dtype)


def grow_sources(sources: Mapping[str, TensorSource], names: Mapping[str, str], model: torch.nn.Module) -> dict[str, TensorSource]:
    """The sources, with as many rows as the parameters of `model` have. `names`: name in the files -> name in memory."""
    has = model.state_dict(keep_vars=True)
    return {name: grow_source(source, has.get(names.get(name, ""))) for name, source in sources.items()}


def grow_source(source: TensorSource, wanted: Tensor | None) -> TensorSource:
    larger = wanted is not None and len(source.shape) == 2 == wanted.ndim and wanted.shape[1] == source.shape[1]
    if wanted is None or not larger or wanted.shape[0] <= source.shape[0]:
        return source
    return TableSource(base=source, rows=wanted.shape[0])


def replace_rows(source: TensorSource, ids: Sequence[int], values: Tensor) -> TableSource:
    """`values`: (len(ids), width)."""
    return TableSource(base=source, rows=source.shape[0], replaced=dict(zip(ids, values, strict=True)))
