"""Real runs on two ranks with rows that are left out and cut: bitwise as on files without these rows, after a resume too."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.mortal import result_of
from tests.trainer.programs.test_train import rows_of, untimed
from trainer.contract import DATA_LEFT_OUT_FILE, DATA_PENDING_FILE, SPEC_FILE, Exit, TrainSpec, write
from trainer.contract.rows import StepRow

ROWS = 30
BAD = (2, 7, 13)
LONG = 4


def write_rows(folder: Path) -> dict[str, Path]:
    """`all`: with three bad rows and one long one. `clean`: without the bad ones. `short`: without the long one too."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        Image.new("RGB", (32, 32), (8 * number, 99, 255 - 8 * number)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich is it?"}, {"from": "gpt", "value": f"number {number}"}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    rows[LONG]["conversations"][1]["value"] += " and so on" * 60
    chosen = {"clean": [row for number, row in enumerate(rows) if number not in BAD]}
    chosen["short"] = [row for number, row in enumerate(rows) if number not in (*BAD, LONG)]
    chosen["all"] = json.loads(json.dumps(rows))
    chosen["all"][2]["image"], chosen["all"][7]["conversations"][1]["value"] = "absent.png", ""
    chosen["all"][13]["conversations"].append({"from": "human", "value": "And?"})
    for name, kept in chosen.items():
        (folder / f"{name}.json").write_text(json.dumps(kept))
    return {name: folder / f"{name}.json" for name in chosen}


def with_rows(spec: TrainSpec, file: Path, **options: Any) -> TrainSpec:
    data = replace(spec.data, name="files", builtin="", train=str(file), evaluation=str(file), images=str(file.parent), **options)
    return replace(spec, data=data, deterministic=True)


def check(spec: TrainSpec) -> int:
    """`python -m trainer data`, as the launcher starts it beside the ranks."""
    path = Path(spec.output) / SPEC_FILE
    write(spec, path)
    return subprocess.run(
        [sys.executable, "-m", "trainer", "data", str(path)], check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ).returncode


def run(spec: TrainSpec, torchrun: Any) -> list[StepRow]:
    assert check(spec) == Exit.OK
    ended = torchrun(spec)
    assert ended.code == 0, ended.text
    return untimed(rows_of(spec))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_without_bad_rows(zero: int, tmp_path: Path, tiny_spec: Any, torchrun: Any) -> None:
    files, layout = write_rows(tmp_path / "rows"), {"ranks": 2, "micro": 2, "zero": zero}
    skipped = with_rows(tiny_spec("skipped", **layout), files["all"], bad_rows="skip", too_long="skip")
    clean = with_rows(tiny_spec("clean", **layout), files["short"])
    seen = [run(spec, torchrun) for spec in (skipped, clean)]
    assert seen[0] == seen[1] and len(seen[0]) == 4
    first, second = map(result_of, (skipped, clean))
    assert first.weights_sha256 == second.weights_sha256 and first.evaluation == second.evaluation
    listed = [json.loads(line) for line in (Path(skipped.output) / DATA_LEFT_OUT_FILE).read_text().splitlines()]
    assert sorted({row["row"] - 1 for row in listed}) == sorted((*BAD, LONG)) and {row["use"] for row in listed} == {"train", "evaluation"}
    assert not (Path(clean.output) / DATA_LEFT_OUT_FILE).exists()


@pytest.mark.slow
def test_a_run_with_a_cut_row_and_its_resume(tmp_path: Path, tiny_spec: Any, torchrun: Any) -> None:
    files, layout = write_rows(tmp_path / "rows"), {"ranks": 2, "micro": 2, "changes": {"save_every": 2, "steps": 8}}
    cut = with_rows(tiny_spec("cut", **layout), files["all"], bad_rows="skip", too_long="cut")
    clean = with_rows(tiny_spec("clean", **layout), files["clean"], too_long="cut")
    seen = [run(spec, torchrun) for spec in (cut, clean)]
    assert seen[0] == seen[1] and len(seen[0]) == 8, "more than one epoch of 27 rows"
    folder, weights = Path(cut.output), result_of(cut).weights_sha256
    shutil.rmtree(folder / "checkpoints/step-000008")
    (folder / "train_result.json").unlink()
    again = run(cut, torchrun)
    assert again == seen[0] and result_of(cut).weights_sha256 == weights


@pytest.mark.slow
def test_ranks_without_the_check_are_refused(tmp_path: Path, tiny_spec: Any, torchrun: Any) -> None:
    files = write_rows(tmp_path / "rows")
    spec = with_rows(tiny_spec("alone", micro=4), files["all"], bad_rows="skip", too_long="skip")
    ended = torchrun(spec)
    assert ended.code != 0 and "check the data first: python -m trainer data" in ended.text
    assert not (Path(spec.output) / DATA_PENDING_FILE).exists()
