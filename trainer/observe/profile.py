"""The profiler's window: some steps of the run, traced into its folder.

A trace is opened in a browser at ui.perfetto.dev or with TensorBoard's profiler plugin; on an NPU it is what MindStudio Insight reads.
"""

from pathlib import Path
from typing import Any

from trainer.contract import PROFILE_FOLDER, TrainSpec
from trainer.device.device import Device


class ProfilerWindow:
    """Told which step comes next, it starts and stops the profiler of this rank. The steps within are slower than the others."""

    def __init__(self, spec: TrainSpec, device: Device, rank: int) -> None:
        profile = spec.profile
        wanted = profile.steps and (rank == 0 or profile.ranks == "all")
        self.first, self.end = profile.start, profile.start + profile.steps if wanted else profile.start
        self.folder, self.device, self.rank = Path(spec.output) / PROFILE_FOLDER, device, rank
        self.running: Any = None

    def reach(self, step: int) -> None:
        """`step` is the next to begin; one past the last at the end."""
        if self.running is None and self.first <= step < self.end:
            self.running = self._open()
            self.running.start()
        elif self.running is not None and step >= self.end:
            self.close()

    def close(self) -> None:
        """Write the trace of a window that is open."""
        running, self.running = self.running, None
        if running is not None:
            self.device.synchronize()
            running.stop()
            if self.rank == 0:
                print(f"the trace lies in {self.folder}", flush=True)

    def _open(self) -> Any:
        api = self.device.profiler()
        kinds = dict.fromkeys(("CPU", self.device.name.upper()))
        return api.profile(
            activities=[getattr(api.ProfilerActivity, kind) for kind in kinds],
            on_trace_ready=api.tensorboard_trace_handler(str(self.folder), worker_name=f"rank-{self.rank:03d}"),
        )
