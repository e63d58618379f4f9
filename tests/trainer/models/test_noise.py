"""NEFTune in every family: how much noise the embeddings of each sample get, and where there is none."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.models.conftest import Made, read_model, to_arguments
from trainer.data.batch.collate import collate
from trainer.data.batch.pack import collate_packed
from trainer.data.rows.sample import Sample
from trainer.kernels.noise import EmbeddingNoise
from trainer.models.attention import attend_by_sample

ALPHA = 5.0


@pytest.fixture
def hooked(tiny: Made) -> Iterator[tuple[Made, EmbeddingNoise, list[Tensor]]]:
    """The noise, and what the embedding returned after it. The shared model loses both hooks again."""
    embedding, seen = tiny.model.get_input_embeddings(), list[Tensor]()  # type: ignore[operator]
    before = dict(embedding._forward_hooks)
    noise = EmbeddingNoise(embedding, ALPHA)
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    yield tiny, noise, seen
    embedding._forward_hooks.clear()
    embedding._forward_hooks.update(before)


def first_embedding(made: Made, noise: EmbeddingNoise, seen: list[Tensor], batch: dict[str, Any], *, noisy: bool) -> tuple[Tensor, Tensor]:
    """The embeddings of the tokens, and the logits."""
    seen.clear()
    mask = {"attention_mask": batch["sample_ends"]} if "sample_ends" in batch else {}
    without = ("labels", "noise_spans", "sample_ends", *(("attention_mask",) if "position_ids" in batch else ()))
    with torch.no_grad(), noise.adding(batch["noise_spans"] if noisy else None):
        logits = made.model(**to_arguments(batch, *without), **mask, use_cache=False).logits
    assert noise.spans is None
    return next(one for one in seen if one.shape[:2] == batch["input_ids"].shape), logits


def test_each_sample_gets_the_noise_of_its_length(hooked: tuple[Made, EmbeddingNoise, list[Tensor]], samples: tuple[Sample, ...]) -> None:
    made, noise, seen = hooked
    attend_by_sample()
    spec = replace(made.spec, stage=replace(made.spec.stage, neftune_alpha=ALPHA))
    drawn = [replace(sample, draw=f"0:{number}") for number, sample in enumerate(samples)]
    batches = [collate(drawn, made.processor, spec)]
    if read_model(made.name).packable:
        batches.append(collate_packed([drawn], made.processor, spec))
    found = []
    for batch in batches:
        (with_noise, logits), (plain, quiet) = (first_embedding(made, noise, seen, batch, noisy=noisy) for noisy in (True, False))
        assert not torch.equal(logits, quiet), "the noise reaches the logits"
        added, parts = with_noise - plain, []
        for row, start, length, _ in batch["noise_spans"].tolist():
            parts.append(added[row, start : start + length].clone())
            bound = ALPHA / (length * added.shape[-1]) ** 0.5
            assert 0.97 * bound < float(parts[-1].abs().max()) <= 1.001 * bound
            assert abs(float(parts[-1].mean())) < 0.1 * bound
            added[row, start : start + length] = 0
        assert not added.any(), "padding gets none"
        found.append(parts)
    for padded, packed in zip(found[0], found[-1], strict=True):
        assert torch.allclose(padded, packed, atol=1e-5), "a sample has the same noise in both layouts"
