"""The stage evaluate on tiny LLaVAs with random weights: the figures and files of any number of ranks, and of a run that broke off."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

import trainer.evaluation.evaluate
from tests.trainer.mortal import expect, run_ranks
from trainer.contract import RESULT_FILE, Evaluation, InputRefused, Metric, StageSpec, TrainSpec
from trainer.device.device import DEVICES
from trainer.device.rank import Rank
from trainer.evaluation.box_metric import BOX_METRICS
from trainer.evaluation.score_change import compare_rows
from trainer.models import find_family
from trainer.programs.evaluate import run_program

PLACE = Rank(number=0, local=0, world_size=1, device=DEVICES["cpu"], torch_device=torch.device("cpu"))
EVERY: tuple[Metric, ...] = tuple(name for name in get_args(Metric) if name not in BOX_METRICS)
SAMPLES = 22


@pytest.fixture
def assessing(tiny_spec: Callable[..., TrainSpec], tmp_path: Path) -> Callable[..., TrainSpec]:
    """A spec of stage evaluate on a saved random model; `seed` makes others."""

    def make(name: str, *, seed: int = 0, ranks: int = 1, **options: Any) -> TrainSpec:
        spec = tiny_spec(name, ranks=ranks)
        folder = tmp_path / f"model-{seed}"
        family = find_family(spec.model.family)
        if not folder.exists():
            torch.manual_seed(seed)
            family.create(spec.model).save_pretrained(folder)
            family.create_processor(spec.model).save(folder)
        evaluation = Evaluation(**{"batch": 4, "max_new_tokens": 3, "limit": SAMPLES, "metrics": EVERY, **options})
        stage = StageSpec(name="evaluate", kind="evaluate", trainable=(), checkpoint=str(folder))
        return replace(spec, stage=stage, evaluation=evaluation)

    return make


def rows_of(spec: TrainSpec, file: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(spec.output) / file).read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("process_group")
def test_totals_are_those_of_the_rows(assessing: Callable[..., TrainSpec]) -> None:
    spec = assessing("run")
    scores = run_program(spec, PLACE, {}).evaluation
    rows = rows_of(spec)
    assert [row["row"] for row in rows] == list(range(1, SAMPLES + 1)) and scores["count"] == SAMPLES
    assert set(scores) == {*EVERY, "count"} and set(rows[0]["scores"]) == {*EVERY} - {"exact_match"}
    for name in ("contains", "anls", "rouge_l"):
        assert scores[name] == sum(row["scores"][name] for row in rows) / SAMPLES
    assert 1 < min(row["scores"]["perplexity"] for row in rows) < scores["perplexity"] < max(row["scores"]["perplexity"] for row in rows)
    assert math.log(scores["perplexity"]) == pytest.approx(
        sum(math.log(row["scores"]["perplexity"]) for row in rows) / SAMPLES, rel=1e-9
    ), "answers of digits are equally many tokens"
    assert not list(Path(spec.output).glob(".samples*"))


@pytest.mark.usefixtures("process_group")
def test_exact_match_alone_writes_the_rows_that_it_always_did(assessing: Callable[..., TrainSpec]) -> None:
    spec = assessing("run", metrics=("exact_match",))
    assert set(run_program(spec, PLACE, {}).evaluation) == {"exact_match", "count"}
    assert set(rows_of(spec)[0]) == {"row", "prompt", "images", "expected", "got", "match"}


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_write_the_file_and_the_figures_of_one(assessing: Callable[..., TrainSpec]) -> None:
    """Bitwise identical, perplexity too, with a base; 22 samples are five batches and a half."""
    base = assessing("base", seed=1).stage.checkpoint
    one, two = assessing("one", base=base), assessing("two", base=base, ranks=2)
    results = []
    for spec in (one, two):
        expect(run_ranks(spec), *[0] * spec.device.world_size)
        results.append(json.loads((Path(spec.output) / RESULT_FILE).read_text())["evaluation"])
    assert results[0] == results[1] and results[0]["perplexity"] > 1
    for file in ("samples.jsonl", "samples_base.jsonl"):
        assert (Path(one.output) / file).read_bytes() == (Path(two.output) / file).read_bytes()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_that_broke_off_goes_on_to_the_same_files(
    stop: int, assessing: Callable[..., TrainSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the base's answers, at their end, and in its own; what was done is not done again."""
    base = assessing("base", seed=1).stage.checkpoint
    whole, broken = assessing("whole", base=base), assessing("broken", base=base)
    expected = run_program(whole, PLACE, {})
    real, calls = trainer.evaluation.evaluate.generate, [0]

    def generate(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > stop:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trainer.evaluation.evaluate.generate", generate)
        run_program(broken, PLACE, {})
    calls[0] = -100
    monkeypatch.setattr("trainer.evaluation.evaluate.generate", generate)
    found = run_program(broken, PLACE, {})
    assert calls[0] + 100 == 2 * 6 - stop
    assert found.evaluation == expected.evaluation
    for file in ("samples.jsonl", "samples_base.jsonl"):
        assert (Path(broken.output) / file).read_bytes() == (Path(whole.output) / file).read_bytes()


@pytest.mark.usefixtures("process_group")
def test_a_base_is_answered_too_and_the_differences_told(assessing: Callable[..., TrainSpec]) -> None:
    other = assessing("other", seed=1)
    alone = run_program(other, PLACE, {}).evaluation
    spec = assessing("run", base=other.stage.checkpoint, metrics=("perplexity", "anls"))
    scores = run_program(spec, PLACE, {}).evaluation
    rows, before = rows_of(spec), rows_of(other)
    assert scores["base_perplexity"] == alone["perplexity"] and scores["base_exact_match"] == alone["exact_match"]
    assert [row["base"]["got"] for row in rows] == [row["got"] for row in before]
    assert [row["base"]["change"] == "better" for row in rows] == [
        row["scores"]["perplexity"] < old["scores"]["perplexity"] for row, old in zip(rows, before, strict=True)
    ]
    assert scores["better"] + scores["worse"] + scores["same"] == SAMPLES
    assert scores["better"] == sum(row["base"]["change"] == "better" for row in rows)
    itself = assessing("itself", base=spec.stage.checkpoint)
    assert run_program(itself, PLACE, {}).evaluation["same"] == SAMPLES


@pytest.mark.usefixtures("process_group")
def test_a_base_that_is_none_is_refused_by_its_name(assessing: Callable[..., TrainSpec], tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"run\.evaluation\.base"):
        run_program(assessing("run", base=str(tmp_path / "nowhere")), PLACE, {})


def test_the_first_metric_says_what_is_better() -> None:
    now = [{"match": True, "scores": {"perplexity": 2.0}}, {"match": False, "scores": {"perplexity": 1.0}}]
    before = [{"match": False, "got": "x", "scores": {"perplexity": 1.0}}, {"match": False, "got": "y", "scores": {"perplexity": 3.0}}]
    assert [row["base"]["change"] for row in compare_rows(now, before, ("exact_match", "perplexity"))] == ["better", "same"]
    assert [row["base"]["change"] for row in compare_rows(now, before, ("perplexity",))] == ["worse", "better"]


@pytest.mark.usefixtures("process_group")
def test_any_of_the_accepted_answers_is_right(assessing: Callable[..., TrainSpec], tmp_path: Path, digits: Path) -> None:
    """DocVQA's way to list them, beside the one that would be learned."""
    spec = assessing("run", metrics=("exact_match", "anls"), limit=0)
    image = next((digits / "digits" / "images").glob("*.png"))
    talk = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "seven"}]
    first = [{"id": 1, "image": str(image), "conversations": talk}]
    file = tmp_path / "rows.json"
    data = replace(spec.data, name="files", builtin="", root="", evaluation=str(file), images=str(tmp_path), train=str(file))
    file.write_text(json.dumps(first))
    run_program(replace(spec, data=data), PLACE, {})
    (row,) = rows_of(spec)
    assert row["match"] is False and "accepted" not in row
    file.write_text(json.dumps([{**first[0], "answers": ["7", row["got"]]}]))
    other = replace(assessing("other", metrics=("exact_match", "anls"), limit=0), data=data)
    assert run_program(other, PLACE, {}).evaluation == {"exact_match": 1.0, "anls": 1.0, "count": 1.0}
    assert rows_of(other)[0]["accepted"] == ["7", row["got"]]


