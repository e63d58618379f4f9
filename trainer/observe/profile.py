"""Runs the profiler for some steps of the run, and writes its traces.

Open a trace in a browser at ui.perfetto.dev or with TensorBoard's profiler plugin; on an NPU with MindStudio Insight.
"""

from pathlib import Path
from typing import Any

from trainer.contract import PROFILE_FOLDER, TrainSpec
from trainer.device.device import Device


class ProfilerWindow:
    """Starts and stops this rank's profiler. Profiled steps are slower than others."""

    def __init__(self, spec: TrainSpec, device: Device, rank: int) -> None:
        profile = spec.profile
        wanted = profile.steps and (rank == 0 or profile.ranks == "all")
        self.first, self.end = profile.start, profile.start + profile.steps if wanted else profile.start
        self.folder, self.device, self.rank = Path(spec.output) / PROFILE_FOLDER, device, rank
        self.running: Any = None

    def before_step(self, step: int) -> None:
        """`step`: the next one to begin; after the last step, one more than that."""
        if self.running is None and self.first <= step < self.end:
            self.running = self._open()
            self.running.start()
        elif self.running is not None and step >= self.end:
            self.close()

    def close(self) -> None:
        """Write the trace, if the profiler is running."""
        running, self.running = self.running, None
        if running is not None:
            self.device.synchronize()
            running.stop()
            if self.rank == 0:
                print(f"the profiler's trace is in {self.folder}", flush=True)

    def _open(self) -> Any:
        api = self.device.profiler()
        kinds = dict.fromkeys(("CPU", self.device.name.upper()))
        return api.profile(
            activities=[getattr(api.ProfilerActivity, kind) for kind in kinds],
            on_trace_ready=api.tensorboard_trace_handler(str(self.folder), worker_name=f"rank-{self.rank:03d}"),
        )
