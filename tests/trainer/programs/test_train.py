"""Complete runs under torchrun, as the launcher starts them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tests.trainer.mortal import result_of
from trainer.checkpoint.best import read_evaluations
from trainer.contract import EnvReport, Evaluation, Exit, FailureReport, Lora, Source, StageSpec, StepRow, TrainSpec, read

LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.05, targets=("q_proj", "v_proj")))
EVALUATE = StageSpec(name="evaluate", kind="evaluate", trainable=())


def rows_of(spec: TrainSpec) -> list[StepRow]:
    return [StepRow(**json.loads(line)) for line in (Path(spec.output) / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[StepRow]) -> list[StepRow]:
    return [replace(row, seconds=0.0, peak_bytes=0) for row in rows]


@pytest.mark.slow
def test_a_run_leaves_everything_that_a_record_needs_and_repeats_bit_for_bit(tiny_spec: Any, torchrun: Any) -> None:
    first, again, other = (tiny_spec(name, changes={"seed": seed, "deterministic": True}) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for spec in (first, again, other):
        ended = torchrun(spec)
        assert ended.code == 0, ended.text
    assert [row.step for row in rows_of(first)] == [1, 2, 3, 4]
    assert untimed(rows_of(first)) == untimed(rows_of(again)) != untimed(rows_of(other))
    result = result_of(first)
    assert result.weights_sha256 == result_of(again).weights_sha256 != result_of(other).weights_sha256
    assert (result.status, result.steps, result.checkpoint, result.evaluation["count"]) == ("finished", 4, "checkpoints/step-000004", 24.0)
    assert result.final_loss == rows_of(first)[-1].loss
    folder = Path(first.output)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 24
    last = read_evaluations(folder)[4]
    assert (last.exact_match, last.count) == (result.evaluation["exact_match"], 24), "also logged to trackers"
    LlavaForConditionalGeneration.from_pretrained(folder / result.checkpoint)
    LlavaProcessor.from_pretrained(folder / result.checkpoint)
    report = read(EnvReport, folder / "environment.json")
    assert report.packages["torch"] and report.packages["deepspeed"]
    assert sum(report.parameters.values()) > sum(report.trainable.values()) > 0
    assert report.deepspeed["taken"]["zero_stage"] == 0
    assert report.environment["WORLD_SIZE"] == "1" and report.environment["OMP_NUM_THREADS"] == "1"
    assert not list(folder.glob("failure*"))


@pytest.mark.slow
def test_two_ranks_walk_the_same_way_as_one(tiny_spec: Any, torchrun: Any) -> None:
    """ZeRO 2 and 3, with accumulation, against one rank with the whole batch: losses, norms, weights and answers."""
    seen = {}
    for name, arguments in {
        "one": {"micro": 8},
        "zero2": {"micro": 2, "accumulation": 2, "ranks": 2, "zero": 2},
        "zero3": {"micro": 4, "ranks": 2, "zero": 3},
    }.items():
        spec = tiny_spec(name, **arguments)
        ended = torchrun(spec)
        assert ended.code == 0, ended.text
        assert result_of(spec).evaluation["count"] == 24.0
        weights = LlavaForConditionalGeneration.from_pretrained(Path(spec.output) / result_of(spec).checkpoint).state_dict()
        seen[name] = (rows_of(spec), weights)
    rows, weights = seen["one"]
    for name in ("zero2", "zero3"):
        assert [row.loss for row in seen[name][0]] == pytest.approx([row.loss for row in rows], abs=1e-6)
        assert [row.grad_norm for row in seen[name][0]] == pytest.approx([row.grad_norm for row in rows], rel=1e-4)
        assert [(row.samples, row.tokens) for row in seen[name][0]] == [(row.samples, row.tokens) for row in rows]
        assert max(float((weights[key] - tensor).abs().max()) for key, tensor in seen[name][1].items()) < 1e-4


@pytest.mark.slow
def test_sigterm_saves_and_says_stopped(tiny_spec: Any, torchrun: Any) -> None:
    spec = tiny_spec(ranks=2, micro=4, changes={"steps": 100_000})
    torchrun(spec, stop_after=3)
    result, rows = result_of(spec), rows_of(spec)
    assert (result.status, result.evaluation) == ("stopped", {})
    assert 3 <= result.steps == len(rows) < 100_000
    assert result.checkpoint == f"checkpoints/step-{result.steps:06d}"
    LlavaForConditionalGeneration.from_pretrained(Path(spec.output) / result.checkpoint)
    assert not list(Path(spec.output).glob("failure*"))


@pytest.mark.slow
def test_lora_on_a_checkpoint_is_a_peft_adapter_that_evaluates(tiny_spec: Any, torchrun: Any) -> None:
    base = tiny_spec("base", changes={"steps": 1, "evaluation": Evaluation(enabled=False)})
    assert torchrun(base).code == 0
    start = str(Path(base.output) / result_of(base).checkpoint)
    tuned = tiny_spec("tuned", changes={"stage": replace(LORA, checkpoint=start), "gradient_checkpointing": True}, zero=2)
    ended = torchrun(tuned)
    assert ended.code == 0, ended.text
    adapter = Path(tuned.output) / result_of(tuned).checkpoint
    assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "model.safetensors").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == start
    assert re.fullmatch(settings["target_modules"], "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(settings["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    scored = tiny_spec("scored", changes={"stage": replace(EVALUATE, checkpoint=str(adapter))})
    ended = torchrun(scored)
    assert ended.code == 0, ended.text
    assert result_of(scored).evaluation == result_of(tuned).evaluation
    assert (Path(scored.output) / "samples.jsonl").read_text() == (Path(tuned.output) / "samples.jsonl").read_text()
    assert not (Path(scored.output) / "checkpoints").exists()


def test_what_cannot_start_says_why_and_ends_with_two(tiny_spec: Any, torchrun: Any) -> None:
    spec = tiny_spec(changes={"stage": replace(EVALUATE, checkpoint="/nowhere/step-000001")})
    ended = torchrun(spec)
    assert "stage.checkpoint: /nowhere/step-000001 is not a complete checkpoint: there is no such folder" in ended.text
    assert read(FailureReport, Path(spec.output) / "failure-rank0.json").code == Exit.USAGE
    assert not (Path(spec.output) / "train_result.json").exists()


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
)
def test_the_digits_are_learned(seed: int, tiny_spec: Any, torchrun: Any) -> None:
    spec = tiny_spec(width=96, micro=64, changes={"seed": seed, "steps": 300, "evaluation": Evaluation()})
    spec = replace(spec, device=replace(spec.device, threads=2), model=replace(spec.model, source=Source(kind="random")))
    ended = torchrun(spec, timeout_s=900)  # 40 s on two quiet cores
    assert ended.code == 0, ended.text
    evaluation = result_of(spec).evaluation
    assert evaluation["count"] == 297
    assert evaluation["exact_match"] >= 0.93
