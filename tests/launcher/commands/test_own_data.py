"""Own data, from the row that a document shows to a trained checkpoint: checked, launched with run.epochs, and run again on two ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import PROJECT
from tests.launcher.planted import omnilaunch

Row = dict[str, Any]
COLOURS = ("red", "green", "blue", "yellow")
SHORT = ("run.trackers=[]", "stage.global_batch=4")


def turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def vicuna(question: str, answer: str) -> list[Row]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def a(image: str, colour: str) -> Row:
    """OmniLMM's own tuning data; the document of the NPUs trains the 12B."""
    return {"image": image, "conversations": vicuna("<image>\nWhat colour is it?", f"It is {colour}.</s>")}


def b(image: str, colour: str) -> Row:
    return {"messages": turns("<image>\nWhat colour is it?", f"{colour}<|im_end|>"), "image": [image]}


def c(image: str, colour: str) -> Row:
    """MiniCPM's own tuning data: one image has no mark."""
    return {"id": image, "image": image, "conversations": turns("What colour is it?", colour)}


def d(image: str, colour: str) -> Row:
    return {"id": 0, "image": image, "conversations": turns("<image>\nWhat colour is it?", f"It is {colour}.")}


def e(image: str, colour: str) -> Row:
    return {"image": image, "conversations": vicuna("What colour is it?", colour)}


def own(image: str, colour: str) -> Row:
    """Two images or none, with the words of LLaMA-Factory."""
    return {"instruction": "<image> and <image>: which colours?", "input": "", "output": f"{colour} both", "images": [image, image]}


# job -> its row, the fitting tiny model, rows, how often a row is adjusted
JOBS: dict[str, tuple[Any, str, int, int]] = {
    "A, OmniLMM-12B on NPUs": (a, "tiny_omnilmm_12b", 8, 1),
    "B, Qwen2.5-VL": (b, "tiny_qwen2_5_vl", 12, 1),
    "C, MiniCPM-o on two RTX 3090": (c, "tiny_minicpm_o_2_6", 6, 1),
    "D, OmniLMM-3B on a P4": (d, "tiny_omnilmm_3b", 5, 0),
    "E, the guide of MindSpeed-MM": (e, "tiny_internvl", 20, 1),
    "own data": (own, "tiny_llava", 10, 0),
}


def write_set(folder: Path, row: Any, count: int, *, lines: bool = False) -> Path:
    """`count` rows with an image each, in rows.json and pictures/ beside it."""
    image = pytest.importorskip("PIL.Image", reason="the trainer's packages are not installed in this environment")
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        image.new("RGB", (24 + number, 32), colour).save(folder / "pictures" / f"{number}.png")
        rows.append(row(f"pictures/{number}.png", colour))
    text = "".join(f"{json.dumps(each)}\n" for each in rows) if lines else json.dumps(rows, indent=1)
    (folder / "rows.json").write_text(text, encoding="utf-8")
    return folder / "rows.json"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_rows_of_a_job_are_checked_and_trained_on(tmp_path: Path, job: str) -> None:
    row, model, count, adjusted = JOBS[job]
    write_set(tmp_path / "set", row, count)
    words = ("data=files", "data.train=set/rows.json", f"model={model}")
    checked = omnilaunch(PROJECT, tmp_path, "data", "check", *words)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"rows       {count} to train on" in checked.stdout and "problems   none" in checked.stdout
    done = omnilaunch(PROJECT, tmp_path, "launch", *words, *SHORT, "run.steps=3", "--run-id", "job")
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "runs/job")
    assert len(found) == 3 and all(map(math.isfinite, found))
    data = json.loads((tmp_path / "runs/job/data.json").read_text(encoding="utf-8"))
    assert list(data["summary"]["adjustments"].values()) == [count] * adjusted and data["train_rows"] == count


def test_epochs_of_own_data_and_the_same_run_on_two_ranks(tmp_path: Path) -> None:
    """JSON Lines in the form of document E: 10 rows in batches of 4 are 3 steps, and so they stay on two ranks."""
    write_set(tmp_path / "set", e, 10, lines=True)
    words = ("data=files", "data.train=set/rows.json", "run.epochs=1", *SHORT)
    refused = omnilaunch(PROJECT, tmp_path, "launch", *words[:3])
    assert refused.returncode == 2 and "data.train has 10 rows: a step would train on the same row twice" in refused.stderr
    done = omnilaunch(PROJECT, tmp_path, "launch", *words, "--run-id", "one")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 steps (run.epochs=1, rounded up) = 12 samples = 1.2 epochs of 10 rows" in " ".join(done.stdout.split())
    spec = json.loads((tmp_path / "runs/one/spec.json").read_text(encoding="utf-8"))
    assert (spec["steps"], spec["data"]["rows"]) == (3, 10)
    (tmp_path / "set/rows.json").rename(tmp_path / "set/kept.json")
    gone = omnilaunch(PROJECT, tmp_path, "launch", *words)
    assert gone.returncode == 2 and "there is no file set/rows.json; valid are: kept.json" in gone.stderr
    (tmp_path / "set/kept.json").rename(tmp_path / "set/rows.json")
    again = omnilaunch(PROJECT, tmp_path, "rerun", "one", "cluster.devices_per_node=2", "--accept", "code", "--run-id", "two")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "batch: micro-batch 4 -> 2, ranks 1 -> 2; stage.global_batch stays 4" in again.stdout
    assert losses(tmp_path / "runs/two") == pytest.approx(losses(tmp_path / "runs/one"), rel=1e-4)
