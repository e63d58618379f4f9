"""A run on disk, for the commands that live runs take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.record import write_record
from tests.launcher.planted import write_run
from tests.launcher.run.test_resume import stopped_record


@pytest.fixture
def run(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes run R and gives its folder: its plan with these overrides, and with a status also its record."""
    monkeypatch.chdir(tmp_path)

    def make(*words: str, status: str = "") -> Path:
        folder = tmp_path / "runs" / "R"
        plan = plan_for(f"cluster.root={tmp_path}", *words)
        plan = replace(plan, folder=str(folder), spec=replace(plan.spec, output=str(folder)))
        write_run(folder, plan)
        if status:
            write_record(replace(stopped_record("R"), status=status), folder)  # type: ignore[arg-type]
        return folder

    return make