@pytest.mark.usefixtures("process_group")
def test_boxes_are_scored_and_shown(assessing: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with objects of ms-swift, and one without boxes; the model's answers are given instead of generated."""
    given = iter(["[(50,100),(250,300)]", "[(60,110),(260,310)]", "no box", "[(900,900),(950,950)] [(50,100),(250,300)]"])
    monkeypatch.setattr("trainer.evaluation.evaluate.read_answer", lambda *_: next(given))
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    ask = {"role": "user", "content": "<image>Find the <ref-object>."}
    grounded = {
        "messages": [ask, {"role": "assistant", "content": "<bbox>"}],
        "images": ["a.png"],
        "objects": {"ref": ["dog"], "bbox": [[10, 10, 50, 30]]},
    }
    plain = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "no box"}], "images": ["a.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([grounded, grounded, plain, grounded]))
    spec = assessing("run", metrics=("iou_50", "point_in_box"), max_new_tokens=1)
    spec = replace(spec, data=replace(spec.data, builtin="", evaluation=str(tmp_path / "rows.json"), images=str(tmp_path)))
    scores = run_program(spec, PLACE, {}).evaluation
    assert scores == {
        "exact_match": 0.5, "count": 4.0, "iou_50": pytest.approx(2.5 / 3), "iou_50_count": 3.0, "point_in_box": pytest.approx(2 / 3), "point_in_box_count": 3.0,
    }  # fmt: skip
    rows = rows_of(spec)
    assert (rows[0]["prompt"], rows[0]["expected"]) == ("<image>Find the dog.", "[(50,100),(250,300)]")
    assert rows[1]["boxes"] == {"expected": [[0.05, 0.1, 0.25, 0.3]], "got": [[0.06, 0.11, 0.26, 0.31]]}
    assert "scores" not in rows[2] and rows[2]["boxes"] == {"expected": [], "got": []}
    compared = compare_rows(rows, [{**row, "scores": {"iou_50": 0.0}} for row in rows], ("iou_50",))
    assert [row["base"]["change"] for row in compared] == ["better", "better", "same", "better"]
