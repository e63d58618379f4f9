"""Packed rows with the model of each family: every sample has the same loss as alone, and none attends to another."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.trainer.models.conftest import CONF, TINY, Made, read_model
from trainer.contract import InputRefused
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import collate
from trainer.data.batch.load import keep_lengths
from trainer.data.batch.pack import collate_packed
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.models.attention import attend, attend_by_sample

PACKABLE = tuple(name for name in TINY if read_model(name).packable)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def sample_attention() -> None:
    attend_by_sample()


@pytest.fixture(params=PACKABLE)
def packable(request: pytest.FixtureRequest, make_tiny) -> Made:
    return make_tiny(request.param)


@pytest.fixture(params=["ends", "positions"])
def separate(request: pytest.FixtureRequest) -> Callable[[Tensors], Tensors]:
    """How the samples of a row are separated: by their ends or, as for flash and eager attention, by positions that restart."""
    dropped = {"sample_ends"} if request.param == "positions" else set()
    return lambda batch: {key: value for key, value in batch.items() if key not in dropped}


def losses(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
    """Cross entropy of each token, [B, T - 1] float32, with the inputs of Engine.loss_sum."""
    kept = {"labels", "sample_ends", *(("attention_mask",) if "position_ids" in batch else ())}
    mask = {"attention_mask": batch["sample_ends"]} if "sample_ends" in batch else {}
    logits = model(**{key: value for key, value in batch.items() if key not in kept}, **mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none")


def edges(batch: Tensors) -> list[int]:
    """The start of each sample in the first row, and the end of the row."""
    counts = batch["position_ids"] if batch["position_ids"].ndim == 2 else batch["position_ids"][0]
    return [*(counts[0] == 0).nonzero().flatten().tolist(), counts.shape[1]]


def test_packable_in_the_configs(tiny: Made) -> None:
    assert (tiny.processor.position_ids is not None) == read_model(tiny.name).packable
    others = {path.stem for path in CONF.glob("*.yaml") if read_model(path.stem).family == tiny.family.name}
    assert {read_model(name).packable for name in others} == {read_model(tiny.name).packable}
    assert len(PACKABLE) == 7


def test_each_sample_has_the_same_loss_as_alone(
    packable: Made, samples: tuple[Sample, ...], separate: Callable[[Tensors], Tensors]
) -> None:
    model, processor, spec = packable.model, packable.processor, packable.spec
    alone = [losses(model, collate([sample], processor, spec)).sum().item() for sample in samples]
    lengths = keep_lengths(samples, processor, spec, Cache(0))(range(len(samples)))
    rows = [[0, 2, 1], [1, 0], [2], []]
    batch = separate(collate_packed([[samples[number] for number in row] for row in rows], processor, spec))
    token, start = losses(model, batch)[0], 0
    for number in (number for row in rows for number in row):
        assert token[start : start + lengths[number] - 1].sum().item() == pytest.approx(alone[number], rel=1e-5), f"sample {number}"
        start += lengths[number]
    assert start == batch["input_ids"].shape[1] and token.sum().item() == pytest.approx(
        sum(alone[number] for row in rows for number in row), rel=1e-5
    )


def gradients_across(made: Made, samples: tuple[Sample, ...], batch: Tensors) -> list[list[bool]]:
    """[sample][other]: whether the loss of a sample in the first row depends on the embeddings of the other."""
    seen: list[torch.Tensor] = []
    first = ("language_model.layers.0", "llm.model.layers.0")
    layer = next(module for name, module in made.model.named_modules() if name.endswith(first) or name == "model.layers.0")
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    token, bounds = losses(made.model, batch), edges(batch)
    handle.remove()
    table = []
    for start, end in pairwise(bounds):
        (gradient,) = torch.autograd.grad(token[0, start : end - 1].sum(), seen[0], retain_graph=True)
        parts = [gradient[0, first:last] for first, last in pairwise(bounds)]
        table.append([bool((part != 0).any()) for part in parts])
    return table


def test_no_sample_attends_to_another(packable: Made, samples: tuple[Sample, ...], separate: Callable[[Tensors], Tensors]) -> None:
    """The gradient is exactly zero."""
    batch = separate(collate_packed([samples[:2], samples[2:]], packable.processor, packable.spec))
    assert gradients_across(packable, samples, batch) == [[True, False, False], [False, True, False], [False, False, True]]


def test_linear_attention_passes_its_state_on(make_tiny, samples: tuple[Sample, ...]) -> None:
    """Why this family is not packable: even with positions that restart, later samples depend on earlier ones."""
    made = make_tiny("tiny_minicpm_v_4_6")
    processor = make_tiny("tiny_llava").processor  # positions 0, 1, 2, ...
    batch = collate([samples[2]], made.processor, made.spec)
    ids = batch["input_ids"]
    count = processor.position_ids(ids[0], ())
    joined = {
        "input_ids": torch.cat([ids, ids], dim=1),
        "labels": torch.cat([batch["labels"], batch["labels"]], dim=1),
        "attention_mask": torch.ones(1, 2 * ids.shape[1], dtype=torch.int64),
        "position_ids": torch.cat([count, count]).expand(4, 1, -1),
    }
    assert gradients_across(made, samples, joined) == [[True, False], [True, True]]


def test_gradients_of_a_packed_batch_are_those_of_a_padded_one(packable: Made, samples: tuple[Sample, ...]) -> None:
    model, processor, spec = packable.model, packable.processor, packable.spec

    def gradients(*batches: Tensors) -> Tensors:
        model.zero_grad()
        for batch in batches:
            losses(model, batch).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    padded = gradients(collate(samples, processor, spec))
    packed = gradients(collate_packed([samples[:2], samples[2:]], processor, spec), collate_packed([()], processor, spec))
    model.zero_grad()
    assert padded.keys() == packed.keys()
    largest = max(gradient.abs().max().item() for gradient in padded.values())  # that of a key bias is only rounding
    for name, gradient in padded.items():
        assert torch.allclose(gradient, packed[name], rtol=1e-4, atol=1e-6 * largest), name


def test_a_sliding_window_is_refused() -> None:
    """It needs the mask that is replaced by the ends of the samples."""
    heads = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputRefused, match="sliding window"):
        attend(SimpleNamespace(), heads, heads, heads, torch.tensor([[[[2, 4]]]], dtype=torch.int32), sliding_window=2)
