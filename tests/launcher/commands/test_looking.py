"""Looking at plans, nodes and runs writes nothing into the tree that a record or a benchmark would call a change."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.commands.bench import refuse_dirty
from launcher.record.source import read_source
from tests.launcher.planted import copy_run, set_value

PROJECT = Path(__file__).resolve().parents[3]
USED = ("conf/config.yaml", "conf/hardware/cpu.yaml", "conf/model/tiny_llava.yaml", "conf/stage/full.yaml", "conf/cluster/local.yaml")
LOOKING = (
    *(("--help",), ("version",), ("plan",), ("plan", "--full", "hardware=p4"), ("options",), ("doctor",), ("bench",), ("runs",)),
    *(
        ("status", "monday"),
        ("logs", "monday"),
        ("compare", "monday", "tuesday"),
        ("report", "monday", "tuesday"),
        ("report", "monday", "--csv"),
    ),
    *(("fit-report",), ("runs", "tag", "monday", "kept"), ("render", "cluster=example", "--to", "scripts"), ("completion", "bash")),
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this tree with one commit, and two runs in it."""
    project = tmp_path / "project"
    for name in ("images", "trainer", "launcher", "conf", "docs"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(PROJECT / name, project / name)
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run(("git", "-c", "user.name=Ann", "-c", "user.email=ann@example.org", *words), cwd=project, check=True)
    for run_id in ("monday", "tuesday"):
        copy_run(project / "runs", run_id, set_value("result.json", "run_id", run_id))
    return project


@pytest.mark.slow
def test_looking_at_everything_leaves_the_tree_clean(clone: Path) -> None:
    before = read_source(clone, USED)
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    for words in LOOKING:
        done = subprocess.run(
            (sys.executable, "-m", "launcher.cli", *words), cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (words, done.stderr)
    with (clone / "docs/results/cpu_tiny_llava_full.jsonl").open("a") as file:
        file.write("{}\n")
    shutil.copy(clone / "conf/cluster/local.yaml", clone / "conf/cluster/lab.yaml")
    (clone / "conf/cluster/example.yaml").write_text("name: example\n")
    after = read_source(clone, USED)
    assert not after.state.dirty and refuse_dirty(after, "") == ""
    assert replace(after.state, untracked=(), changed=()) == before.state and after.diff == b""
    assert {"report-monday-and-1-more.html", "report-monday.csv", "scripts/", "conf/cluster/lab.yaml"} <= {*after.state.untracked}
    assert {*after.state.changed} == {"docs/results/cpu_tiny_llava_full.jsonl", "conf/cluster/example.yaml"}
