"""Trackers that show a run while it trains: TensorBoard, W&B, SwanLab, MLflow, behind one small interface.

Offline unless the run's environment says otherwise (WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI; keys as cluster.secrets). Rank 0 writes to
the trackers; metrics.jsonl and evaluations.jsonl stay the record, and nothing is ever read back from a tracker.
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
CLOSE_S = 60.0  # for what a tracker still has to write when the run ends
FLUSH_S = 10  # TensorBoard's default of 120 shows a run two minutes late, and loses as much of a killed run


@dataclass(frozen=True, kw_only=True)
class TrackerContext:
    """What a tracker gets when a run starts. `folder`: its own. `step`: the last finished step, 0 at the beginning."""

    run_id: str
    folder: Path
    config: dict[str, Any]
    step: int
    environ: Mapping[str, str]


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values after this many steps."""

    def samples(self, step: int, text: str) -> None:
        """Answers of an evaluation, one per line."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files. Values that an earlier attempt wrote for repeated steps are hidden from the reader."""

    def __init__(self, context: TrackerContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(context.folder), purge_step=context.step + 1 if context.step else None, flush_secs=FLUSH_S)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in context.config.items()), context.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, text: str) -> None:
        self.writer.add_text("samples", "\n".join(f"    {line}" for line in text.splitlines()), step)  # indented: not Markdown

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, context: TrackerContext) -> None:
        import wandb

        self.run = wandb.init(
            project=context.environ.get("WANDB_PROJECT", PROJECT),
            name=context.run_id,
            group=context.run_id,  # the attempts of a run: an offline one cannot be resumed
            dir=str(context.folder),
            mode=context.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=context.config,
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
    def __init__(self, context: TrackerContext) -> None:
        import swanlab

        self.api = swanlab
        swanlab.init(
            project=PROJECT,
            experiment_name=context.run_id,
            logdir=str(context.folder),
            mode=context.environ.get("SWANLAB_MODE", "offline"),
            config=context.config,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log(dict(values), step=step)

    def samples(self, step: int, text: str) -> None:
        self.api.log({"samples": self.api.Text(text)}, step=step)

    def close(self) -> None:
        self.api.finish()


class MlFlow:
    """Uses the client, so that no global run is active. The database is a file, since MLflow is about to drop plain folders."""

    def __init__(self, context: TrackerContext) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        uri = context.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{context.folder}/mlflow.db")
        local = uri.startswith("sqlite:")
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self.client.get_experiment_by_name(PROJECT)
        artifacts = (context.folder / "artifacts").as_uri() if local else None
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT, artifact_location=artifacts)
        self.id = self.client.create_run(experiment, run_name=context.run_id).info.run_id
        self.metric = Metric
        self.client.log_dict(self.id, context.config, "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = time.time_ns() // 10**6
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now_ms, step) for name, value in values.items()])

    def samples(self, step: int, text: str) -> None:
        self.client.log_text(self.id, text, f"samples/step-{step:06d}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.id)


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """`package`: name for pip; `module`: name for import."""

    package: str
    module: str
    open: Callable[[TrackerContext], Tracker]


TRACKERS = {
    "tensorboard": TrackerKind(package="tensorboard", module="tensorboard", open=TensorBoard),
    "wandb": TrackerKind(package="wandb", module="wandb", open=WeightsAndBiases),
    "swanlab": TrackerKind(package="swanlab", module="swanlab", open=SwanLab),
    "mlflow": TrackerKind(package="mlflow", module="mlflow", open=MlFlow),
}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(TRACKERS[name].module) is not None


def refuse_missing(spec: TrainSpec) -> None:
    """Raises InputRefused for an unknown tracker, and for one that the user named whose package is not installed here."""
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
    """The run's trackers that are installed here; default trackers that are not are reported and left out."""
    chosen = tuple(name for name in spec.trackers if is_installed(name))
    for name in spec.trackers:
        if name not in chosen:
            package = TRACKERS[name].package
            print(
                f"run.trackers: {name}, the default, is left out, since the package {package} is not installed where the ranks run. "
                f"{METRICS_FILE} has every row in any case. To use it: pip install {package} there; to have no tracker: run.trackers=[]",
                flush=True,
            )
    return chosen


class TrackerThread:
    """Runs a tracker in its own thread, so that a slow one, or a signal handler that it sets, does not affect the steps. A tracker that raises
    is reported once and then ignored: a run does not end because it cannot be shown."""

    def __init__(self, name: str, context: TrackerContext) -> None:
        self.name, self.context = name, context
        self.waiting: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self.lost = False
        self.thread = threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        try:
            self.context.folder.mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[self.name].open(self.context)
            while (action := self.waiting.get()) is not None:
                action(tracker)
            tracker.close()
        except Exception as error:
            self.lost = True
            reason = f"{type(error).__name__}: {error}"
            print(f"the tracker {self.name} has failed and gets no more data of this run, which continues: {reason}", flush=True)

    def post(self, action: Callable[[Tracker], None]) -> None:
        if not self.lost:
            self.waiting.put(action)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            print(f"the tracker {self.name} has not written everything within {CLOSE_S:g} s and is abandoned", flush=True)


class Trackers:
    """Every tracker of a run; none on ranks other than 0."""

    def __init__(self, threads: tuple[TrackerThread, ...]) -> None:
        self.threads = threads

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for thread in self.threads:
            thread.post(lambda tracker: tracker.log(step, values))

    def samples(self, step: int, text: str) -> None:
        for thread in self.threads:
            thread.post(lambda tracker: tracker.samples(step, text))


@contextmanager
def open_trackers(spec: TrainSpec, config: dict[str, Any], environ: Mapping[str, str], *, step: int, writes: bool) -> Iterator[Trackers]:
    """Yields those of spec.trackers that are installed, and closes them at the end, also after an error. `config`: shown with the run."""
    folder = Path(spec.output) / TRACKER_FOLDER
    contexts = {
        name: TrackerContext(run_id=spec.run_id, folder=folder / name, config=config, step=step, environ=environ)
        for name in (choose_trackers(spec) if writes else ())
    }
    trackers = Trackers(tuple(TrackerThread(name, context) for name, context in contexts.items()))
    try:
        yield trackers
    finally:
        for thread in trackers.threads:
            thread.close()
