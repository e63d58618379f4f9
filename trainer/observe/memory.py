"""Peak memory of each phase of a run."""

from trainer.contract import PhasePeak
from trainer.device.device import Device
from trainer.distributed.collective import gather_objects

PHASES = ("load", "first step", "steps", "evaluation", "saving")


class MemoryPeaks:
    """Reads this rank's peaks per phase. It begins in "load"; `enter` ends a phase and begins another, which may come again."""

    def __init__(self, device: Device) -> None:
        self.device, self.phase = device, PHASES[0]
        self.peaks: dict[str, tuple[int, int]] = {}  # phase -> allocated, reserved, in bytes

    def enter(self, phase: str) -> None:
        self._read()
        self.device.reset_peaks()
        self.phase = phase

    def highest(self) -> int:
        """The highest allocated bytes so far."""
        self._read()
        return max(allocated for allocated, _ in self.peaks.values())

    def _read(self) -> None:
        allocated, reserved = self.peaks.get(self.phase, (0, 0))
        self.peaks[self.phase] = (max(allocated, self.device.peak_bytes()), max(reserved, self.device.reserved_bytes()))

    def report(self) -> tuple[PhasePeak, ...]:
        """The highest of any rank, by phase. Every rank must call it."""
        self._read()
        found = {phase: [table[phase] for table in gather_objects(self.peaks) if phase in table] for phase in PHASES}
        return tuple(
            PhasePeak(phase=phase, allocated_bytes=max(a for a, _ in peaks), reserved_bytes=max(r for _, r in peaks))  # type: ignore[arg-type]
            for phase, peaks in found.items()
            if peaks
        )
