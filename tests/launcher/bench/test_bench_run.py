"""A tiny cell is measured and published by the real command, and run again from its line on a tree that has changed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.bench.result import read_results
from tests.launcher.bench.test_rerun_run import omnilaunch, result_of

PROJECT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.long
CELL = """# @package _global_
defaults:
  - override /strategy: single
  - _self_
hardware: {threads: 1}
stage: {global_batch: 4, optimizer: {warmup: 2}}
strategy: {micro_batch: 4}
run:
  steps: 20
  trackers: []
  evaluation: {limit: 8}
  repeats: 2
  bands: {loss: 0.01, throughput: 0.9, memory: 0.5, evaluation: 0.1}
"""


def git(project: Path, *words: str) -> None:
    subprocess.run(("git", "-c", "user.name=A", "-c", "user.email=a@b", *words), cwd=project, check=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with one commit, in which two repeats are enough."""
    project = tmp_path_factory.mktemp("clone") / "project"
    for name in ("images", "trainer", "launcher", "conf"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "conf/experiment/tiny.yaml").write_text(CELL)
    cell = project / "launcher/bench/cell.py"
    assert "LEAST_REPEATS = 5 " in cell.read_text()
    cell.write_text(cell.read_text().replace("LEAST_REPEATS = 5 ", "LEAST_REPEATS = 2 "))
    (project / ".gitignore").write_text("__pycache__/\n")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    return project


@pytest.fixture(scope="module")
def here(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bench. A series in it without a finished repeat is ignored."""
    here = tmp_path_factory.mktemp("here")
    (here / "runs/tiny-20261121-000000-0000-1").mkdir(parents=True)
    done = omnilaunch(clone, here, "bench", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "repeat 2 of 2" in done.stdout and f"published in {clone}/docs/results/tiny.jsonl" in done.stdout
    return here


def test_a_published_line_of_two_ordinary_runs(clone: Path, here: Path) -> None:
    (result,) = read_results(clone / "docs/results/tiny.jsonl")
    assert len(result.repeats) == 2 and result.rows_equal and result.weights_equal and (result.steps, result.warm_up_steps) == (20, 2)
    runs = [here / "runs" / repeat.run_id for repeat in result.repeats]
    assert [run.name for run in runs] == ["tiny-20261121-000000-0000-2", "tiny-20261121-000000-0000-3"]
    assert [result_of(run)["weights_sha256"] for run in runs] == [repeat.weights_sha256 for repeat in result.repeats]
    assert json.loads((runs[0] / "seal.json").read_text())["sha256"] == result.repeats[0].record_sha256
    assert json.loads((runs[0] / "tags.json").read_text())["tags"] == ["tiny"]
    assert result.code.commit == subprocess.run(("git", "rev-parse", "HEAD"), cwd=clone, capture_output=True, text=True).stdout.strip()
    assert result.facts["threads"] == "1" and str(here) not in (clone / "docs/results/tiny.jsonl").read_text()


def test_a_published_result_is_run_again_with_the_published_code(clone: Path, here: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    subprocess.run(("git", "clone", "-q", str(clone), str(moved)), check=True)
    (moved / "trainer/kernels/cross_entropy.py").write_text("raise SystemExit('a tree that moved on')\n")
    (moved / "conf/experiment/tiny.yaml").unlink()
    git(moved, "commit", "-q", "-a", "-m", "second")
    shutil.copytree(clone / "docs", moved / "docs")
    refused = omnilaunch(moved, tmp_path / "b", "bench-rerun", "tiny", "--repeats", "1")
    assert refused.returncode == 2 and "say why: --reason" in refused.stderr
    done = omnilaunch(moved, tmp_path / "b", "bench-rerun", "tiny", "--repeats", "1", "--reason", "a test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code: this tree differs in trainer/kernels/cross_entropy.py; commit " in done.stdout
    assert "rows identical in 1 of 1 repeats, final weights in 1 of 1" in done.stdout
    assert "verdict: reproduced, from 1 repeats in place of 2: a test" in done.stdout
    (run,) = [path for path in (tmp_path / "b/runs").iterdir() if path.is_dir()]
    assert result_of(run)["rerun_of"] == "tiny-20261121-000000-0000-2"


def test_what_stops_a_bench_before_anything_runs(clone: Path, tmp_path: Path) -> None:
    done = omnilaunch(clone, tmp_path, "bench", "p4_qwen2_5_vl_3b_lora", "cluster.delivery.accept_licence=true")
    assert done.returncode == 2 and "this machine has no NVIDIA device" in done.stderr, "hardware that is not there"
    assert not [path for path in (tmp_path / "runs").glob("*") if path.is_dir()]
    results = tmp_path / "results"
    results.mkdir()
    (results / "tiny.jsonl").write_text('{"schema": 1')
    done = omnilaunch(clone, tmp_path, "bench", "tiny", "--results", str(results))
    assert done.returncode == 2 and "tiny.jsonl, line 1 was cut short" in done.stderr
    assert (results / "tiny.jsonl").read_text() == '{"schema": 1'
    (clone / "trainer/new.py").write_text("")
    try:
        done = omnilaunch(clone, tmp_path, "bench", "tiny")
    finally:
        (clone / "trainer/new.py").unlink()
    assert done.returncode == 2 and "the tree has uncommitted changes: trainer/new.py" in done.stderr and "--dirty REASON" in done.stderr
