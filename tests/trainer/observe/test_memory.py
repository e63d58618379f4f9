"""Peaks by phase, and the profiler's window."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.contract import Profile
from trainer.device.device import DEVICES, host_memory_bytes, system_memory
from trainer.observe.memory import MemoryPeaks
from trainer.observe.profile import ProfilerWindow

MIB = 2**20


def test_a_peak_belongs_to_the_phase_that_it_was_in(process_group: None) -> None:
    gc.collect()  # what earlier tests left goes now, not in the phase that is measured
    before = DEVICES["cpu"].peak_bytes()
    DEVICES["cpu"].reset_peaks()
    memory = MemoryPeaks(DEVICES["cpu"])
    memory.enter("first step")
    held = torch.ones(256 * MIB // 4)
    memory.enter("steps")
    del held
    memory.enter("evaluation")
    peaks = {peak.phase: peak.allocated_bytes for peak in memory.report()}
    assert list(peaks) == ["load", "first step", "steps", "evaluation"]
    if DEVICES["cpu"].peak_bytes() >= before + 256 * MIB:
        pytest.skip("this kernel does not reset a process's peak")
    # What earlier tests of this process left may go meanwhile: hence less than the 256 MiB.
    assert peaks["first step"] >= peaks["load"] + 60 * MIB
    assert peaks["evaluation"] <= peaks["steps"] - 60 * MIB
    assert memory.highest() == max(peaks.values())


class Scripted:
    """A device whose peaks a test writes down, that of the allocator ten times as high."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks, self.resets = peaks, 0

    def peak_bytes(self) -> int:
        return self.peaks[self.resets]

    def reserved_bytes(self) -> int:
        return 10 * self.peaks[self.resets]

    def reset_peaks(self) -> None:
        self.resets += 1


def test_a_phase_that_comes_again_keeps_the_highest(process_group: None) -> None:
    memory = MemoryPeaks(Scripted([1, 5, 3, 4, 2]))  # type: ignore[arg-type]
    for phase in ("steps", "saving", "steps", "saving"):
        memory.enter(phase)
    peaks = {peak.phase: (peak.allocated_bytes, peak.reserved_bytes) for peak in memory.report()}
    assert peaks == {"load": (1, 10), "steps": (5, 50), "saving": (3, 30)}
    assert memory.highest() == 5


def test_the_host_has_no_more_memory_than_it_has() -> None:
    assert 0 < host_memory_bytes() <= system_memory()[1]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Kineto, by version
def test_the_window_traces_its_steps_and_no_other(tiny_spec: Any, capfd: pytest.CaptureFixture[str]) -> None:
    spec = replace(tiny_spec(), profile=Profile(start=3, steps=2))
    profiler = ProfilerWindow(spec, DEVICES["cpu"], rank=0)
    for step in range(1, 8):
        profiler.before_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
    profiler.close()
    (trace,) = (Path(spec.output) / "profile").glob("rank-000.*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"step {step}" for step in range(1, 8)} & names == {"step 3", "step 4"}
    assert "trace is in" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_the_ranks_that_are_asked_for_trace_and_an_open_window_is_written(tiny_spec: Any) -> None:
    spec = replace(tiny_spec(), profile=Profile(start=2, steps=9))
    for rank, ranks in ((1, "first"), (1, "all")):
        profiler = ProfilerWindow(replace(spec, profile=replace(spec.profile, ranks=ranks)), DEVICES["cpu"], rank=rank)  # type: ignore[arg-type]
        profiler.before_step(5)
        profiler.close()
        assert len(list((Path(spec.output) / "profile").glob("rank-001.*"))) == (ranks == "all")
    never = ProfilerWindow(replace(spec, profile=Profile()), DEVICES["cpu"], rank=0)
    never.before_step(10)
    assert never.running is None
