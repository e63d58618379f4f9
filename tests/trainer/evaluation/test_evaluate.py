import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.contract import Evaluation, Template
from trainer.data.batch.collate import collate, collate_prompts
from trainer.data.check import resolve
from trainer.data.rows.sample import read_samples
from trainer.evaluation.evaluate import batches_of_rank, end_ids, evaluate, read_answer
from trainer.models import find_family
from trainer.models.tiny_tokenizer import tiny_tokenizer

TEMPLATE = Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>")


def test_every_rank_gets_as_many_batches_as_any_other() -> None:
    for count in (0, 1, 5, 7, 8, 33):
        parts = [batches_of_rank(list(range(count)), rank, 3, 4) for rank in range(3)]
        assert len({len(part) for part in parts}) == 1
        assert {item for part in parts for batch in part for item in batch} == set(range(count))


@pytest.mark.parametrize(("text", "answer"), [("7</s><pad><pad>", "7"), (" 7</s>7", " 7"), ("17", "17"), ("</s>", "")])
def test_an_answer_ends_at_its_end_mark(text: str, answer: str) -> None:
    tokenizer = tiny_tokenizer("<image>", TEMPLATE)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert read_answer(tokenizer, ids, "</s>").startswith(answer)
    assert read_answer(tokenizer, ids, "</s>").strip() in (answer.strip(), "77")


def test_an_end_mark_of_several_tokens_is_cut_in_the_text() -> None:
    tokenizer = tiny_tokenizer("<image>", TEMPLATE)
    ids = torch.tensor(tokenizer("7 ### and more", add_special_tokens=False)["input_ids"])
    assert end_ids(tokenizer, "###") == [tokenizer.eos_token_id]
    assert read_answer(tokenizer, ids, "###") == "7 "


@pytest.fixture
def ready(tiny_spec: Any) -> tuple[torch.nn.Module, Any, Any, Any]:
    spec = tiny_spec(changes={"evaluation": Evaluation(batch=5, max_new_tokens=3, limit=12)})
    family = find_family("llava")
    torch.manual_seed(0)
    places = resolve(spec.data)
    assert places.evaluation
    samples, _ = read_samples(places.evaluation, places.images)
    return family.create(spec.model).eval(), family.create_processor(spec.model), spec, samples


def test_answers_are_those_of_a_plain_greedy_loop(ready: Any) -> None:
    """Without cache, padding or batch: the whole text again for each token."""
    model, processor, spec, samples = ready
    scores = evaluate(model, samples, processor, spec, torch.device("cpu"), rank=0, world_size=1, partitioned=False)
    rows = [json.loads(line) for line in (Path(spec.output) / "samples.jsonl").read_text().splitlines()]
    assert scores["count"] == len(rows) == 12
    assert [row["row"] for row in rows] == list(range(1, 13))
    assert rows[0]["images"] == [str(samples[0].images[0].relative_to(spec.data.root))], "below the data's folder, wherever that lies"
    assert scores["exact_match"] == sum(row["match"] for row in rows) / 12
    for sample, row in list(zip(samples, rows, strict=False))[:3]:
        batch, references = collate_prompts([sample], processor, spec)
        ids = batch["input_ids"]
        for _ in range(3):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
        assert row["got"] == read_answer(processor.tokenizer, ids[0, batch["input_ids"].shape[1] :], "</s>").strip()
        assert (row["expected"], row["prompt"]) == (references[0], "<image>\nWhich digit is this?")


def test_a_right_answer_counts(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with answers given instead of generated."""
    model, processor, spec, samples = ready
    given = iter([" 1 </s>", "3</s>", "wrong</s>"])

    def answer(_: Any, batch: dict[str, torch.Tensor], *__: Any, **___: Any) -> torch.Tensor:
        texts = [processor.tokenizer(next(given), add_special_tokens=False)["input_ids"] for _ in batch["input_ids"]]
        width = max(map(len, texts))
        new = torch.tensor([text + [processor.tokenizer.pad_token_id] * (width - len(text)) for text in texts])
        return torch.cat([batch["input_ids"], new], dim=1)

    monkeypatch.setattr("trainer.evaluation.evaluate.generate", answer)
    spec = replace(spec, evaluation=Evaluation(batch=2, limit=3))
    expected = [sample.messages[-1].content for sample in samples[:3]]
    assert expected[:2] == ["1", "3"]
    scores = evaluate(model, samples, processor, spec, torch.device("cpu"), rank=0, world_size=1, partitioned=False)
    assert scores == {"exact_match": pytest.approx(2 / 3), "count": 3.0}


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_loss_is_the_mean_over_every_answer_once(ranks: int, ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared out to ranks, where some items are done twice so that all do as many; and modules that were frozen in evaluation stay so."""
    model, processor, spec, samples = ready
    model.train()
    model.model.vision_tower.eval()

    def loss_sum(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")

    said: list[tuple[float, int]] = []
    monkeypatch.setattr("trainer.evaluation.evaluate.mean_loss", lambda losses: said.extend(losses) or 0.0)
    monkeypatch.setattr("trainer.evaluation.evaluate.merge_rows", lambda rows: rows)
    for rank in range(ranks):
        place = {"rank": rank, "world_size": ranks, "partitioned": False, "file": f"samples/rank-{rank}.jsonl"}
        evaluate(model, samples, processor, spec, torch.device("cpu"), **place, loss_sum=loss_sum)
    assert model.training and not model.model.vision_tower.training and model.lm_head.training
    model.eval()
    with torch.no_grad():
        whole = collate(samples[:12], processor, spec)
        tokens = int((whole["labels"][:, 1:] != -100).sum())
        expected = float(loss_sum(whole)) / tokens
    assert sum(count for _, count in said) == tokens
    assert sum(loss for loss, _ in said) / tokens == pytest.approx(expected, rel=1e-5)
