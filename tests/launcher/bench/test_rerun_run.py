"""Whole reruns through the real command: bitwise identical in another folder from another clone, and refused by name where anything differs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from launcher.record.recorded_run import load_recorded_run
from tests.launcher.planted import clone_tree, omnilaunch, reseal, result_of, rows_of

SHORT = (
    "run.steps=3",
    "stage.optimizer.warmup=1",
    "run.evaluation.limit=8",
    "stage.global_batch=8",
    "run.trackers=[]",
    "run.deterministic=true",
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, with its changes, in one commit."""
    return clone_tree(tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture(scope="module")
def first(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a short run on local files, which starts from the weights of another run."""
    here = tmp_path_factory.mktemp("first")
    made = omnilaunch(clone, here, "launch", *SHORT, "run.evaluation.enabled=false", "--run-id", "base")
    assert made.returncode == 0, made.stdout + made.stderr
    shutil.copytree(here / ".cache/data/digits", here / "mine")
    mine = (f"data.train={here}/mine/train.json", f"data.evaluation={here}/mine/evaluation.json", f"data.images={here}/mine")
    done = omnilaunch(clone, here, "launch", *SHORT, "data=files", *mine, "stage.checkpoint=base", "--run-id", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    return here / "runs/first"


def test_the_record_holds_what_a_rerun_needs(first: Path) -> None:
    recorded = load_recorded_run(first)
    assert recorded.inputs is not None and len(recorded.inputs.data) == 1799 and "checkpoint/model.safetensors" in recorded.inputs.weights
    environment = recorded.environment
    assert environment is not None and environment.determinism["deterministic_algorithms"] == "True"
    assert environment.toolkit["torch"] == environment.packages["torch"] and environment.ranks[0].threads == environment.threads == 2
    assert recorded.record.config_sha256 and recorded.record.lock_sha256 and recorded.record.inputs_sha256 and "torch==" in recorded.lock


@pytest.fixture(scope="module")
def second(clone: Path, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rerun of that record in another folder, from a copy of it, on a tree that has changed."""
    tmp_path = tmp_path_factory.mktemp("second")
    moved = tmp_path / "moved"
    subprocess.run(("git", "clone", "-q", str(clone), str(moved)), check=True)
    (moved / "trainer/kernels/cross_entropy.py").write_text("raise SystemExit('a tree that moved on')\n")
    shutil.copytree(first, tmp_path / "record", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    done = omnilaunch(moved, tmp_path / "b", "rerun", str(tmp_path / "record"), "cluster.root=.", "--run-id", "second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "code: this tree differs in trainer/kernels/cross_entropy.py; commit " in done.stdout and "weights bitwise identical" in done.stdout
    )
    return tmp_path / "b/runs/second"


def test_a_rerun_from_the_record_is_bitwise_identical(first: Path, second: Path) -> None:
    assert rows_of(second) == rows_of(first) and len(rows_of(first)) == 3
    assert result_of(second)["weights_sha256"] == result_of(first)["weights_sha256"] and result_of(second)["rerun_of"] == "first"


@pytest.mark.slow
def test_a_rerun_can_be_run_again(clone: Path, second: Path) -> None:
    again = omnilaunch(clone, second.parents[1], "rerun", "second", "--run-id", "third")
    assert again.returncode == 0 and result_of(second.parent / "third")["rerun_of"] == "second"


@pytest.mark.slow
def test_one_changed_pixel_is_refused_by_its_file(clone: Path, first: Path, tmp_path: Path) -> None:
    path = first.parents[1] / "mine/images/0007.png"
    kept = path.read_bytes()
    with Image.open(path) as image:
        image.putpixel((3, 3), image.getpixel((3, 3)) ^ 1)  # type: ignore[operator]
        image.save(path)
    try:
        done = omnilaunch(clone, tmp_path / "b", "rerun", str(first), "cluster.root=.", "--run-id", "second")
    finally:
        path.write_bytes(kept)
    assert (
        done.returncode == 2
        and "the inputs differ from those of run first" in done.stderr
        and "data images/0007.png: another file" in done.stderr
    )
    assert result_of(tmp_path / "b/runs/second")["status"] == "refused"


@pytest.mark.slow
def test_a_swapped_checkpoint_is_refused_by_its_file(clone: Path, first: Path, tmp_path: Path) -> None:
    checkpoints = first.parents[1] / "runs/base/checkpoints/step-000003"
    other = first / "checkpoints/step-000003/model.safetensors"
    kept = (checkpoints / "model.safetensors").read_bytes()
    shutil.copyfile(other, checkpoints / "model.safetensors")
    try:
        done = omnilaunch(clone, tmp_path / "b", "rerun", str(first), "cluster.root=.", "--run-id", "second")
    finally:
        (checkpoints / "model.safetensors").write_bytes(kept)
    assert done.returncode == 2 and "weights checkpoint/model.safetensors: another file" in done.stderr


@pytest.mark.slow
def test_another_environment_is_refused_with_its_differences(clone: Path, first: Path, tmp_path: Path) -> None:
    """A variable of the shell, of which few reach a process, and packages as if the record had been made with others: each is named, all at
    once."""
    record = tmp_path / "record"
    shutil.copytree(first, record, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    environment = json.loads((record / "environment.json").read_text())
    environment["packages"]["peft"] = "0.0.1"
    environment["threads"] = 7
    environment["driver"] = "535.1"
    (record / "environment.json").write_text(json.dumps(environment))
    reseal(record)
    planted = {"LD_LIBRARY_PATH": str(tmp_path / "other"), "MKL_CBWR": "COMPATIBLE"}
    done = omnilaunch(clone, tmp_path / "b", "rerun", str(record), "cluster.root=.", "--run-id", "second", environment=planted)
    assert done.returncode == 2
    assert "MKL_CBWR" not in done.stderr
    for line in (
        "package peft: '0.0.1' in the record",
        "threads: '7' in the record, '2' here",
        "variable LD_LIBRARY_PATH: not there in the record, '/",
        "driver: '535.1' in the record, not there here",
        "--accept driver,threads,package,variable",
    ):
        assert line in done.stderr
    kinds = ("--accept", "driver,threads", "--accept", "package,variable", "--run-id", "third")
    taken = omnilaunch(clone, tmp_path / "b", "rerun", str(record), "cluster.root=.", *kinds, environment=planted)
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert result_of(tmp_path / "b/runs/third")["accepted"] == ["driver", "threads", "package", "variable"]


def test_an_edited_record_is_refused_before_anything_starts(clone: Path, first: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "record", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    plan = tmp_path / "record/plan.json"
    plan.write_text(plan.read_text().replace('"seed": 1', '"seed": 2'))
    done = omnilaunch(clone, tmp_path / "b", "rerun", str(tmp_path / "record"))
    assert done.returncode == 2 and "plan.json was edited" in done.stderr and not (tmp_path / "b/runs").exists()


def test_a_tree_whose_commit_is_not_available_is_refused(clone: Path, first: Path, tmp_path: Path) -> None:
    """Another lock in a tree without history is reported, and used only if it is accepted."""
    moved = tmp_path / "moved"
    shutil.copytree(clone, moved, ignore=shutil.ignore_patterns(".git"))
    with (moved / "images/locks/cpu-x86_64.txt").open("a") as lock:
        lock.write("# another lock\n")
    done = omnilaunch(moved, tmp_path / "b", "rerun", str(first), "cluster.root=.")
    assert done.returncode == 2 and "code: this tree differs in lock.txt" in done.stderr and "--accept code" in done.stderr
