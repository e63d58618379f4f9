"""90 public logs, three sets of 30 that were not looked at before their rows existed: what is recognised now, and what was at first."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.run.diagnosis import explain_log

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "failures"
SETS: dict[str, list[dict[str, Any]]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(GOLDEN.glob("*.yaml"))
}
LOGS = [(name, log) for name, logs in SETS.items() for log in logs]
AT_FIRST = ("right", "weak", "wrong", "missed")


@pytest.mark.parametrize(("name", "log"), LOGS, ids=[f"{name}-{log['name']}" for name, log in LOGS])
def test_what_a_public_log_shows(name: str, log: dict[str, Any]) -> None:
    found = explain_log(log["text"], 1)
    assert (found.name if found else None) == log["known"]


@pytest.mark.parametrize(("name", "figures"), {"first": (13, 1, 1, 15), "second": (14, 1, 0, 15), "third": (19, 2, 0, 9)}.items())
def test_each_set_says_how_many_were_recognised_before_their_rows_existed(name: str, figures: tuple[int, ...]) -> None:
    logs = SETS[name]
    assert len(logs) == len({log["source"] for log in logs}) == 30
    assert tuple(sum(log["at_first"] == each for log in logs) for each in AT_FIRST) == figures
    assert sum(log["known"] is not None for log in logs) >= 28
