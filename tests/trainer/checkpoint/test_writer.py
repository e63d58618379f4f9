"""Checkpoints behind the steps: the same bytes as in their way, and failures that reach every rank."""

import errno
import itertools
import os
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

import tests.trainer.mortal
import trainer.checkpoint.pending
import trainer.checkpoint.writer
import trainer.tensor.shard
from tests.trainer.mortal import fill_the_disk_of_rank_1, run_ranks
from trainer.contract import CHECKPOINTS, Exit, TrainSpec
from trainer.contract.checkpoint_files import whole_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def files_of(spec: TrainSpec) -> dict[str, bytes]:
    """All files of all checkpoints, but for the list that names the run's folder and the fields that may differ."""
    folder = Path(spec.output) / CHECKPOINTS
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"zero": 3, "ranks": 2, "micro": 4}, marks=pytest.mark.slow, id="ZeRO 3, 2 ranks"),
        pytest.param({"zero": 0, "micro": 8}, id="no ZeRO"),
    ],
)
def test_behind_the_steps_are_the_same_bytes(arguments: dict[str, Any], tiny_spec: Any) -> None:
    changes = {"steps": 5, "save_every": 1, "keep_checkpoints": 9}
    before, behind = (
        tiny_spec(name, changes={**changes, "checkpoint_background": background}, **arguments)
        for name, background in (("before", False), ("behind", True))
    )
    for spec in (before, behind):
        gone = run_ranks(spec)
        assert set(gone.codes) == {0}, gone.text
    assert "background checkpoints hold up to 0.00 GiB of the first node's memory" in gone.text
    assert files_of(before) == files_of(behind)
    assert sorted(state.step for state in whole_checkpoints(Path(behind.output))) == [1, 2, 3, 4, 5]


def test_a_failure_behind_the_steps_is_raised_on_every_rank(tiny_spec: Any) -> None:
    spec = tiny_spec(ranks=2, micro=4, zero=2, changes={"steps": 400, "save_every": 3, "checkpoint_background": True})
    gone = run_ranks(spec, meddle=fill_the_disk_of_rank_1)
    assert gone.codes == (Exit.RUN, Exit.RUN), gone.text
    assert (
        "checkpoint of step 6 could not be written" in gone.text
        and "No space left on device. The incomplete folder was removed." in gone.text
    )
    assert [path.name for path in (Path(spec.output) / CHECKPOINTS).iterdir()] == ["step-000003"]


def fill_the_disk_of_rank_1_to_the_brim() -> None:
    """As above, and its word to rank 0 finds no room either."""
    fill_the_disk_of_rank_1()
    write, calls = trainer.checkpoint.writer.write_text, itertools.count(1)

    def fail_once(text: str, path: Path) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(text, path)

    if os.environ["RANK"] == "1":
        trainer.checkpoint.writer.write_text = fail_once


def test_a_rank_that_cannot_even_say_that_it_failed_keeps_nobody_waiting(tiny_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.trainer.mortal, "LIMIT_S", 60)  # it ends in seconds, or never
    spec = tiny_spec(ranks=2, micro=4, zero=2, changes={"steps": 400, "save_every": 3, "checkpoint_background": True})
    gone = run_ranks(spec, meddle=fill_the_disk_of_rank_1_to_the_brim)
    assert gone.codes == (Exit.RUN, Exit.RUN), gone.text
    assert gone.text.count("checkpoint of step 6 could not be written") == 2
    assert "No space left on device. The incomplete folder was removed." in gone.text
    assert [path.name for path in (Path(spec.output) / CHECKPOINTS).iterdir()] == ["step-000003"]


def leave_no_room() -> None:
    trainer.checkpoint.pending.shutil.disk_usage = lambda _: types.SimpleNamespace(free=0)


def test_without_room_nothing_is_left(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"steps": 3, "save_every": 1, "checkpoint_background": True})
    gone = run_ranks(spec, meddle=leave_no_room)
    assert gone.codes == (Exit.RUN,), gone.text
    assert (
        "checkpoint of step 1 could not be written" in gone.text
        and "not enough room on the disk. The incomplete folder was removed." in gone.text
    )
    assert not list((Path(spec.output) / CHECKPOINTS).iterdir())


def write_slowly() -> None:
    """So that several steps are done while a checkpoint is on its way, and the next one has to wait for it."""
    complete = trainer.checkpoint.pending.complete

    def slow(draft: Any, spec: Any) -> None:
        assert threading.current_thread().name == "checkpoint" or draft.step == spec.steps
        rows = Path(spec.output) / "metrics.jsonl"
        before = rows.read_text().count("\n")
        time.sleep(1.0)
        print(f"{rows.read_text().count(chr(10)) - before} steps went by", flush=True)
        complete(draft, spec)

    trainer.checkpoint.writer.complete = trainer.checkpoint.pending.complete = slow


def test_steps_go_on_and_one_checkpoint_waits_for_another(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"steps": 60, "save_every": 20, "keep_checkpoints": 9, "checkpoint_background": True})
    gone = run_ranks(spec, meddle=write_slowly)
    assert gone.codes == (0,), gone.text
    passed = [int(line.split()[0]) for line in gone.text.splitlines() if line.endswith("steps went by")]
    assert len(passed) == 3 and passed[0] > 0 and passed[2] == 0, gone.text  # the last one is in the way
    assert sorted(state.step for state in whole_checkpoints(Path(spec.output))) == [20, 40, 60]


def grant_no_memory() -> None:
    trainer.checkpoint.writer.host_memory_bytes = lambda: 0


def test_where_memory_lacks_the_steps_wait(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"steps": 3, "save_every": 1, "checkpoint_background": True})
    gone = run_ranks(spec, meddle=grant_no_memory)
    assert gone.codes == (0,), gone.text
    assert "0.00 GiB free: too much, so training waits for each checkpoint" in gone.text
