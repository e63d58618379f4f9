import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.contract import RunFailed, StepRow, TrainSpec, write
from trainer.data.batch.load import batches
from trainer.data.check import resolve
from trainer.data.rows.sample import read_samples
from trainer.device.dtype import loading_dtype
from trainer.distributed.effective_config import read_effective_config
from trainer.distributed.engine import IGNORED, Engine, start_engine
from trainer.distributed.zero3 import partition_model
from trainer.models import find_family
from trainer.stages.group import apply_stage
from trainer.train.loop import StepRequests, train_step
from trainer.train.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def start() -> Iterator[Callable[[TrainSpec], Engine]]:
    """An engine over the random model of a spec; ended after the test."""
    engines: list[Engine] = []

    def make(spec: TrainSpec) -> Engine:
        family = find_family("llava")
        torch.manual_seed(spec.seed)
        model = family.create(spec.model).to(loading_dtype(spec.precision))
        model = apply_stage(model, spec, family.unused(model)).model
        if spec.partitioned:
            partition_model(model, spec, torch.device("cpu"))
        engines.append(start_engine(model, spec, torch.device("cpu")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.handle.destroy()


def steps_of(spec: TrainSpec) -> Iterator[tuple[dict[str, torch.Tensor], ...]]:
    places = resolve(spec.data)
    assert places.train
    samples, _ = read_samples(places.train, places.images)
    return batches(samples, find_family("llava").create_processor(spec.model), spec, rank=0, first_step=0)


def one_step(engine: Engine, batch: tuple[dict[str, torch.Tensor], ...], spec: TrainSpec, step: int = 1) -> StepRow:
    watchdog = Watchdog(timeout_s=0, rank=0, stream=sys.stderr, end=pytest.fail)
    row, _ = train_step(engine, batch, spec, step, own_requests=StepRequests, watchdog=watchdog, peak_bytes=0)
    return row


def losses(engine: Engine, spec: TrainSpec) -> list[float]:
    rows = [one_step(engine, batch, spec, step) for step, batch in enumerate(steps_of(spec), start=1)]
    assert not any(row.skipped for row in rows)
    return [row.loss for row in rows]


CELLS = [
    ("fp32", 0),
    ("fp32", 1),
    ("fp32", 2),
    ("fp32", 3),
    ("bf16", 1),
    ("bf16", 2),
    ("bf16", 3),
    ("pure_bf16", 1),
    ("pure_bf16", 2),
    ("pure_bf16", 3),
]


@pytest.mark.parametrize(("precision", "zero"), CELLS)
def test_every_precision_and_stage_is_taken_as_planned_and_learns(precision: str, zero: int, tiny_spec: Any, start: Any) -> None:
    spec = tiny_spec(precision=precision, zero=zero, micro=4, accumulation=2)
    engine = start(spec)
    seen = losses(engine, spec)
    assert seen[-1] < seen[0] - 0.2
    taken = read_effective_config(engine)
    assert (taken["zero_stage"], taken["weights"], taken["optimizer"]) == (zero, spec.precision.weights, spec.precision.optimizer)


def test_the_loss_is_that_of_transformers(tiny_spec: Any, start: Any) -> None:
    spec = tiny_spec()
    engine = start(spec)
    (batch,) = next(steps_of(spec))
    engine.model.eval()
    with torch.no_grad():
        theirs = engine.model(**batch).loss * (batch["labels"][:, 1:] != IGNORED).sum()
        assert float(engine.loss_sum(batch)) == pytest.approx(float(theirs), rel=1e-6)


def test_a_batch_in_four_parts_is_the_same_step(tiny_spec: Any, start: Any) -> None:
    whole, parts = tiny_spec("whole", micro=8), tiny_spec("parts", micro=2, accumulation=4)
    first, second = start(whole), start(parts)
    assert losses(first, whole) == pytest.approx(losses(second, parts), abs=1e-6)
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-5


def test_answers_of_unequal_length_weigh_by_their_tokens(tiny_spec: Any, start: Any) -> None:
    """Means of means would give the two parts equal weight."""
    spec = tiny_spec(micro=8)
    (batch,) = next(steps_of(spec))
    batch["labels"][:4] = torch.where(batch["labels"][:4] == batch["labels"][:4].max(), batch["labels"][:4], IGNORED)  # the end mark alone
    halves = tuple({key: value[part] for key, value in batch.items()} for part in (slice(0, 4), slice(4, 8)))
    counts = [int((half["labels"] != IGNORED).sum()) for half in halves]
    assert counts[0] != counts[1]
    one = one_step(start(spec), (batch,), spec)
    two_spec = tiny_spec("two", micro=4, accumulation=2)
    two = one_step(start(two_spec), halves, two_spec)
    assert two.loss == pytest.approx(one.loss, abs=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, abs=1e-5)


@pytest.mark.parametrize("zero", [0, 2])
def test_the_norm_is_told_before_clipping(zero: int, tiny_spec: Any, start: Any) -> None:
    spec = tiny_spec(zero=zero)
    clipped = replace(spec, optimizer=replace(spec.optimizer, clip_norm=1e-3), deepspeed={**spec.deepspeed, "gradient_clipping": 1e-3})
    batch = next(steps_of(spec))
    free, bound = one_step(start(spec), batch, spec), one_step(start(clipped), batch, clipped)
    assert free.grad_norm > 1
    assert bound.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, None),
        ({"gradient_clipping": 0.0}, "gradient_clipping: planned 1.0, the engine has 0.0"),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, "train_batch_size: planned 8, the engine has 16"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "weights: planned 'float32', the engine has 'bfloat16'"),
    ],
)
def test_another_config_than_planned_is_refused(changes: dict[str, Any], said: str | None, tiny_spec: Any, start: Any) -> None:
    spec = tiny_spec()
    spec = replace(spec, deepspeed={**spec.deepspeed, **changes})
    if said is None:
        assert read_effective_config(start(spec))["zero_stage"] == 2
        return
    with pytest.raises(RunFailed, match="DeepSpeed does not use the planned config") as refused:
        start(spec)
    assert said in str(refused.value)


