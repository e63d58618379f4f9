"""When a run that was resumed ran, and what each resumption changed."""

import json
from pathlib import Path

from launcher.record.report.page import render_html, render_markdown
from launcher.record.report.timeline import lay_out
from launcher.record.run_files import read_run_files
from tests.launcher.planted import copy_run, set_value
from tests.launcher.record.report.test_page import node


def test_a_resumption_says_after_which_step_and_what_it_changed(tmp_path: Path) -> None:
    def resumed(folder: Path) -> None:
        (folder / "attempts/1").mkdir(parents=True)
        (folder / "attempts/2").mkdir()
        first = {"number": 1, "started_at": "2026-11-21T18:12:30.000+00:00", "seconds": 10.0, "steps": 2, "status": "stopped"}
        (folder / "attempts/1/attempt.json").write_text(json.dumps({**first, "nodes": [node("a", 0, 10.0)], "failure": None}))
        change = {"key": "run.steps", "old": "3", "new": "5", "kind": "steps"}
        second = {"attempt": 2, "started_at": "2026-11-21T19:12:30.000+00:00", "step": 2, "accepted": ["steps"], "changes": [change]}
        (folder / "attempts/2/resumption.json").write_text(json.dumps({**second, "overrides": ["run.steps=5"]}))
        set_value("result.json", "started_at", "2026-11-21T18:12:30.000+00:00")(folder)
        set_value("result.json", "ended_at", "2026-11-21T19:12:50.000+00:00")(folder)
        set_value("result.json", "nodes", [node("a", 0, 20.0)])(folder)
        set_value("result.json", "seconds", 30.0)(folder)

    run = read_run_files(copy_run(tmp_path, "r", resumed))
    found = lay_out(run)
    assert found.total_s == 3620 and [(round(bar.begin_s), bar.seconds) for bar in found.rows[0][1]] == [(0, 10.0), (3600, 20.0)]
    assert found.resumptions == ("attempt 2: resumed after step 2; accepted: steps\nrun.steps: 3 → 5",)
    page = render_html((run,), None, "")
    assert "run.steps: 3 → 5" in page and "3 of 5" in page
    assert "attempt 2: resumed after step 2; accepted: steps" in render_markdown((run,), None, "")
