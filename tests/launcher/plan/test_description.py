"""What a person reads of a plan: no credential, and a next command that is the same run."""

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.plan.full import describe_full
from launcher.plan.plan import Plan, plan_json
from launcher.plan.short import describe_short
from launcher.record.record import AttemptOutcome, SourceState, close_run, open_run

SOURCE = SourceState(commit="", dirty=False)
NOW = datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("hardware=p4", "run.steps=100", "cluster.delivery.accept_licence=true"),
        (
            "run.force=it's fine",
            "data=files",
            "data.train=日 本.json",
            "data.evaluation=b.json",
            "data.images=.",
            "cluster.devices_per_node=2",
        ),
    ],
)
def test_next_is_the_same_run(plan_for: Callable[..., Plan], overrides: tuple[str, ...]) -> None:
    for full in (False, True):
        lines = (describe_full if full else describe_short)(plan_for(*overrides)).splitlines()
        (last,) = (line for line in lines if line.startswith("next: omnilaunch launch"))
        assert tuple(shlex.split(last.removeprefix("next: omnilaunch launch"))) == overrides


def test_next_keeps_the_run_id_that_was_typed(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for("run.steps=100")
    for lines in (describe_short(plan, named="exp1").splitlines(), describe_full(plan, named="exp1").splitlines()):
        assert "next: omnilaunch launch run.steps=100 --run-id exp1" in lines


def test_credentials_are_shown_and_written_nowhere(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(
        f"cluster.root={tmp_path}",
        "cluster.delivery.index=https://ann:pa55word@mirror.example/simple",
        "cluster.delivery.proxy=http://ann:pa55word@proxy.example:3128",
    )
    assert plan.config.cluster.delivery.index == "https://ann:pa55word@mirror.example/simple"
    open_run(plan, SOURCE)
    close_run(plan, SOURCE, AttemptOutcome(status="finished", code=0), started=NOW, ended=NOW + timedelta(seconds=2))
    written = [path.read_text(encoding="utf-8") for path in Path(plan.folder).rglob("*") if path.is_file()]
    assert len(written) >= 5
    for text in (describe_short(plan), describe_full(plan), plan_json(plan), *written):
        assert "pa55word" not in text
    assert json.loads(plan_json(plan))["config"]["cluster"]["delivery"]["index"] == "https://***@mirror.example/simple"
    assert "'cluster.delivery.proxy=http://***@proxy.example:3128'" in describe_full(plan).splitlines()[-1]
