"""Runs of one plan, one after the other: those that are there already, and those that are still missing.

Each is an ordinary run with its own record. What has ended stays whatever comes after it, and the next call goes on from there.
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

from launcher.bench.measure import canonical_data, measure_run
from launcher.bench.result import Repeat
from launcher.errors import ConfigRefused, LaunchError, RecordRefused
from launcher.plan.plan import Plan, to_plain
from launcher.record.comparable import ComparableKind, find_differences, flatten, kind_of
from launcher.record.index import list_entries, read_entry, tag_run
from launcher.record.lock import hold_lock, is_locked
from launcher.record.reader import read_object
from launcher.record.record import Record
from launcher.record.recorded_run import RecordedRun, load_recorded_run
from launcher.record.source import SourceState
from launcher.run.signals import STOPPED_CODE
from trainer import contract

LOCK_FILE = ".bench.lock"  # in the folder of the runs: two at a time would measure each other
LOAD_FILE = "bench.json"  # beside the record, and no part of it: what the machine was busy with before the run
STAMP = r"-\d{8}-\d{6}-[0-9a-f]{4}"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """`name`: of all its runs, which are called <name>-1, <name>-2 ...; `begun`: numbers that are taken; `done`: ids of those that finished."""

    name: str
    runs: Path
    begun: int = 0
    done: tuple[str, ...] = ()


class SeriesStopped(LaunchError):
    """Ctrl-C, or a stop of the run that was under way."""

    exit_code = STOPPED_CODE  # type: ignore[assignment]  # as a shell has it, and no Exit


def name_series(prefix: str, now: datetime, *, pid: int) -> str:
    suffix = sha256(f"{now.isoformat()} {pid}".encode()).hexdigest()[:4]
    return f"{prefix}-{now:%Y%m%d-%H%M%S}-{suffix}"


def find_series(prefix: str, runs: Path, *, published: Sequence[str]) -> Series | None:
    """The newest one of `prefix` that was begun and not published; None where there is none."""
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
def hold(runs: Path) -> Iterator[None]:
    """Raises ConfigRefused where another bench is at work in this folder, or where nothing can be written there."""
    refusal = f"another bench is running in {runs} ({{holder}}), and two benches would disturb each other's figures: wait for it to end"
    with ExitStack() as stack:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(runs / LOCK_FILE, refusal))
        except OSError as error:
            raise ConfigRefused(f"runs cannot be written to {runs}: {error.strerror}. Name another folder: cluster.root=FOLDER") from error
        yield


def require_same(series: Series, plan: Plan, source: SourceState, *, anew: str) -> None:
    """Raises ConfigRefused where a run that is there was made of something else than the next one would be, or is not whole. `anew`: the command that begins
    another series."""
    for run_id in series.done:
        try:
            recorded = load_recorded_run(series.runs / run_id, rows=False)
        except RecordRefused as error:
            raise RecordRefused(f"{error}\nTo leave the runs of {series.name} and begin anew: {anew}") from error
        apart = differing(recorded, plan, source)
        if apart:
            lines = "\n".join(f"  {line}" for line in apart[:12])
            raise ConfigRefused(
                f"{series.name} was begun, {len(series.done)} of its runs are done, and what is here now would be no repeat of them:\n{lines}\n"
                f"Bring that back (git checkout {recorded.source.commit[:12] or 'COMMIT'}) to go on with it; or leave those runs and begin anew: {anew}"
            )


def differing(recorded: RecordedRun, plan: Plan, source: SourceState) -> tuple[str, ...]:
    before, now = recorded.source, source
    apart = [f"commit: {before.commit[:12]} then, {now.commit[:12]} now"] if before.commit != now.commit else []
    apart += ["changes of the tree that the commit does not hold"] if before.diff_sha256 != now.diff_sha256 else []
    apart += ["files of the image"] if recorded.plan.image.fingerprint != plan.image.fingerprint else []
    then, here = (dict(flatten(canonical_data(to_plain(each)["config"]), "config")) for each in (recorded.plan, plan))
    return (*apart, *(f"{found.key}: {found.left} then, {found.right} now" for found in find_differences(then, here) if weighs(found.key)))


def weighs(key: str) -> bool:
    return kind_of(key) is not ComparableKind.FREE or key.startswith("config.run.bands")


def carry_on(
    series: Series, wanted: int, carry_out: Callable[[str], Record | None], *, tags: Sequence[str], again: str, say: Say, here: bool = True
) -> tuple[Repeat, ...]:
    """The repeats, those that are missing carried out now by `carry_out`, which gets a run id. `here`: on this machine, whose load then
    counts. Raises SeriesStopped after Ctrl-C, and the LaunchError of a run that failed, both saying how many are done and the command that
    goes on (`again`)."""
    repeats = [measure_run(series.runs / run_id, load=read_load(series.runs / run_id)) for run_id in series.done[:wanted]]
    number = series.begun
    if repeats:
        say(f"{series.name}: {len(repeats)} of {wanted} repeats are there already")
    while len(repeats) < wanted:
        number += 1
        run_id = f"{series.name}-{number}"
        load = os.getloadavg()[0] if here else None
        say(f"repeat {len(repeats) + 1} of {wanted}" + ("" if load is None else f", the machine has a load of {load:.1f}"))
        kept = f"{len(repeats)} of {wanted} repeats are done and stay in {series.runs}; to go on: {again}"
        try:
            record = carry_out(run_id)
        except KeyboardInterrupt as error:
            raise SeriesStopped(f"stopped: {kept}") from error
        except LaunchError as error:
            error.args = (f"{error}\nthe bench ends here, {kept}",)
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
    """Raises ConfigRefused where a launcher is still at the last run of a series."""
    last = series.runs / f"{series.name}-{series.begun}"
    if last.is_dir() and read_entry(last).record is None and is_locked(last):
        raise ConfigRefused(f"run {last.name} is under way: wait for it, or end it where it was started; omnilaunch runs shows it")


def read_load(folder: Path) -> float | None:
    """None where the launcher was ended before it wrote it."""
    load = read_object(folder / LOAD_FILE, []).get("load")
    return float(load) if isinstance(load, (int, float)) else None


def describe_repeat(repeat: Repeat) -> str:
    scores = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in repeat.evaluation.items() if name != "count")
    return (
        f"{repeat.run_id}  {repeat.samples_per_s:,.1f} samples/s  {repeat.step_s * 1000:,.1f} ms a step  "
        f"{repeat.peak_bytes / 2**30:.2f} GiB  loss {repeat.final_loss:.6g}{scores}"
    )


def load_repeats(series_runs: Path, repeats: Sequence[Repeat]) -> tuple[RecordedRun, ...]:
    return tuple(load_recorded_run(series_runs / repeat.run_id, rows=False) for repeat in repeats)
