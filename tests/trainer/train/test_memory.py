"""What saves memory leaves the step as it was: offloading, chunks of the loss, gradient checkpointing. And float16, where a CPU is made to."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.conftest import cpu_adam_is_built
from tests.trainer.distributed.test_engine import one_step, steps_of
from trainer.contract import Lora, Precision, StageSpec, TrainSpec
from trainer.device.dtype import loading_dtype
from trainer.distributed.effective_config import read_effective_config
from trainer.distributed.engine import Engine, start_engine
from trainer.distributed.zero3 import partition_model
from trainer.models import find_family
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import apply_stage

pytestmark = pytest.mark.usefixtures("process_group")
HALF = Precision(name="fp16", weights="float16", compute="float16", optimizer="float32", gradients="float32", loss_scaling="dynamic")
LORA = StageSpec(name="lora", kind="train", trainable=("head",), lora=Lora(r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")))


@pytest.fixture
def after_steps() -> Iterator[Callable[..., tuple[Engine, list[float], dict[str, torch.Tensor]]]]:
    """An engine after three steps of a spec, their losses, and its weights in float32."""
    engines: list[Engine] = []

    def make(spec: TrainSpec) -> tuple[Engine, list[float], dict[str, torch.Tensor]]:
        family = find_family("llava")
        torch.manual_seed(spec.seed)
        model = family.create(spec.model).to(loading_dtype(spec.precision))
        if spec.gradient_checkpointing:
            checkpoint_layers(model, spec)
        model = apply_stage(model, spec, family.unused(model)).model
        if spec.partitioned:
            partition_model(model, spec, torch.device("cpu"))
        engine = start_engine(model, spec, torch.device("cpu"))
        engines.append(engine)
        engine.model.train()
        losses = [one_step(engine, batch, spec, step).loss for step, batch in zip(range(1, 4), steps_of(spec), strict=False)]
        return engine, losses, {name: tensor.detach().float().clone() for name, tensor in engine.gather_weights().items()}

    yield make
    for engine in engines:
        engine.handle.destroy()


def assert_near(one: tuple[Any, ...], other: tuple[Any, ...], bound: float) -> None:
    assert one[1] == pytest.approx(other[1], abs=1e-5)
    assert one[2].keys() == other[2].keys()
    assert max(float((one[2][name] - other[2][name]).abs().max()) for name in one[2]) < bound


@pytest.mark.parametrize(
    ("zero", "stage"),
    [(0, None), (2, None), pytest.param(3, None, marks=pytest.mark.slow), (3, LORA)],
    ids=["ZeRO 0", "ZeRO 2", "ZeRO 3", "ZeRO 3, LoRA"],
)
def test_a_loss_in_chunks_and_layers_computed_twice_are_the_same_steps(
    zero: int, stage: StageSpec | None, tiny_spec: Any, after_steps: Any
) -> None:
    """A head that trains inside peft's copy of it too."""
    changes = {"stage": stage} if stage else {}
    plain, saving = (tiny_spec(name, zero=zero, micro=8, changes=changes) for name in ("plain", "saving"))
    saving = replace(saving, loss_chunk=5, gradient_checkpointing=True, checkpoint_every=2, checkpoint_groups=("lm",))
    assert_near(after_steps(saving), after_steps(plain), 2e-5)


@pytest.mark.parametrize(("precision", "zero", "parameters"), [("fp32", 2, False), ("fp32", 3, True), ("bf16", 3, True)])
def test_offloaded_states_and_parameters_are_the_same_steps(
    precision: str, zero: int, parameters: bool, tiny_spec: Any, after_steps: Any
) -> None:
    if not cpu_adam_is_built():
        pytest.skip("DeepSpeed's cpu_adam is not built here, and compiling it takes minutes")
    plain, held = (tiny_spec(name, precision=precision, zero=zero, micro=4) for name in ("plain", "held"))
    keys = ("offload_optimizer", "offload_param") if parameters else ("offload_optimizer",)
    held.deepspeed["zero_optimization"].update({key: {"device": "cpu", "pin_memory": False} for key in keys})
    engine, *found = after_steps(held)
    taken = read_effective_config(engine)
    assert (taken["offload_optimizer"], taken["offload_parameters"]) == (True, parameters)
    bound = 2e-5 if precision == "fp32" else 2**-8  # one place of a bfloat16 between 1 and 2
    assert_near((engine, *found), after_steps(plain), bound)


def test_float16_trains_with_scaling_and_float32_masters(tiny_spec: Any, after_steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CPU kernels compute float16; DeepSpeed refuses it on a CPU without instructions for it, and so does conf/hardware/cpu.yaml."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    half = tiny_spec("half", zero=2, changes={"precision": HALF})
    half.deepspeed.update(fp16=scaling, data_types={"grad_accum_dtype": "fp32"})
    exact = tiny_spec("exact", zero=2)
    engine, losses, _ = after_steps(half)
    taken = read_effective_config(engine)
    assert (taken["weights"], taken["optimizer"], taken["loss_scaling"]) == ("float16", "float32", "dynamic")
    assert losses == pytest.approx(after_steps(exact)[1], abs=0.02)
    chunked = replace(tiny_spec("chunked", zero=2, changes={"precision": HALF}), loss_chunk=5, deepspeed=half.deepspeed)
    assert after_steps(chunked)[1] == pytest.approx(losses, abs=2e-3)
