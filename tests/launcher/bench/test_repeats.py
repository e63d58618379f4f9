"""Repeats run one after the other. A failure or a stop ends the bench and loses nothing; the next call continues, or says why it cannot."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.bench.repeats import (
    Series,
    SeriesStopped,
    differing,
    find_series,
    lock_runs,
    name_series,
    read_load,
    refuse_busy,
    require_same,
    run_repeats,
)
from launcher.errors import ConfigRefused, NodeFailed, RecordRefused, RunEnded
from launcher.record.checksums import SEAL_FILE, make_seal
from launcher.record.index import read_entry
from launcher.record.recorded_run import load_recorded_run
from trainer import contract

REAL = Path(__file__).resolve().parents[2] / "golden/record/2"
NAME = "x-20261121-000000-0000"
FINISHED = SimpleNamespace(status="finished")


@pytest.fixture
def series(tmp_path: Path) -> Series:
    (tmp_path / "runs").mkdir()
    return Series(name=NAME, runs=tmp_path / "runs")


def leave_run(runs: Path, run_id: str, status: str = "finished") -> Any:
    shutil.copytree(REAL, runs / run_id)
    record = json.loads((runs / run_id / "result.json").read_text())
    (runs / run_id / "result.json").write_text(json.dumps(record | {"status": status}))
    contract.write(make_seal(runs / run_id, "golden", unwritten={}), runs / run_id / SEAL_FILE)
    return SimpleNamespace(status=status)


def going_on(series: Series, carry_out: Callable[[str], Any], said: list[str]) -> Any:
    return run_repeats(series, 3, carry_out, tags=("x",), again="omnilaunch bench x", say=said.append)


def test_all_repeats_are_tagged_and_reported(series: Series) -> None:
    said: list[str] = []
    repeats = going_on(series, lambda run_id: leave_run(series.runs, run_id), said)
    assert [repeat.run_id for repeat in repeats] == [f"{NAME}-{number}" for number in (1, 2, 3)]
    assert all(read_entry(series.runs / repeat.run_id).tags == ("x",) for repeat in repeats)
    assert repeats[0].load == read_load(series.runs / f"{NAME}-1") and "samples/s" in said[1]
    load_recorded_run(series.runs / f"{NAME}-1")  # what lies beside the record has not broken its seal


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("failed", RunEnded("the run failed first at rank 0")),
        ("failed", NodeFailed("lost")),
        ("stopped", None),
        ("stopped", KeyboardInterrupt()),
    ],
    ids=["run", "node", "stop", "between"],
)
def test_a_failure_or_a_stop_ends_the_bench_and_the_next_call_continues(series: Series, status: str, error: BaseException | None) -> None:
    def carry_out(run_id: str) -> Any:
        record = leave_run(series.runs, run_id, status if run_id.endswith("-2") else "finished")
        if error is not None and run_id.endswith("-2"):
            raise error
        return record

    wanted = SeriesStopped if status == "stopped" else type(error)
    with pytest.raises(wanted, match=r"(?s)1 of 3 repeats have finished and are kept.*to continue: omnilaunch bench x") as ended:  # type: ignore[arg-type]
        going_on(series, carry_out, [])
    assert ended.value.exit_code == (130 if status == "stopped" else error.exit_code)  # type: ignore[union-attr]
    found = find_series("x", series.runs, published=())
    assert found is not None and found.begun == 2 and found.done == (f"{NAME}-1",)
    said: list[str] = []
    repeats = going_on(found, lambda run_id: leave_run(series.runs, run_id), said)
    assert [repeat.run_id for repeat in repeats] == [f"{NAME}-{number}" for number in (1, 3, 4)], "nothing is written over"
    assert "1 of 3 repeats have finished already" in said[0] and repeats[0].load is not None


def test_the_newest_unpublished_series_is_continued(series: Series) -> None:
    assert find_series("x", series.runs, published=()) is None
    for run_id in (f"{NAME}-1", "x-20261122-000000-0000-2", "xy-20261123-000000-0000-1", "x-20261124-000000-0000", "x-monday-1"):
        leave_run(series.runs, run_id)
    found = find_series("x", series.runs, published=())
    assert found is not None and found.name == "x-20261122-000000-0000" and found.begun == 2
    found = find_series("x", series.runs, published=("x-20261122-000000-0000",))
    assert found is not None and found.name == NAME
    assert name_series("x", datetime(2026, 11, 21, tzinfo=UTC), pid=1)[:-4] == "x-20261121-000000-"


def test_runs_with_other_code_or_config_are_not_repeats(series: Series) -> None:
    leave_run(series.runs, f"{NAME}-1")
    recorded = load_recorded_run(series.runs / f"{NAME}-1")
    plan, source = recorded.plan, recorded.source
    assert differing(recorded, plan, source) == ()
    moved = replace(plan, config=replace(plan.config, cluster=replace(plan.config.cluster, root="/elsewhere")))
    assert differing(recorded, moved, source) == (), "where it runs is no part of it"
    other = replace(plan, config=replace(plan.config, run=replace(plan.config.run, seed=99)), image=replace(plan.image, fingerprint="0"))
    apart = differing(recorded, other, replace(source, commit="abc", diff_sha256="1"))
    assert [line.partition(":")[0] for line in apart] == [
        *("commit", "uncommitted changes of the tree", "files of the image", "config.run.seed"),
    ]
    bands = replace(plan.config.run, bands=replace(plan.config.run.bands, loss=0.5))
    wider = replace(plan, config=replace(plan.config, run=bands))
    assert [line.partition(":")[0] for line in differing(recorded, wider, source)] == ["config.run.bands.loss"], "they are stated before"
    found = find_series("x", series.runs, published=())
    assert found is not None
    with pytest.raises(
        ConfigRefused, match=r"(?s)1 runs of the bench .* have finished.*config\.run\.seed.*start a new bench: omnilaunch bench x --anew"
    ):
        require_same(found, other, source, start_new="omnilaunch bench x --anew")


def test_a_repeat_with_an_edited_record_is_refused(series: Series) -> None:
    leave_run(series.runs, f"{NAME}-1")
    plan, source = load_recorded_run(REAL).plan, load_recorded_run(REAL).source
    with (series.runs / f"{NAME}-1/metrics.jsonl").open("a") as file:
        file.write("{}\n")
    found = find_series("x", series.runs, published=())
    assert found is not None
    with pytest.raises(RecordRefused, match=r"(?s)metrics\.jsonl.*start a new bench: omnilaunch bench x --anew"):
        require_same(found, plan, source, start_new="omnilaunch bench x --anew")


def test_two_benches_at_the_same_time_are_refused(series: Series) -> None:
    with lock_runs(series.runs), pytest.raises(ConfigRefused, match=r"another bench is running in .*process \d+"), lock_runs(series.runs):
        pytest.fail("two benches hold one folder")
    with lock_runs(series.runs):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    with (
        pytest.raises(ConfigRefused, match=r"runs cannot be written to .*/afile/runs: .*cluster\.root=FOLDER"),
        lock_runs(tmp_path / "afile/runs"),
    ):
        pytest.fail("there is no such folder")


def test_a_series_with_a_running_run_is_refused(series: Series) -> None:
    from launcher.record.lock import lock_run

    leave_run(series.runs, f"{NAME}-1")
    (series.runs / f"{NAME}-1/result.json").unlink()
    found = find_series("x", series.runs, published=())
    assert found is not None and found.done == () and found.begun == 1
    refuse_busy(found)
    with lock_run(series.runs / f"{NAME}-1"), pytest.raises(ConfigRefused, match=r"-1 is still running"):
        refuse_busy(found)
