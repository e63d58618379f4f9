"""Masters, moments and the rest, taken out of one engine and put into another."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import cpu_adam_is_built
from trainer.checkpoint import checkpoint
from trainer.checkpoint.state import (
    MASTER,
    full_state_bytes,
    read_scaler,
    restore_state,
    state_bytes,
    weights_bytes,
    write_state,
)
from trainer.contract import InputRefused, Precision, TrainSpec
from trainer.data.batch.load import batches
from trainer.data.check import resolve
from trainer.data.rows.sample import read_samples
from trainer.device.dtype import DTYPES, loading_dtype
from trainer.device.rng import read_rng_state, set_rng_state
from trainer.distributed.engine import Engine, start_engine
from trainer.models import find_family
from trainer.stages.group import apply_stage
from trainer.tensor import shard
from trainer.tensor.stream import find_stored_tensors
from trainer.train.loop import StepRequests, train_step
from trainer.train.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("process_group")
CELLS = [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 3), ("pure_bf16", 2), ("pure_bf16", 3)]


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """An engine over the random model of a spec, or one with the given weights; ended after the test."""
    engines: list[Engine] = []

    def make(spec: TrainSpec, weights: dict[str, torch.Tensor] | None = None) -> Engine:
        family = find_family("llava")
        torch.manual_seed(spec.seed)
        model = family.create(spec.model).to(loading_dtype(spec.precision))
        staged = apply_stage(model, spec, family.unused(model))
        if weights:
            staged.model.load_state_dict(weights)
        engines.append(start_engine(staged.model, spec, torch.device("cpu")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.handle.destroy()


def train(engine: Engine, spec: TrainSpec, steps: range) -> list[float]:
    """The loss of each of these steps (from 1)."""
    places = resolve(spec.data)
    samples, _ = read_samples(places.train, places.images)  # type: ignore[arg-type]
    source = batches(samples, find_family("llava").create_processor(spec.model), spec, rank=0, first_step=steps.start - 1)
    watchdog = Watchdog(timeout_s=0, rank=0, stream=sys.stderr, end=pytest.fail)
    done = (train_step(engine, next(source), spec, step, own_requests=StepRequests, watchdog=watchdog, peak_bytes=0) for step in steps)
    return [row.loss for row, _ in done]


def weights_of(engine: Engine) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in engine.gather_weights().values()]


def assert_goes_on(spec: TrainSpec, start: Any, folder: Path) -> None:
    first = start(spec)
    train(first, spec, range(1, 3))
    assert write_state(first, folder, writers=1) == ""
    saved = {name: tensor.clone() for name, tensor in first.gather_weights().items()}
    losses, weights = train(first, spec, range(3, 5)), weights_of(first)
    second = start(spec, saved)
    restore_state(second, folder, seed=0, step=2, world_size=1)
    assert train(second, spec, range(3, 5)) == losses
    assert all(torch.equal(a, b) for a, b in zip(weights_of(second), weights, strict=True))
    bare = start(spec, saved)  # weights without moments are not enough: the comparison above can fail
    assert train(bare, spec, range(3, 5))[1] != losses[1]


@pytest.mark.parametrize(("precision", "zero"), CELLS)
def test_an_engine_goes_on_bit_for_bit_where_another_one_was(precision: str, zero: int, tiny_spec: Any, start: Any, tmp_path: Path) -> None:
    assert_goes_on(tiny_spec(precision=precision, zero=zero, micro=4), start, tmp_path)


@pytest.mark.parametrize(("precision", "zero"), CELLS)
def test_tensors_are_whole_and_named_by_parameter(precision: str, zero: int, tiny_spec: Any, start: Any, tmp_path: Path) -> None:
    spec = tiny_spec(precision=precision, zero=zero, micro=4)
    engine = start(spec)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.model.named_parameters() if p.requires_grad}
    train(engine, spec, range(1, 2))
    write_state(engine, tmp_path, writers=1)
    stored = find_stored_tensors(tmp_path)
    assert {entry: tensor.shape for entry, tensor in stored.items()} == {
        f"{key}/{name}": shape for name, shape in shapes.items() for key in (MASTER, "exp_avg", "exp_avg_sq")
    }
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[spec.precision.optimizer]}
    assert sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in stored.values()) == state_bytes(engine)
    rest = json.loads((tmp_path / "rest.json").read_text())
    assert rest["optimizer_steps"] == dict.fromkeys(shapes, 1) and rest["loss_scaler"] == {} and len(rest["random"]) == 1


@pytest.mark.long  # DeepSpeed compiles its Adam for it
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 1), ("bf16", 2), ("pure_bf16", 3)])
def test_an_offloaded_optimizer_goes_on_too(precision: str, zero: int, tiny_spec: Any, start: Any, tmp_path: Path) -> None:
    if not cpu_adam_is_built():
        pytest.skip("DeepSpeed's cpu_adam is not built here, and compiling it takes minutes")
    spec = tiny_spec(precision=precision, zero=zero, micro=4)
    spec.deepspeed["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    spec = replace(spec, precision=replace(spec.precision, rounding="nearest"))  # DeepSpeedCPUAdam knows no other
    assert_goes_on(spec, start, tmp_path)


def test_the_loss_scale_goes_on(tiny_spec: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved while the scale was still falling, before the first update; DeepSpeed refuses fp16 on a CPU, which computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    fp16 = Precision(name="fp16", weights="float16", compute="float16", optimizer="float32", gradients="float32", loss_scaling="dynamic")
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 1}
    spec = tiny_spec(zero=1, changes={"steps": 8, "precision": fp16})
    spec.deepspeed.update(fp16=scaling, data_types={"grad_accum_dtype": "fp32"})
    first = start(spec)
    train(first, spec, range(1, 3))
    assert write_state(first, tmp_path, writers=1) == ""
    rest = json.loads((tmp_path / "rest.json").read_text())
    assert rest["optimizer_steps"] == {} and rest["loss_scaler"]["last_overflow_iter"] == 1
    saved = {name: tensor.clone() for name, tensor in first.gather_weights().items()}
    losses = train(first, spec, range(3, 9))
    second = start(spec, saved)
    restore_state(second, tmp_path, seed=0, step=2, world_size=1)
    assert train(second, spec, range(3, 9)) == losses
    assert read_scaler(second) == read_scaler(first) != rest["loss_scaler"]
    assert losses[-1] < losses[0]


def test_other_parameters_are_refused(tiny_spec: Any, start: Any, tmp_path: Path) -> None:
    spec = tiny_spec()
    write_state(start(spec), tmp_path, writers=1)
    other = start(tiny_spec("other", changes={"stage": replace(spec.stage, trainable=("projector",))}))
    with pytest.raises(InputRefused, match="was saved with other trained parameters than this stage has, as "):
        restore_state(other, tmp_path, seed=0, step=0, world_size=1)


def test_random_numbers_of_another_kind_of_device_begin_anew(
    tiny_spec: Any, start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = start(tiny_spec())
    write_state(engine, tmp_path, writers=1)
    rest = json.loads((tmp_path / "rest.json").read_text())
    assert rest["random"][0]["accelerator"] == "cpu"
    restore_state(engine, tmp_path, seed=0, step=2, world_size=1)
    same, said = torch.rand(3), capsys.readouterr().out
    rest["random"][0]["accelerator"] = "npu"
    (tmp_path / "rest.json").write_text(json.dumps(rest))
    restore_state(engine, tmp_path, seed=0, step=2, world_size=1)
    assert "the checkpoint was saved on npu, this is cpu: equal up to rounding" in capsys.readouterr().out and said == ""
    assert not torch.equal(torch.rand(3), same)


def test_a_disk_that_is_too_small_for_the_run_is_said_before_the_first_step(
    tiny_spec: Any, start: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(precision="bf16", zero=1, micro=4, changes={"save_every": 2})
    engine = start(spec)
    expected = full_state_bytes(engine)
    train(engine, spec, range(1, 2))
    assert state_bytes(engine) == expected == full_state_bytes(engine)
    assert weights_bytes(engine) == sum(tensor.numel() * tensor.element_size() for _, tensor in engine.model.named_parameters())
    capsys.readouterr()  # DeepSpeed has spoken
    checkpoint.warn_if_disk_is_small(engine, spec)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(checkpoint, "MARGIN_BYTES", 2**60)
    checkpoint.warn_if_disk_is_small(engine, replace(spec, save_every=0))
    assert capsys.readouterr().out == ""
    checkpoint.warn_if_disk_is_small(engine, spec)
    assert "GiB free, and 3 more checkpoints need" in capsys.readouterr().out


def test_random_numbers_go_on(tiny_spec: Any, start: Any) -> None:
    import random

    import numpy

    engine = start(tiny_spec())
    random.gauss(0, 1), numpy.random.standard_normal()  # both keep a second number for the next call
    states = json.loads(json.dumps([read_rng_state(engine.device)]))[0]
    drawn = [(random.gauss(0, 1), numpy.random.standard_normal(), torch.rand(3).tolist()) for _ in range(3)]
    set_rng_state(states, engine.device)
    assert [(random.gauss(0, 1), numpy.random.standard_normal(), torch.rand(3).tolist()) for _ in range(3)] == drawn


# ----------------------------------------------------------------------------------------------------------------- shards


def test_shards_are_bounded_and_a_tensor_is_read_in_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_BYTES", 100)
    tensors = {f"t{n}": torch.arange(n * 10, dtype=torch.float32).view(n, 10).to(torch.bfloat16) for n in range(1, 8)}
    shards = shard.ShardWriter(tmp_path, "state-000")
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.flush()
    assert shards.problem == "" and len(list(tmp_path.glob("state-000-*.safetensors"))) == 6  # 20 + 40, 60, 80, 100, 120, 140 bytes
    stored = find_stored_tensors(tmp_path)
    assert all(torch.equal(stored[name].read_whole(), tensor) for name, tensor in tensors.items())
    assert torch.equal(stored["t4"].read(13, 5), tensors["t4"].view(-1)[13:18])
    assert stored["t4"].read(40, 0).shape == (0,)


def test_a_full_disk_is_said_and_the_writer_goes_on_taking_tensors(tmp_path: Path) -> None:
    shards = shard.ShardWriter(tmp_path / "nowhere", "state-000")
    for name in ("a", "b"):
        shards.add(name, torch.zeros(4))
        shards.flush()
    assert "No such file" in shards.problem and shards.waiting == {}
