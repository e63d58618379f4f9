"""Shares and buffers of a rank, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import make_spec
from trainer.contract import TrainSpec
from trainer.memory_model.sharding import LIVE_WEIGHTS, REDUCE_BUCKET, Sharding, shard_step

WIDTH = 1000
MATRIX, BIAS = WIDTH * WIDTH, WIDTH


@pytest.fixture
def model() -> torch.nn.Module:
    """A matrix and a bias that train, and as much that does not, in bfloat16: 2 x 1,001,000 elements."""
    layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)).bfloat16()
    layers[0].requires_grad_(False)
    return layers


def spec_of(folder: Path, stage: int, *, precision: str = "bf16", accelerator: str = "cuda", **zero: object) -> TrainSpec:
    spec = make_spec(folder, folder, precision=precision, ranks=4)
    device = replace(spec.device, accelerator=accelerator)
    return replace(spec, device=device, deepspeed={**spec.deepspeed, "zero_optimization": {"stage": stage, **zero}})


@pytest.mark.parametrize(
    ("stage", "weights", "standing", "arriving", "way"),  # bytes of a trained element's gradients, over 4 ranks
    ((1, 1.0, 4, 0, "kept"), (2, 1.0, 0, 1, "moved"), (3, 0.25, 1, 0, "moved")),
)
def test_what_each_stage_divides(
    model: torch.nn.Module, tmp_path: Path, stage: int, weights: float, standing: int, arriving: int, way: str
) -> None:
    found, trained = shard_step(model, spec_of(tmp_path, stage)), MATRIX + BIAS
    assert found.shares == {"weights": weights} and found.trainable == trained
    assert found.optimizer_bytes == 12 * trained // 4  # two moments and a master, float32
    assert (found.buffer_bytes, found.late_buffer_bytes, found.gradient_handling) == (standing * trained, arriving * trained, way)
    norm = 8 * MATRIX // 4  # of a slice, in float64
    assert found.update_bytes == {1: 0, 2: norm, 3: norm}[stage]  # the flat copy of ZeRO 3 is half as large
    assert found.gathered_bytes == (2 * 2 * trained if stage == 3 else 0)  # fewer than LIVE_WEIGHTS: all of them


def test_gradients_of_an_earlier_micro_batch_stand(model: torch.nn.Module, tmp_path: Path) -> None:
    def found(stage: int, precision: str) -> tuple[int, str]:
        spec = spec_of(tmp_path, stage, precision=precision)
        sharding = shard_step(model, replace(spec, batch=replace(spec.batch, accumulation=2)))
        return sharding.buffer_bytes // (MATRIX + BIAS), sharding.gradient_handling

    assert [found(0, "fp32"), found(1, "bf16"), found(2, "bf16")] == [(4, "moved"), (6, "moved"), (1, "moved")]


def test_buckets(model: torch.nn.Module, tmp_path: Path) -> None:
    def bucket(*args: int, **more: object) -> tuple[int, int]:
        found = shard_step(model, spec_of(tmp_path, *args, **more))  # type: ignore[arg-type]
        return found.bucket_bytes, found.reduction_bytes

    trained = MATRIX + BIAS
    assert bucket(1) == (0, 6 * MATRIX)  # BF16_Optimizer copies its largest group, and rounds the copy
    assert bucket(1, precision="fp32") == (4 * REDUCE_BUCKET, 0)
    assert bucket(2) == (2 * REDUCE_BUCKET, 2 * trained + 4 * MATRIX // 4)
    assert bucket(2, overlap_comm=True, reduce_bucket_size=1000) == (2 * 2 * 1000, 2 * 1000 + 4 * MATRIX // 4)
    assert bucket(0, precision="fp32") == (0, 4 * trained)  # all gradients, since they are fewer than a bucket's
    assert bucket(3, reduce_bucket_size=1000) == (2000, 2000)


def test_offloading_moves_to_the_host(model: torch.nn.Module, tmp_path: Path) -> None:
    found = shard_step(model, spec_of(tmp_path, 3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}))
    assert found.shares == {"weights": 0} and found.optimizer_bytes == found.update_bytes == found.buffer_bytes == 0
    assert found.host_bytes == (12 + 4) * (MATRIX + BIAS) // 4 + 2 * 2 * (MATRIX + BIAS) // 4


def test_moments_in_eight_bits(model: torch.nn.Module, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 2)
    found = shard_step(model, replace(spec, optimizer=replace(spec.optimizer, state_bits=8)))
    slice_of = (MATRIX + BIAS) // 4
    assert found.optimizer_bytes == 2 * (slice_of + 4 * -(-slice_of // 256)) + 4 * slice_of


def test_an_accelerator_without_a_fused_kernel_makes_denominators(model: torch.nn.Module, tmp_path: Path) -> None:
    fused, foreach = (shard_step(model, spec_of(tmp_path, 1, accelerator=name)).update_bytes for name in ("cuda", "npu"))
    assert foreach - fused == 4 * MATRIX // 4


def test_live_weights_are_bounded(model: torch.nn.Module, tmp_path: Path) -> None:
    found = shard_step(model, spec_of(tmp_path, 3, stage3_max_live_parameters=10))
    assert found.gathered_bytes == 2 * (MATRIX + BIAS)  # the largest module has more than that
    assert LIVE_WEIGHTS > 2 * (MATRIX + BIAS) and isinstance(found, Sharding)
