"""How much memory each phase of a run took at its peak."""

import torch.distributed

from trainer.contract import PhasePeak
from trainer.device.device import Device

PHASES = ("load", "first step", "steps", "evaluation", "saving")


class MemoryPeaks:
    """Reads this rank's peaks phase by phase. It begins in "load"; `enter` ends a phase and begins another, which may come again."""

    def __init__(self, device: Device) -> None:
        self.device, self.phase = device, PHASES[0]
        self.peaks: dict[str, tuple[int, int]] = {}  # phase -> allocated, reserved, in bytes

    def enter(self, phase: str) -> None:
        self._read()
        self.device.reset_peaks()
        self.phase = phase

    def highest(self) -> int:
        """The most that was allocated so far, in bytes."""
        self._read()
        return max(allocated for allocated, _ in self.peaks.values())

    def _read(self) -> None:
        allocated, reserved = self.peaks.get(self.phase, (0, 0))
        self.peaks[self.phase] = (max(allocated, self.device.peak_bytes()), max(reserved, self.device.reserved_bytes()))

    def report(self) -> tuple[PhasePeak, ...]:
        """The highest of any rank, by phase. Every rank must call it."""
        self._read()
        tables = [self.peaks]
        if torch.distributed.get_world_size() > 1:
            tables = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(tables, self.peaks)
        found = {phase: [table[phase] for table in tables if phase in table] for phase in PHASES}
        return tuple(
            PhasePeak(phase=phase, allocated_bytes=max(a for a, _ in peaks), reserved_bytes=max(r for _, r in peaks))  # type: ignore[arg-type]
            for phase, peaks in found.items()
            if peaks
        )
