"""Steps that compute a non-finite value, in a layer and on a rank that the test chooses."""

import json
import math
import os
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import trainer.distributed.engine
from tests.trainer.mortal import Gone, run_ranks
from trainer.checkpoint.checkpoint import whole_checkpoints
from trainer.contract import CHECKPOINTS, Exit, FailureReport, Lora, StageSpec, TrainSpec, read
from trainer.data.rows.sample import Message, Sample
from trainer.tensor.stream import find_stored_tensors
from trainer.train.nonfinite import find_tensors, watch_modules
from trainer.train.steps import name_samples

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.05, targets=("q_proj", "v_proj")))
BAD_STEP = 3


class BreakGradient(torch.autograd.Function):
    """The same values, and gradients that are infinite."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.inf


def overflow(values: Tensor) -> Tensor:
    return values + math.inf


def break_last_rank(change: Callable[[Tensor], Tensor]) -> None:
    """From step BAD_STEP on the second block's MLP answers with changed values on the last rank."""
    before, forward, updates = trainer.distributed.engine.Engine.step, LlamaMLP.forward, [0]

    def step(engine: Any, lr: float) -> Any:
        updates[0] += 1
        return before(engine, lr)

    def broken(module: Any, hidden: Tensor) -> Tensor:
        values = forward(module, hidden)
        # While step n is under way, n - 1 updates have been called for; when it is done once more, n.
        last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        return change(values) if module.place == 1 and last and updates[0] >= BAD_STEP - 1 else values

    trainer.distributed.engine.Engine.step = step  # type: ignore[method-assign]
    LlamaMLP.forward = broken  # type: ignore[method-assign]
    number, made = LlamaMLP.__init__, [0]

    def create(module: Any, *arguments: Any, **named: Any) -> None:
        number(module, *arguments, **named)
        module.place, made[0] = made[0] % 2, made[0] + 1

    LlamaMLP.__init__ = create  # type: ignore[method-assign]


def break_forward() -> None:
    break_last_rank(overflow)


def break_backward() -> None:
    break_last_rank(BreakGradient.apply)  # type: ignore[arg-type]


def reported_message(spec: TrainSpec, gone: Gone) -> str:
    """The message of the rank that reported."""
    found = sorted(Path(spec.output).glob("failure-rank*.json"))
    assert found and Exit.RUN in gone.codes, gone.text
    report = read(FailureReport, found[0])
    assert report.kind == "RunFailed", gone.text
    return str(report.message)


CELLS: dict[str, tuple[dict[str, Any], StageSpec | None]] = {
    "fp32, no ZeRO, 1 rank": ({"precision": "fp32", "zero": 0}, None),
    "fp32, no ZeRO, LoRA, 2 ranks": ({"precision": "fp32", "zero": 0, "ranks": 2}, LORA),
    "bf16, ZeRO 2, 2 ranks": ({"precision": "bf16", "zero": 2, "ranks": 2, "accumulation": 2}, None),
    "pure_bf16, ZeRO 3, 2 ranks": ({"precision": "pure_bf16", "zero": 3, "ranks": 2}, None),
}


@pytest.mark.parametrize("cell", [pytest.param(name, marks=pytest.mark.slow if "bf16" in name else ()) for name in CELLS])
def test_the_layer_is_named_and_the_checkpoint_is_that_of_the_step_before(cell: str, tiny_spec: Any) -> None:
    arguments, stage = CELLS[cell]
    changes = {"steps": 4} | ({"stage": stage} if stage else {})
    quiet, bad = (
        tiny_spec(name, changes={**changes, "save_every": every}, **{"micro": 4, **arguments})
        for name, every in (("quiet", BAD_STEP - 1), ("bad", 0))
    )
    assert not any(run_ranks(quiet).codes)
    gone = run_ranks(bad, meddle=break_forward)
    message, last = reported_message(bad, gone), bad.device.world_size - 1
    assert f"step {BAD_STEP}: the loss is " in message and "has changed no weight" in message, gone.text
    assert f"on rank {last}, micro-batch 1: the output of " in message
    assert "language_model.layers.1.mlp (LlamaMLP)" in message
    assert f"Its samples: {bad.data.root}" in message
    name = f"step-{BAD_STEP - 1:06d}"
    assert f"The weights of step {BAD_STEP - 1} are in {CHECKPOINTS}/{name}." in message
    assert_same_checkpoint(*(Path(spec.output) / CHECKPOINTS / name for spec in (quiet, bad)))


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights, masters, moments, random numbers: all that a step could have touched."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for folders in ((one, other), (one / "resume", other / "resume")):
        first, second = (find_stored_tensors(folder) for folder in folders)
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[key].read_whole(), second[key].read_whole()) for key in first)
    rests = [json.loads((folder / "resume" / "rest.json").read_text()) for folder in (one, other)]
    assert rests[0] == rests[1]


def test_the_samples_of_a_step_are_named_by_their_own_files(tiny_spec: Any) -> None:
    spec = tiny_spec(micro=4)
    text = (Message(role="user", content="?"), Message(role="assistant", content="!"))
    made = [Sample(id="", images=(), messages=text, file=file, row=row) for file, row in (("b", 2), ("a", 7), ("b", 1), ("b", 2))]
    job: Any = types.SimpleNamespace(samples=made, processor=None, spec=spec)
    assert name_samples(job, 1) == "b rows 1, 2, 2; a rows 7"


def test_a_gradient_is_found_where_every_value_is_finite(tiny_spec: Any) -> None:
    bad = tiny_spec(changes={"steps": 4}, micro=4, ranks=2, precision="bf16", zero=1)
    message = reported_message(bad, run_ranks(bad, meddle=break_backward))
    assert f"step {BAD_STEP}: the loss is " in message and "the loss is nan" not in message
    assert "on rank 1, micro-batch 1: the gradient of the output of model.language_model.layers.1.mlp." in message
    assert [state.step for state in whole_checkpoints(Path(bad.output))] == [BAD_STEP - 1]


def test_weights_that_one_step_has_blown_up_fail_in_the_next(tiny_spec: Any) -> None:
    bad = tiny_spec(changes={"steps": 2})
    bad = replace(bad, optimizer=replace(bad.optimizer, lr=1e30))  # step 1 breaks the weights of step 2
    message = reported_message(bad, run_ranks(bad))
    assert "step 2: the loss is nan" in message and "in checkpoints/step-000001" in message


def test_what_is_watched_is_told_once_and_masks_may_be_infinite() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden: Tensor = self.one(values)
            return self.two(hidden / hidden.detach().mul(0) if attention_mask is None else hidden)  # type: ignore[no-any-return]

    block = Block()
    with watch_modules(block) as watch:
        block(torch.ones(1, 2), attention_mask=torch.full((1,), -math.inf)).sum().backward()
    assert watch.first == "" and watch.micro == 1
    with watch_modules(block) as watch:
        block(torch.ones(1, 2))
    assert watch.first == "micro-batch 1: the input of two (Linear)"
    with torch.no_grad():
        block.one.weight.fill_(math.nan)
    with watch_modules(block) as watch:
        block(torch.ones(1, 2), attention_mask=torch.zeros(1))
    assert watch.first == "micro-batch 1: the output of one (Linear), whose own weight is not finite"
    assert not block._forward_hooks and not block.one._forward_hooks
    assert [len(t) for t in find_tensors({"a": (torch.ones(3), torch.ones(2, dtype=torch.int64)), "b": [None, "text"]})] == [3]
