"""The stage infer on a tiny LLaVA with random weights: which answers they are is not the point, but that they are the same."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import trainer.programs.infer
from tests.trainer.mortal import expect, run_ranks
from trainer.contract import STREAM_FILE, Inference, InputRefused, RunFailed, Sampling, StageSpec, TrainSpec
from trainer.data.media.image import open_image
from trainer.data.rows.sample import Message
from trainer.device.device import DEVICES
from trainer.device.rank import Rank
from trainer.generation.answerer import Answerer, Question
from trainer.models import find_family
from trainer.programs.infer import AnswerStream, run_program

PLACE = Rank(number=0, local=0, world_size=1, device=DEVICES["cpu"], torch_device=torch.device("cpu"))
ROWS = 37


@pytest.fixture
def rows(tmp_path: Path, digits: Path) -> Path:
    """Questions of several lengths with an image, two or none."""
    images = [str(path) for path in sorted((digits / "digits" / "images").glob("*.png"))[:6]]
    file = tmp_path / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for row in range(ROWS):
            shown = images[row % 6 : row % 6 + row % 3]
            lines.write(json.dumps({"prompt": "Which digit is this? " * (1 + row * 7 % 4), "images": shown, "id": f"q{row}"}) + "\n")
    return file


@pytest.fixture
def asking(tiny_spec: Callable[..., TrainSpec], tmp_path: Path) -> Callable[..., TrainSpec]:
    """A spec of stage infer on a saved random model."""
    folder = tmp_path / "model"

    def make(name: str, **options: Any) -> TrainSpec:
        ranks = options.pop("ranks", 1)
        spec = tiny_spec(name, ranks=ranks)
        family = find_family(spec.model.family)
        if not folder.exists():
            torch.manual_seed(0)
            family.create(spec.model).save_pretrained(folder)
            family.create_processor(spec.model).save(folder)
        asked = Inference(**{"batch": 4, "sampling": Sampling(max_new_tokens=6, temperature=0.8, top_p=0.9), **options})
        stage = StageSpec(name="infer", kind="infer", trainable=(), checkpoint=str(folder), inference=asked)
        return replace(spec, stage=stage)

    return make


def answers_of(spec: TrainSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(spec.output) / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("process_group")
def test_answers_are_in_the_order_of_the_rows_and_those_of_each_row_alone(asking: Callable[..., TrainSpec], rows: Path) -> None:
    spec = asking("run", input=str(rows))
    result = run_program(spec, PLACE, {})
    found = answers_of(spec)
    assert [row["row"] for row in found] == list(range(1, ROWS + 1)) and [row["id"] for row in found] == [f"q{n}" for n in range(ROWS)]
    assert result.evaluation == {"count": ROWS, "new_tokens": sum(row["tokens"] for row in found)} and result.status == "finished"
    assert not list(Path(spec.output).glob(".answers*")), "the journal is gone"
    family = find_family(spec.model.family)
    model = family.load(Path(spec.stage.checkpoint), spec.model, torch.float32).eval()
    answerer = Answerer(model, family.create_processor(spec.model), spec, torch.device("cpu"))
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    for number in (1, 2, 3, 11):
        row = asked[number - 1]
        text = "<image>" * len(row["images"]) + ("\n" if row["images"] else "") + row["prompt"]
        images = tuple(open_image(Path(path)) for path in row["images"])
        question = Question(
            messages=(Message(role="user", content=text),), images=images, sampling=spec.stage.inference.sampling, seed=number
        )  # type: ignore[union-attr]
        alone = answerer.answer([answerer.prepare(question)])[0]
        assert found[number - 1] == {
            **{"row": number, "id": f"q{number - 1}", "answer": alone.text, "prompt_tokens": alone.prompt_tokens},
            **{"tokens": alone.new_tokens, "ended": alone.ended},
        }


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_run_that_broke_off_goes_on_to_the_same_file(
    stop: int, asking: Callable[..., TrainSpec], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two batches, with the next line half written; no batch is answered twice."""
    whole, broken = asking("whole", input=str(rows)), asking("broken", input=str(rows))
    run_program(whole, PLACE, {})
    answered: list[int] = []
    real = trainer.programs.infer.answer_batch

    def answer(answerer: Answerer, ready: Any, say: Any) -> Any:
        if len(answered) == stop:
            raise KeyboardInterrupt
        answered.append(ready[0][0].row)
        return real(answerer, ready, say)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trainer.programs.infer.answer_batch", answer)
        run_program(broken, PLACE, {})
    assert not (Path(broken.output) / "answers.jsonl").exists()
    with (Path(broken.output) / ".answers.jsonl.rank0").open("ab") as journal:
        journal.write(b'[9, [{"row": 3, "ans')
    more: list[int] = []
    monkeypatch.setattr("trainer.programs.infer.answer_batch", lambda *given: more.append(given[1][0][0].row) or real(*given))
    run_program(broken, PLACE, {})
    assert (Path(broken.output) / "answers.jsonl").read_bytes() == (Path(whole.output) / "answers.jsonl").read_bytes()
    assert len(more) == -(-ROWS // 4) - stop and not set(more) & set(answered)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_write_the_file_of_one(asking: Callable[..., TrainSpec], rows: Path) -> None:
    one, two = asking("one", input=str(rows)), asking("two", input=str(rows), ranks=2)
    for spec in (one, two):
        expect(run_ranks(spec), *[0] * spec.device.world_size)
    assert (Path(one.output) / "answers.jsonl").read_bytes() == (Path(two.output) / "answers.jsonl").read_bytes()


@pytest.mark.usefixtures("process_group")
def test_rows_that_cannot_be_answered_are_told_and_the_others_done(asking: Callable[..., TrainSpec], tmp_path: Path, rows: Path) -> None:
    """Unreadable, missing and too long; after they are fixed the same run answers only their batches."""
    (tmp_path / "cut.png").write_bytes((tmp_path / "rows.jsonl").read_bytes()[:50])
    with rows.open("a", encoding="utf-8") as lines:
        for row in ({"image": "cut.png"}, {"image": "none.png"}, {"prompt": "long " * 200}):
            lines.write(json.dumps({"prompt": "Which?", **row}) + "\n")
    spec = asking("run", input=str(rows))
    with pytest.raises(RunFailed) as failed:
        run_program(spec, PLACE, {})
    said = str(failed.value)
    assert said.startswith(f"3 of 40 rows of {rows} could not be answered")
    assert "row 38: " in said and "is JSON, not an image" in said
    assert f"row 39: {tmp_path / 'none.png'}: cannot be read: No such file" in said
    assert said.count("row 40: ") == 1 and "no space for an answer in the model's context of 128" in said
    found = answers_of(spec)
    assert [row["row"] for row in found if "error" in row] == [38, 39, 40] and sum("answer" in row for row in found) == 37
    Image.new("RGB", (32, 32)).save(tmp_path / "cut.png")
    with pytest.raises(RunFailed, match="2 of 40 rows"):
        run_program(spec, PLACE, {})
    again = answers_of(spec)
    assert again[:37] == found[:37] and "answer" in again[37]


@pytest.mark.usefixtures("process_group")
def test_one_question_is_answered_word_by_word(
    asking: Callable[..., TrainSpec], digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((digits / "digits" / "images").glob("*.png"))
    spec = asking("run", prompt="Which digit is this?", image=str(image))
    parts: list[str] = []
    said = AnswerStream.__call__
    monkeypatch.setattr(AnswerStream, "__call__", lambda teller, row, text: (parts.append(text), said(teller, row, text)))
    run_program(spec, PLACE, {})
    (row,) = answers_of(spec)
    assert "".join(parts) == row["answer"] and len(parts) > 1
    assert (Path(spec.output) / STREAM_FILE).read_text(encoding="utf-8") == row["answer"], "where the launcher has it from"
    silent = asking("silent", prompt="Which digit is this?", image=str(image), stream=False)
    capsys.readouterr()
    run_program(silent, PLACE, {})
    assert row["answer"] in capsys.readouterr().out and answers_of(silent) == [row]
    with pytest.raises(InputRefused, match=r"none\.png: cannot be read"):
        run_program(asking("none", prompt="Which?", image=str(image.with_name("none.png"))), PLACE, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "neither is set"),
        ({"prompt": "?", "input": "rows.jsonl"}, "both are set"),
        ({"prompt": "?", "sampling": Sampling(top_p=2.0)}, r"stage\.inference\.sampling\.top_p is 2\.0"),
        ({"prompt": "?", "batch": 0}, "stage.inference.batch is 0"),
        ({"prompt": "<image><image>", "image": "a.png"}, "2 <image> marks for 1 images"),
        ({"input": "/nowhere/rows.jsonl"}, "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(options: Any, said: str, asking: Callable[..., TrainSpec]) -> None:
    with pytest.raises(InputRefused, match=said):
        run_program(asking("run", **options), PLACE, {})


@pytest.mark.usefixtures("process_group")
def test_an_image_that_is_shown_again_is_made_ready_once(
    asking: Callable[..., TrainSpec], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identified by its bytes, whatever its name; without a cache it is read each time."""
    looks: list[int] = []
    real = Answerer.image_features
    monkeypatch.setattr(Answerer, "image_features", lambda self, image: looks.append(1) or real(self, image))
    run_program(asking("kept", input=str(rows)), PLACE, {})
    kept = len(looks)
    run_program(asking("uncached", input=str(rows), cache_images=0, prefetch=0), PLACE, {})
    shown = sum(len(json.loads(line)["images"]) for line in rows.read_text().splitlines())
    assert kept <= 6 and len(looks) - kept == shown > 20


def test_a_question_is_bounded_by_the_context_that_was_planned(asking: Callable[..., TrainSpec], rows: Path) -> None:
    """stage.inference.context is what the plan's memory is for: data.max_length no longer matters, and an answer ends where it does."""
    spec = asking("run", input=str(rows), context=100)
    spec = replace(spec, data=replace(spec.data, max_length=40))
    family = find_family(spec.model.family)
    model = family.load(Path(spec.stage.checkpoint), spec.model, torch.float32).eval()
    answerer = Answerer(model, family.create_processor(spec.model), spec, torch.device("cpu"))
    ask = partial(Question, sampling=replace(spec.stage.inference.sampling, max_new_tokens=512))

    def prepare(letters: int) -> Any:
        return answerer.prepare(ask(messages=(Message(role="user", content="a" * letters),)))

    empty = prepare(0).length
    assert (prepare(90 - empty).length, prepare(90 - empty).most) == (90, 10)
    with pytest.raises(InputRefused, match=r"leave no space for an answer in stage\.inference\.context=100") as refused:
        prepare(100 - empty)
    wider = int(re.search(r"set stage\.inference\.context=(\d+)", str(refused.value))[1])
    assert 100 < wider <= answerer.context
