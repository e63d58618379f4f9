"""Every tracker with its real library, offline, where it is installed: the logged values are read back from its files."""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.contract import InputRefused, TrainSpec
from trainer.observe import tracker
from trainer.observe.tracker import TRACKERS, TrackerKind, open_trackers, refuse_missing

THIRD_PARTY = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
ANSWERS = '{"row": 1, "got": "7"}\n{"row": 2, "got": "3"}\n'


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: pip install {TRACKERS[module].package}")


def tell(spec: TrainSpec, name: str, *, first: int = 1, last: int = 3) -> Path:
    """Rows of some steps, and the answers of an evaluation. Returns the tracker's folder."""
    spec = replace(spec, trackers=(name,))
    with open_trackers(spec, {"seed": spec.seed, "stage.name": "full"}, {}, step=first - 1, writes=True) as trackers:
        for step in range(first, last + 1):
            trackers.log(step, {"loss": 1.0 / step, "evaluation/exact_match": 0.5})
        trackers.samples(last, ANSWERS)
    return Path(spec.output) / "tracker" / name


@needs("tensorboard")
@THIRD_PARTY  # of protobuf and of NumPy, by version
def test_tensorboard_reads_what_was_logged_and_a_resume_replaces_what_it_repeats(
    tiny_spec: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = tiny_spec()
    folder = tell(spec, "tensorboard")
    tell(spec, "tensorboard", first=3, last=4)
    reader = EventAccumulator(str(folder))
    reader.Reload()
    assert [(event.step, round(event.value, 4)) for event in reader.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    assert {"loss", "evaluation/exact_match"} <= set(reader.Tags()["scalars"])
    texts = {tag: [event.tensor_proto.string_val[0].decode() for event in reader.Tensors(tag)] for tag in reader.Tags()["tensors"]}
    assert '"got": "7"' in texts["samples/text_summary"][-1] and "stage.name: full" in texts["config/text_summary"][0]
    assert "has failed" not in capsys.readouterr().out


@needs("wandb")
@THIRD_PARTY
def test_wandb_writes_an_offline_run(tiny_spec: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tell(tiny_spec(), "wandb")
    (run,) = (folder / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    assert file.stat().st_size > 0 and b"exact_match" in file.read_bytes()
    assert list(run.rglob("samples_*.table.json"))
    assert "has failed" not in capsys.readouterr().out


@needs("swanlab")
@THIRD_PARTY
def test_swanlab_writes_an_offline_run_and_leaves_the_signals_alone(tiny_spec: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    folder = tell(tiny_spec(), "swanlab")
    assert signal.getsignal(signal.SIGINT) is before
    assert any('"got": "7"' in file.read_text() for file in folder.rglob("media/text/*.txt"))
    assert "has failed" not in capsys.readouterr().out


@needs("mlflow")
@THIRD_PARTY
def test_mlflow_reads_what_was_logged(tiny_spec: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    folder = tell(tiny_spec(), "mlflow")
    assert "has failed" not in capsys.readouterr().out
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("omnilaunch")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(m.step, round(m.value, 4)) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert run.info.status == "FINISHED"
    assert "7" in (folder / "artifacts" / run.info.run_id / "artifacts" / "samples" / "step-000003.txt").read_text()


# ------------------------------------------------------------------------------------------------------------ whatever it is


class Broken:
    """Raises at the second step."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def log(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError("No space left on device")

    def samples(self, *_: Any) -> None:
        pytest.fail("called again")

    def close(self) -> None:
        pytest.fail("called again")


class Slow:
    def __init__(self, *_: Any) -> None: ...

    def log(self, *_: Any) -> None:
        time.sleep(0.3)

    def close(self) -> None: ...


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Any:
    def know(name: str, kind: Any) -> None:
        monkeypatch.setitem(TRACKERS, name, TrackerKind(package=name, module="json", open=kind))

    return know


def test_a_tracker_that_raises_is_reported_once_and_ignored(tiny_spec: Any, known: Any, capsys: pytest.CaptureFixture[str]) -> None:
    known("broken", Broken)
    tell(tiny_spec(), "broken", last=5)
    printed = capsys.readouterr().out
    assert (
        printed.count("the tracker broken has failed and gets no more data of this run, which continues: OSError: No space left on device")
        == 1
    )


def test_one_that_cannot_be_opened_ends_no_run(tiny_spec: Any, known: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: Any) -> Any:
        raise RuntimeError("not logged in")

    known("closed", refuse)
    tell(tiny_spec(), "closed")
    assert "the tracker closed has failed" in capsys.readouterr().out


def test_a_slow_tracker_delays_no_step_and_is_abandoned_at_the_end(
    tiny_spec: Any, known: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known("slow", Slow)
    monkeypatch.setattr(tracker, "CLOSE_S", 0.1)
    spec = replace(tiny_spec(), trackers=("slow",))
    began = time.monotonic()
    with open_trackers(spec, {}, {}, step=0, writes=True) as trackers:
        for step in range(5):
            trackers.log(step, {"loss": 1.0})
        assert time.monotonic() - began < 0.3
    assert "the tracker slow has not written everything within 0.1 s and is abandoned" in capsys.readouterr().out


def test_ranks_that_do_not_tell_open_none(tiny_spec: Any, known: Any) -> None:
    known("never", lambda _: pytest.fail("opened"))
    spec = replace(tiny_spec(), trackers=("never",))
    with open_trackers(spec, {}, {}, step=0, writes=False) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert not (Path(spec.output) / "tracker").exists()


def test_an_unknown_or_missing_one_is_refused_with_what_to_do(tiny_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputRefused, match=r"run.trackers: there is no tracker 'visdom'; valid are tensorboard, wandb, swanlab, mlflow"):
        refuse_missing(replace(tiny_spec("a"), trackers=("visdom",)))
    monkeypatch.setitem(TRACKERS, "wandb", replace(TRACKERS["wandb"], module="nowhere_to_be_found"))
    with pytest.raises(InputRefused, match=r"'wandb' needs the package wandb, which is not installed.*pip install wandb"):
        refuse_missing(replace(tiny_spec("b"), trackers=("wandb",)))
    refuse_missing(tiny_spec("c"))


def test_one_that_is_only_the_default_and_missing_is_said_once_and_left_out(
    tiny_spec: Any, known: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", replace(TRACKERS["tensorboard"], module="nowhere_to_be_found"))
    logged: list[int] = []
    known("there", lambda _: SimpleNamespace(log=lambda step, _: logged.append(step), close=lambda: None))
    spec = replace(tiny_spec(), trackers=("tensorboard", "there"), trackers_named=False)
    refuse_missing(spec)
    for rank in range(2):
        with open_trackers(spec, {}, {}, step=0, writes=rank == 0) as trackers:
            trackers.log(1, {"loss": 1.0})
    printed = capsys.readouterr().out
    assert printed.count("tensorboard, the default, is left out, since the package tensorboard is not installed") == 1
    assert "metrics.jsonl has every row" in printed and "run.trackers=[]" in printed
    assert logged == [1], "the other trackers still get values"
    with pytest.raises(InputRefused, match=r"there is no tracker 'visdom'"):
        refuse_missing(replace(spec, trackers=("visdom",)))
