"""The repeats of a bench: runs of one plan, one after the other. Those that have finished are kept, and the next call runs the missing ones.

Each repeat is an ordinary run with its own record.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from launcher.bench.measure import as_json_data, measure_run
from launcher.bench.result import Repeat
from launcher.errors import ConfigRefused, LaunchError, RecordRefused
from launcher.plan.plan import Plan, to_plain
from launcher.plan.text import figure, size
from launcher.record.comparable import ComparableKind, find_differences, flatten, kind_of
from launcher.record.index import list_entries, read_entry, tag_run
from launcher.record.lock import hold_lock, is_locked
from launcher.record.reader import read_object
from launcher.record.record import Record
from launcher.record.recorded_run import RecordedRun, load_recorded_run
from launcher.record.source import SourceState
from launcher.run.signals import STOPPED_CODE
from trainer import contract

LOCK_FILE = ".bench.lock"  # in the folder of the runs: two benches at the same time would disturb each other
LOAD_FILE = "bench.json"  # not a part of the record: the load of the machine before the run
STAMP = r"-\d{8}-\d{6}-[0-9a-f]{4}"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """The runs <name>-1, <name>-2 ... `begun`: the highest number that was started. `done`: ids of the runs that finished."""

    name: str
    runs: Path
    begun: int = 0
    done: tuple[str, ...] = ()


class SeriesStopped(LaunchError):
    """Ctrl-C, or a stop of the run that was running."""

    exit_code = STOPPED_CODE  # type: ignore[assignment]  # the code of a shell, which is not in Exit


def name_series(prefix: str, now: datetime, *, pid: int) -> str:
    suffix = sha256(f"{now.isoformat()} {pid}".encode()).hexdigest()[:4]
    return f"{prefix}-{now:%Y%m%d-%H%M%S}-{suffix}"


def find_series(prefix: str, runs: Path, *, published: Sequence[str]) -> Series | None:
    """The newest series of `prefix` that was started and not published; None if there is none."""
    pattern = re.compile(rf"({re.escape(prefix)}{STAMP})-(\d+)")
    found: dict[str, list[tuple[int, str]]] = {}
    for entry in list_entries(runs):
        match = pattern.fullmatch(entry.run_id)
        if match and match[1] not in published:
            found.setdefault(match[1], []).append((int(match[2]), entry.status))
    if not found:
        return None
    name = max(found)
    numbered = sorted(found[name])
    done = tuple(f"{name}-{number}" for number, status in numbered if status == "finished")
    return Series(name=name, runs=runs, begun=numbered[-1][0], done=done)


@contextmanager
def lock_runs(runs: Path) -> Iterator[None]:
    """Raises ConfigRefused if another bench is running in this folder, or if it cannot be written."""
    refusal = f"another bench is running in {runs} ({{holder}}), and two benches would disturb each other's figures: wait for it to end"
    with ExitStack() as stack:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(runs / LOCK_FILE, refusal))
        except OSError as error:
            raise ConfigRefused(f"runs cannot be written to {runs}: {error.strerror}. Name another folder: cluster.root=FOLDER") from error
        yield


def require_same(series: Series, plan: Plan, source: SourceState, *, start_new: str) -> None:
    """Raises ConfigRefused if a finished run differs from what the next one would be, or its record is damaged. `start_new`: the command that
    starts a new series."""
    for run_id in series.done:
        try:
            recorded = load_recorded_run(series.runs / run_id, rows=False)
        except RecordRefused as error:
            raise RecordRefused(f"{error}\nTo leave the runs of {series.name} as they are and start a new bench: {start_new}") from error
        if different := differing(recorded, plan, source):
            lines = "\n".join(f"  {line}" for line in different[:12])
            raise ConfigRefused(
                f"{len(series.done)} runs of the bench {series.name} have finished, and a run now would not be a repeat of them:\n{lines}\n"
                f"To continue it, restore what differs (git checkout {recorded.source.commit[:12] or 'COMMIT'}); to start a new bench: {start_new}"
            )


def differing(recorded: RecordedRun, plan: Plan, source: SourceState) -> tuple[str, ...]:
    before, now = recorded.source, source
    found = [f"commit: {before.commit[:12]} then, {now.commit[:12]} now"] if before.commit != now.commit else []
    found += ["uncommitted changes of the tree"] if before.diff_sha256 != now.diff_sha256 else []
    found += ["files of the image"] if recorded.plan.image.fingerprint != plan.image.fingerprint else []
    then, here = (dict(flatten(as_json_data(to_plain(each)["config"]), "config")) for each in (recorded.plan, plan))
    return (*found, *(f"{one.key}: {one.left} then, {one.right} now" for one in find_differences(then, here) if matters(one.key)))


def matters(key: str) -> bool:
    return kind_of(key) is not ComparableKind.FREE or key.startswith("config.run.bands")


def run_repeats(
    series: Series, wanted: int, carry_out: Callable[[str], Record | None], *, tags: Sequence[str], again: str, say: Say, here: bool = True
) -> tuple[Repeat, ...]:
    """All repeats; the missing ones are run now by `carry_out`, which gets a run id. `here`: the runs use this machine, whose load is recorded.
    Raises SeriesStopped after Ctrl-C, and the LaunchError of a run that failed; both say how many runs have finished, and the command that
    continues (`again`)."""
    repeats = [measure_run(series.runs / run_id, load=read_load(series.runs / run_id)) for run_id in series.done[:wanted]]
    number = series.begun
    if repeats:
        say(f"{series.name}: {len(repeats)} of {wanted} repeats have finished already")
    while len(repeats) < wanted:
        number += 1
        run_id = f"{series.name}-{number}"
        load = os.getloadavg()[0] if here else None
        say(f"repeat {len(repeats) + 1} of {wanted}" + ("" if load is None else f", the machine has a load of {load:.1f}"))
        kept = f"{len(repeats)} of {wanted} repeats have finished and are kept in {series.runs}; to continue: {again}"
        try:
            record = carry_out(run_id)
        except KeyboardInterrupt as error:
            raise SeriesStopped(f"stopped: {kept}") from error
        except LaunchError as error:
            error.args = (f"{error}\nthe bench ends here: {kept}",)
            raise
        if record is None or record.status != "finished":
            raise SeriesStopped(f"{run_id} was stopped: {kept}")
        folder = series.runs / run_id
        contract.write_text(json.dumps({"load": load}) + "\n", folder / LOAD_FILE)
        tag_run(read_entry(folder), tags, remove=False)
        repeats.append(measure_run(folder, load=load))
        say(describe_repeat(repeats[-1]))
    return tuple(repeats)


def refuse_busy(series: Series) -> None:
    """Raises ConfigRefused if a launcher still supervises the last run of the series."""
    last = series.runs / f"{series.name}-{series.begun}"
    if last.is_dir() and read_entry(last).record is None and is_locked(last):
        raise ConfigRefused(f"run {last.name} is still running: wait for it, or stop it where it was started. See: omnilaunch runs")


def read_load(folder: Path) -> float | None:
    """None if the launcher was killed before it wrote the file."""
    load = read_object(folder / LOAD_FILE, []).get("load")
    return float(load) if isinstance(load, (int, float)) else None


def describe_repeat(repeat: Repeat) -> str:
    scores = "".join(f"  {name.replace('_', ' ')} {figure(value)}" for name, value in repeat.evaluation.items() if name != "count")
    return (
        f"{repeat.run_id}  {figure(repeat.samples_per_s)} samples/s  {figure(repeat.step_s * 1000)} ms per step  "
        f"{size(repeat.peak_bytes)}  loss {figure(repeat.final_loss)}{scores}"
    )


def load_repeats(series_runs: Path, repeats: Sequence[Repeat]) -> tuple[RecordedRun, ...]:
    return tuple(load_recorded_run(series_runs / repeat.run_id, rows=False) for repeat in repeats)
