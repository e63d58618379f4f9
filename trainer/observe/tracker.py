"""Where a reader may watch a run besides its own files: TensorBoard, W&B, SwanLab, MLflow, by one small interface.

Offline unless the run's environment says otherwise (WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI; keys as cluster.secrets). Rank 0
tells the trackers; metrics.jsonl and evaluations.jsonl stay the record, and nothing is ever read back from here.
"""

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from trainer.contract import METRICS_FILE, TRACKER_FOLDER, InputRefused, TrainSpec

PROJECT = "omnilaunch"
CLOSE_S = 60.0  # for what a tracker has not written yet when the run ends
FLUSH_S = 10  # TensorBoard's own 120 would show a run that is looked at two minutes late, and lose as much of one that is killed


@dataclass(frozen=True, kw_only=True)
class TrackerContext:
    """What a tracker is told of a run as it starts. `folder`: its own. `step`: the last one that is done, 0 at the beginning."""

    run_id: str
    folder: Path
    config: dict[str, Any]
    step: int
    environ: Mapping[str, str]


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps."""

    def samples(self, step: int, text: str) -> None:
        """Answers of an evaluation, a line each."""

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------------ one each


class TensorBoard:
    """Event files. What an earlier attempt wrote of steps that are done again is hidden from the reader."""

    def __init__(self, facts: TrackerContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(facts.folder), purge_step=facts.step + 1 if facts.step else None, flush_secs=FLUSH_S)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in facts.config.items()), facts.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, text: str) -> None:
        self.writer.add_text("samples", "\n".join(f"    {line}" for line in text.splitlines()), step)  # four blanks: no Markdown

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, facts: TrackerContext) -> None:
        import wandb

        self.run = wandb.init(
            project=facts.environ.get("WANDB_PROJECT", PROJECT),
            name=facts.run_id,
            group=facts.run_id,  # the attempts of a run: an offline one cannot be taken up again
            dir=str(facts.folder),
            mode=facts.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=facts.config,
            settings=wandb.Settings(console="off"),
        )
        self.table = wandb.Table

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, step: int, text: str) -> None:
        self.run.log({"samples": self.table(columns=["answer"], data=[[line] for line in text.splitlines()])}, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    def __init__(self, facts: TrackerContext) -> None:
        import swanlab

        self.api = swanlab
        swanlab.init(
            project=PROJECT,
            experiment_name=facts.run_id,
            logdir=str(facts.folder),
            mode=facts.environ.get("SWANLAB_MODE", "offline"),
            config=facts.config,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log(dict(values), step=step)

    def samples(self, step: int, text: str) -> None:
        self.api.log({"samples": self.api.Text(text)}, step=step)

    def close(self) -> None:
        self.api.finish()


class MlFlow:
    """Through its client, so that no global run is active. A database in a file, since the plain folder is on its way out of MLflow."""

    def __init__(self, facts: TrackerContext) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        uri = facts.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{facts.folder}/mlflow.db")
        local = uri.startswith("sqlite:")
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self.client.get_experiment_by_name(PROJECT)
        place = (facts.folder / "artifacts").as_uri() if local else None
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT, artifact_location=place)
        self.id = self.client.create_run(experiment, run_name=facts.run_id).info.run_id
        self.metric = Metric
        self.client.log_dict(self.id, facts.config, "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = time.time_ns() // 10**6
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now_ms, step) for name, value in values.items()])

    def samples(self, step: int, text: str) -> None:
        self.client.log_text(self.id, text, f"samples/step-{step:06d}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.id)


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """`package`: as pip knows it, `module`: as Python does."""

    package: str
    module: str
    open: Callable[[TrackerContext], Tracker]


TRACKERS = {
    "tensorboard": TrackerKind(package="tensorboard", module="tensorboard", open=TensorBoard),
    "wandb": TrackerKind(package="wandb", module="wandb", open=WeightsAndBiases),
    "swanlab": TrackerKind(package="swanlab", module="swanlab", open=SwanLab),
    "mlflow": TrackerKind(package="mlflow", module="mlflow", open=MlFlow),
}

# ------------------------------------------------------------------------------------------------------------------- all


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(TRACKERS[name].module) is not None


def refuse_missing(spec: TrainSpec) -> None:
    """Raises InputRefused for a tracker that is unknown, or that somebody asked for and whose package is not installed here."""
    for name in spec.trackers:
        if name not in TRACKERS:
            raise InputRefused(f"run.trackers: there is no tracker {name!r}; valid are {', '.join(TRACKERS)}")
        if spec.trackers_named and not is_installed(name):
            package = TRACKERS[name].package
            raise InputRefused(
                f"run.trackers: {name!r} needs the package {package}, which is not installed where the ranks run. Add it to the trainer's "
                f"packages and build the image again, or install it there with: pip install {package}; or leave it out of run.trackers."
            )


def choose_trackers(spec: TrainSpec) -> tuple[str, ...]:
    """Those of the run that are installed here; the others, which nobody asked for, are said and left out."""
    chosen = tuple(name for name in spec.trackers if is_installed(name))
    for name in spec.trackers:
        if name not in chosen:
            package = TRACKERS[name].package
            print(
                f"run.trackers: {name}, the default, is left out, since the package {package} is not installed where the ranks run. "
                f"{METRICS_FILE} has every row all the same. To have it: pip install {package} there; to ask for none: run.trackers=[]",
                flush=True,
            )
    return chosen


class TrackerThread:
    """A tracker in a thread of its own: neither a slow one nor a signal handler that it would set reaches the steps. One that raises is
    told once and hears no more: a run does not end because somebody cannot watch it."""

    def __init__(self, name: str, facts: TrackerContext) -> None:
        self.name, self.facts = name, facts
        self.waiting: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self.lost = False
        self.thread = threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        try:
            self.facts.folder.mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[self.name].open(self.facts)
            while (action := self.waiting.get()) is not None:
                action(tracker)
            tracker.close()
        except Exception as error:
            self.lost = True
            said = f"{type(error).__name__}: {error}"
            print(f"the tracker {self.name} has failed and hears no more of this run, which goes on: {said}", flush=True)

    def tell(self, action: Callable[[Tracker], None]) -> None:
        if not self.lost:
            self.waiting.put(action)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            print(f"the tracker {self.name} has not taken everything within {CLOSE_S:g} s and is left", flush=True)


class Trackers:
    """Every tracker of a run; on ranks that do not tell, none."""

    def __init__(self, listeners: tuple[TrackerThread, ...]) -> None:
        self.listeners = listeners

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for listener in self.listeners:
            listener.tell(lambda tracker: tracker.log(step, values))

    def samples(self, step: int, text: str) -> None:
        for listener in self.listeners:
            listener.tell(lambda tracker: tracker.samples(step, text))


@contextmanager
def open_trackers(spec: TrainSpec, config: dict[str, Any], environ: Mapping[str, str], *, step: int, tells: bool) -> Iterator[Trackers]:
    """Yields those trackers of spec.trackers that are installed, and closes them at the end, however it comes. `config`: what they show of
    the run."""
    folder = Path(spec.output) / TRACKER_FOLDER
    facts = {
        name: TrackerContext(run_id=spec.run_id, folder=folder / name, config=config, step=step, environ=environ)
        for name in (choose_trackers(spec) if tells else ())
    }
    audience = Trackers(tuple(TrackerThread(name, told) for name, told in facts.items()))
    try:
        yield audience
    finally:
        for listener in audience.listeners:
            listener.close()