def test_decay_is_for_matrices_alone(tiny_spec: Any, start: Any) -> None:
    spec = tiny_spec()
    spec = replace(spec, optimizer=replace(spec.optimizer, weight_decay=0.1))
    for group in start(spec).handle.basic_optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_no_op_is_compiled_where_none_is_prebuilt() -> None:
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    assert installed_ops["deepspeed_shm_comm"] or deepspeed.ops.__compatible_ops__ == {}


ZERO_RUN = """
import sys
from pathlib import Path
import torch
from trainer.contract import TrainSpec, read
from trainer.distributed.engine import start_distributed, start_engine
from trainer.models import find_family
from trainer.stages.group import apply_stage
spec = read(TrainSpec, Path(sys.argv[1]))
start_distributed(spec.device)
model = find_family("llava").create(spec.model)
start_engine(apply_stage(model, spec, frozenset()).model, spec, torch.device("cpu"))
print("muon" if "deepspeed.runtime.zero.muon.original_muon" in sys.modules else "", "compiler" if "torch._inductor.compile_fx" in sys.modules else "")
"""


@pytest.mark.slow
def test_the_compiler_of_torch_is_not_loaded(tiny_spec: Any, tmp_path: Any) -> None:
    """DeepSpeed asks for it with its Muon optimizer, which it loads with ZeRO: a second of every rank's start, and with Triton processes."""
    spec = tiny_spec(zero=2)
    write(spec, tmp_path / "spec.json")
    free = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        (sys.executable, "-c", ZERO_RUN, str(tmp_path / "spec.json")), env=free | place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == ["muon"], done.stdout
