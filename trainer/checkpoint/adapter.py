"""What a peft adapter changes in its base, tensor by tensor, read from its files: low-rank updates, biases, and weights that were trained
whole. Variants with another formula are refused by name: their result would be wrong without an error.

The formula is that of peft 0.21 (peft/tuners/lora/layer.py, get_delta_weight): scale * B A, with scale = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732); each layer may have its own r and alpha. DoRA (Liu et al., arXiv 2402.09353; variants.py,
DoraLinearVariant.merge_safe) then scales each row of the sum to the length that its magnitude says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.contract import InputRefused
from trainer.contract.adapter_files import ADAPTER_CONFIG
from trainer.contract.listing import list_some
from trainer.stages.adapter import find_apart
from trainer.stages.adapter_layout import AdapterLayout, TokenRows
from trainer.tensor.stream import PIECE_ELEMENTS, TensorSource, TensorToWrite, read_float32, read_pieces
from trainer.tensor.table import replace_rows

# Other initializations take the adapter out of the base's weights and change those (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """scale * B A, added to a weight of (out, in); `a` (r, in), `b` (out, r). `transposed`: the weight is (in, out), as in Conv1D and embeddings.
    `magnitude`: (out,), of DoRA."""

    a: TensorSource
    b: TensorSource
    scale: float
    transposed: bool = False
    magnitude: TensorSource | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Keys: names of parameters in memory. `whole`: tensors that replace those of the base. `biases`: (tensor, scale), to be added. `untied`:
    tied parameter -> the one that it is tied to, where the merged model has both."""

    additions: dict[str, LowRankUpdate] = field(default_factory=dict)
    biases: dict[str, tuple[TensorSource, float]] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> frozenset[str]:
        return frozenset({*self.additions, *self.biases, *self.whole, *self.rows})


def read_adapter(layout: AdapterLayout, model: torch.nn.Module) -> Adapter:
    """What the adapter changes in `model`, its base, which may be on the meta device. Raises InputRefused for an adapter that cannot be merged file by
    file, and for another base."""
    refuse_variant(layout, model)
    adapter = Adapter(whole=dict(layout.whole), rows=dict(layout.rows), untied=find_apart(layout, model))
    for module, one in layout.factors.items():
        # peft sets fan_in_fan_out by the kind of the layer, whatever the config says
        transposed = one.table or type(model.get_submodule(module)).__name__ == "Conv1D"
        parts = one.tensors
        adapter.additions[f"{module}.weight"] = LowRankUpdate(
            a=parts["A"], b=parts["B"], scale=one.scale, transposed=transposed, magnitude=parts.get("magnitude")
        )
        if "bias" in parts:
            adapter.biases[f"{module}.bias"] = (parts["bias"], one.scale)
    refuse_misfits(layout, adapter, model)
    return adapter


def refuse_variant(layout: AdapterLayout, model: torch.nn.Module) -> None:
    start, wrong = layout.config.get("init_lora_weights"), []
    if start not in PLAIN_STARTS:
        wrong.append(f"init_lora_weights is {start!r}, which also changes the base")
    if layout.config.get("ensure_weight_tying") and find_apart(layout, model):
        wrong.append("ensure_weight_tying is set, and the base ties its embeddings")
    wrong += [
        f"{name} has DoRA on an embedding or a Conv1D" for name, one in layout.factors.items() if "magnitude" in one.tensors and one.table
    ][:1]
    if wrong:
        raise InputRefused(
            f"{layout.folder / ADAPTER_CONFIG}: {'; '.join(wrong)}: it cannot be merged file by file. Merge this one with peft's merge_and_unload, on a "
            "machine that can hold the model."
        )


def refuse_misfits(layout: AdapterLayout, adapter: Adapter, model: torch.nn.Module) -> None:
    """Raises InputRefused that names each tensor that the base does not have or has in another shape."""
    has = model.state_dict(keep_vars=True)
    shapes = {name: addition.shape for name, addition in adapter.additions.items()}
    shapes |= {name: source.shape for name, (source, _) in adapter.biases.items()} | {n: s.shape for n, s in adapter.whole.items()}
    ranks = [name for name, one in adapter.additions.items() if one.a.shape[0] != one.b.shape[1] or len(one.a.shape) != 2]
    wrong = [f"{name} is not in the base" for name in shapes if name not in has]
    wrong += [
        f"{name} is {list(has[name].shape)}, not {list(s)}" for name, s in shapes.items() if name in has and tuple(has[name].shape) != s
    ]
    wrong += [f"the factors of {name} have different ranks" for name in ranks]
    if wrong:
        raise InputRefused(
            f"stage.checkpoint: the adapter {layout.folder} does not fit its base: {list_some(wrong, SHOWN, '; ')}. Name the model "
            "that it was trained on in stage.base, or name another checkpoint."
        )


def merge_tensor(name: str, memory: str, base: TensorSource, adapter: Adapter) -> TensorToWrite:
    """The merged tensor `name` of the files (`memory` in memory): in the base's dtype, summed in float32."""
    source = adapter.whole.get(memory, base)
    if memory in adapter.rows:
        rows = adapter.rows[memory]
        source = replace_rows(source, rows.ids, rows.values.read_whole())

    def pieces() -> Iterator[Tensor]:
        if memory in adapter.additions:
            yield from add_low_rank(source, adapter.additions[memory], base.dtype)
        elif memory in adapter.biases:
            bias, scale = adapter.biases[memory]
            yield (source.read_whole().float() + bias.read_whole().float() * scale).to(base.dtype)
        else:
            yield from (piece.to(base.dtype) for piece in read_pieces(source))

    return TensorToWrite(name=name, dtype=base.dtype, shape=base.shape, pieces=pieces)


def changes_rows(sources: Mapping[str, TensorSource], memory: Mapping[str, str], adapter: Adapter) -> bool:
    """Whether the adapter has other rows than the base. `memory`: name in the files -> name in memory."""
    saved = {in_memory: sources[name] for name, in_memory in memory.items()}
    for name, rows in adapter.rows.items():
        base = saved[name if name in saved else adapter.untied[name]]
        if not torch.equal(base.read_whole()[list(rows.ids)].float(), rows.values.read_whole().to(base.dtype).float()):
            return True
    return False


def add_low_rank(base: TensorSource, addition: LowRankUpdate, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of base + scale * B A, a piece at a time, in `dtype`."""
    a, b = read_float32(addition.a), read_float32(addition.b)
    magnitude = read_float32(addition.magnitude).view(-1) if addition.magnitude else None
    rows, width = base.shape
    step = max(1, PIECE_ELEMENTS // width)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        weight = base.read(start * width, (end - start) * width).view(-1, width).float()
        product = (b @ a[:, start:end]).T if addition.transposed else b[start:end] @ a
        weight.add_(product.mul_(addition.scale))
        if magnitude is not None:
            weight = (magnitude[start:end] / torch.linalg.norm(weight, dim=1)).view(-1, 1) * weight
        yield weight.to(dtype)
