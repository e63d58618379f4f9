"""Token scores of a given answer equal those of the plain logits, for every family."""

import math

import pytest
import torch

from tests.trainer.models.conftest import Made
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import Sample
from trainer.evaluation.teacher_forcing import add_scores, figures, label_last_answer, score_tokens


def test_scores_equal_those_of_the_plain_logits(tiny: Made, samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the last answer, two tokens at a time."""
    monkeypatch.setattr("trainer.evaluation.teacher_forcing.CHUNK", 2)
    torch.set_num_threads(1)
    found = score_tokens(tiny.model, samples, tiny.processor, tiny.spec, torch.device("cpu"))
    for sample, judged in zip(samples, found, strict=True):
        batch = collate([label_last_answer(sample)], tiny.processor, tiny.spec)
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            scores = tiny.model(**batch).logits[0, :-1].float().log_softmax(dim=-1)
        indices = (labels != -100).nonzero().flatten()
        nats = -sum(float(scores[index, labels[index]]) for index in indices)
        right = sum(int(scores[index].argmax() == labels[index]) for index in indices)
        ids = tiny.processor.tokenizer(sample.messages[-1].content + tiny.spec.model.template.end_mark, add_special_tokens=False)
        assert judged.tokens == len(indices) and abs(judged.tokens - len(ids["input_ids"])) <= 2
        assert (judged.right, judged.nats) == (right, pytest.approx(nats, rel=1e-4))
        assert judged.perplexity == pytest.approx(math.exp(nats / len(indices)), rel=1e-4)
    everything = add_scores(found)
    assert everything.tokens == sum(one.tokens for one in found)
    assert figures(everything, ("perplexity", "anls")) == {"perplexity": everything.perplexity}


def test_the_head_is_restored(tiny: Made, samples: tuple[Sample, ...]) -> None:
    score_tokens(tiny.model, samples[2:], tiny.processor, tiny.spec, torch.device("cpu"))
    assert "forward" not in vars(tiny.model.get_output_embeddings())  # type: ignore[operator]
