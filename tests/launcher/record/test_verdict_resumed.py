"""The verdict about runs that were interrupted and resumed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.record.comparison import Outcome
from tests.launcher.planted import Change
from tests.launcher.record.test_verdict import held


def resume_with(accepted: Sequence[str], changes: Sequence[dict[str, str]]) -> Change:
    def change(folder: Path) -> None:
        (folder / "attempts/2").mkdir(parents=True)
        resumption = {"attempt": 2, "started_at": "2026-11-21T00:00:00+00:00", "step": 2, "overrides": [], "accepted": accepted}
        (folder / "attempts/2/resumption.json").write_text(json.dumps({**resumption, "changes": changes}))

    return change


def test_a_run_that_was_only_interrupted_is_the_same(tmp_path: Path) -> None:
    saved = {"key": "run.save_every", "old": "0", "new": "5", "kind": ""}
    assert held(tmp_path, resume_with([], [saved])).outcome is Outcome.SAME


@pytest.mark.parametrize(
    ("accepted", "changes", "key"),
    [
        (["steps"], [{"key": "run.steps", "old": "2", "new": "3", "kind": "steps"}], "result.resumed.steps.run.steps"),
        (["data"], [], "result.resumed.data"),
        (["nodes"], [{"key": "cluster.nodes", "old": "a", "new": "b", "kind": "nodes"}], "result.resumed.nodes.cluster.nodes"),
    ],
)
def test_what_a_run_continued_with_is_a_difference(tmp_path: Path, accepted: list[str], changes: list[dict[str, str]], key: str) -> None:
    comparison = held(tmp_path, resume_with(accepted, changes))
    assert comparison.outcome is Outcome.DIFFERENT
    assert [found.key for found in comparison.judgements[0].differences if found.matters] == [key]
