"""Files that the trainer extends while they are read, and the speed during a run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.plan.text import figure
from launcher.record.metrics import read_curve
from launcher.run.progress import Growing, ProgressView, Rate
from trainer.contract import IMAGES_FILE, SCHEMA, SERVING_FILE, ServingReport, StepRow, write

ROW = StepRow(step=1, steps=2, loss=1.5, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)
TEXT = "é漢🙂\n漢字"


@pytest.mark.parametrize("size", range(1, 12))
def test_text_is_whole_wherever_a_character_is_cut(tmp_path: Path, size: int) -> None:
    file, content, found = tmp_path / "stream.txt", TEXT.encode(), ""
    stream = Growing(file)
    for end in range(size, len(content) + size, size):
        file.write_bytes(content[:end])
        found += stream.text()
    assert found == TEXT


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_rows_are_whole_wherever_they_are_cut(tmp_path: Path, size: int) -> None:
    file, tail, found = tmp_path / "metrics.jsonl", Growing(tmp_path / "metrics.jsonl"), list[StepRow]()
    content = b"\n" + 2 * f"{json.dumps(asdict(ROW))}\n".encode()
    for end in range(size, len(content) + size, size):
        file.write_bytes(content[:end])
        found += tail.rows()
    assert found == [ROW, ROW]


def test_the_last_speed_of_a_short_run_is_that_of_its_record(tmp_path: Path) -> None:
    file, rate = tmp_path / "metrics.jsonl", Rate()
    rows = [replace(ROW, step=step, steps=20, seconds=9.0 if step < 3 else 0.1 * (1 + step % 3)) for step in range(1, 21)]
    file.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows), encoding="utf-8")
    *_, last = map(rate.describe, rows)
    speed = read_curve(file).speed
    assert speed is not None and last["samples_per_s"] == f"{figure(speed.samples_per_s)} samples/s" == "320 samples/s"
    assert last["tokens_per_s"] == f"{figure(speed.tokens_per_s)} tokens/s" and last["left"] == ""


def test_a_step_without_a_time_has_no_speed() -> None:
    values = Rate().describe(replace(ROW, seconds=0.0))
    assert (values["samples_per_s"], values["tokens_per_s"]) == ("", "") and values["loss"] == "1.500"


def test_how_images_are_put_into_questions_is_said_once(tmp_path: Path) -> None:
    sentence, said = "images are put before the question, followed by nothing, as in the training rows", list[str]()
    view = ProgressView(tmp_path, said.append, terminal=False)
    (tmp_path / IMAGES_FILE).write_text(sentence[:20], encoding="utf-8")
    view.tick()
    assert said == [], "still being written"
    (tmp_path / IMAGES_FILE).write_text(f"{sentence}\n", encoding="utf-8")
    view.tick()
    view.tick()
    assert said == [sentence]
    report = ServingReport(schema=SCHEMA, url="http://127.0.0.1:8000", model="m", token="", example="curl ...", images=sentence)
    write(report, tmp_path / SERVING_FILE)
    view.tick()
    view.tick()
    assert said[1:] == ["serving m at http://127.0.0.1:8000 (Ctrl-C stops it)", "  curl ...", f"  {sentence}"]
