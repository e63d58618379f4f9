"""Stages that answer are planned at real sizes, for every hardware and model, and what a refusal offers fits."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from launcher.check.answering_changes import describe_fewer_bits, with_nf4
from launcher.check.change import set_values
from launcher.check.rules import check
from launcher.check.strategy import resolve
from launcher.check.suggestions import find_changes, memory_fits
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.image.stack import load_stacks
from launcher.memory.answering import answer_load
from launcher.memory.estimate import estimate_memory
from launcher.memory.states import GIB
from launcher.memory.tokens import largest_image, read_answer_load, resolve_context
from launcher.plan.plan import LocalContext, on_one_rank, train_spec

ROOT = Path(__file__).resolve().parents[3]
PLACE = LocalContext(project=ROOT, here=Path("/w"), interpreter="python", user="0:0")
HARDWARE = tuple(sorted(file.stem for file in (ROOT / "conf/hardware").glob("*.yaml")))
MODELS = tuple(sorted(file.stem for file in (ROOT / "conf/model").glob("*.yaml")))
STAGES = {
    "evaluate": (),
    "infer": ("stage.inference.prompt=What?", "stage.inference.image=a.png"),
    "serve": (),
    "merge": (),
    "convert": (),
    "quantize": (),
}
STACKS = load_stacks(ROOT / "images")


@cache
def composed(*words: str) -> Config:
    return compose(words, ROOT / "conf")


def config_of(hardware: str, model: str, stage: str) -> Config:
    """Put together from sections, because composing each of 800 configs would take a minute."""
    base, other = composed(f"hardware={hardware}", "tune=null"), composed(f"model={model}", "tune=null")
    answering = composed(f"stage={stage}", "stage.checkpoint=R", *STAGES[stage], "tune=null").stage
    return on_one_rank(replace(base, model=other.model, stage=answering))


def cases(*stages: str) -> Iterator[tuple[str, str, str]]:
    return product(HARDWARE, MODELS, stages)


def test_images_are_as_large_as_the_model_takes_them_and_never_digits() -> None:
    for case in cases("evaluate", "infer", "serve", "quantize"):
        config = config_of(*case)
        rows, most_new = answer_load(config)
        load, (tokens, patches) = read_answer_load(config, rows=rows, most_new=most_new), largest_image(config)
        if config.stage.kind in ("infer", "serve"):
            assert load.length == resolve_context(config) <= config.model.context, case
            assert load.image_tokens >= rows * min(tokens, load.length) and load.patches >= rows * min(patches, load.length), case
        else:
            assert load.image_tokens == rows * min(tokens, load.length - most_new), case
        assert "8 x 8" not in load.assumption and f"{rows} " in load.assumption, case


def test_stages_that_rewrite_files_need_no_device() -> None:
    for case in cases("merge", "convert"):
        memory = estimate_memory(config_of(*case))
        assert sum(item.size_bytes for item in memory.items if item.name != "runtime") == 0 and memory.assumption == "", case


def test_every_refusal_offers_what_fits_or_says_what_would() -> None:
    refused = 0
    for case in cases("evaluate", "infer", "serve", "quantize"):
        config = config_of(*case)
        resolved = resolve(config)
        if resolved.memory is None or resolved.memory.fits:
            continue
        refused += 1
        found = find_changes(resolved, STACKS)
        assert found or "whole layers over" in next(memory_fits(config, STACKS)).what, case
        for change, memory in found:
            assert memory.fits, (case, change)
    assert refused > 50


@pytest.mark.parametrize(
    ("words", "least_gib", "most_gib"),
    [
        (("hardware=rtx3090", "model=qwen2_5_vl_7b", "stage=serve"), 22, 25),  # was called ok at 16.7
        (("hardware=rtx3090", "model=qwen2_5_vl_7b", "stage=serve", "data=files", "data.max_length=4096"), 29, 35),
        (("hardware=h200", "model=internvl3_8b", "stage=serve"), 25, 33),
    ],
)
def test_serving_counts_cache_images_and_batch(words: tuple[str, ...], least_gib: float, most_gib: float) -> None:
    memory = estimate_memory(on_one_rank(composed(*words, "tune=null")))
    assert least_gib < memory.total_bytes / GIB < most_gib
    assert {"keys and values", "layer at work", "pixels of the images"} <= {item.name for item in memory.items}


def test_the_refusal_of_a_server_offers_batch_and_image_size_and_each_passes() -> None:
    words = ("hardware=rtx3090", "model=qwen2_5_vl_7b", "stage=serve")
    (problem,) = memory_fits(on_one_rank(composed(*words)), STACKS)
    assert problem.changes[:2] == ("stage.serving.max_batch=8", "data.max_pixels=501760")
    assert "assumed: 16 answers at a time, each with a context of 2,048 tokens" in problem.what
    for change in problem.changes:
        config = on_one_rank(composed(*words, *shlex.split(change)))
        assert estimate_memory(config).fits and not list(memory_fits(config, STACKS)), change


def test_the_trainer_gets_the_context_and_the_image_bound_that_the_memory_was_judged_for() -> None:
    for stage, options in (("serve", "serving"), ("infer", "inference")):
        config = on_one_rank(composed("model=qwen2_5_vl_7b", f"stage={stage}", *STAGES[stage], "tune=null"))
        spec = train_spec(config, PLACE, run_id="R")
        assert getattr(spec.stage, options).context == resolve_context(config) == 2048
        assert spec.data.max_pixels == 1003520
        smaller = composed(
            "model=qwen2_5_vl_7b", f"stage={stage}", *STAGES[stage], f"stage.{options}.context=700", "data.max_pixels=200704"
        )
        spec = train_spec(on_one_rank(smaller), PLACE, run_id="R")
        assert getattr(spec.stage, options).context == 700 and spec.data.max_pixels == 200704
    evaluated = composed("model=qwen2_5_vl_7b", "stage=evaluate", "tune=null")
    assert train_spec(evaluated, PLACE, run_id="R").data.max_pixels == 0, "as in training"


def test_a_larger_context_than_the_models_is_the_models() -> None:
    assert resolve_context(composed("model=omnilmm_3b", "stage=serve", "stage.serving.context=9000")) == 2048


# ------------------------------------------------------------------------------------ OmniLMM-12B on a P4: the way by NF4


@pytest.mark.parametrize("stage", ["evaluate", "infer", "serve"])
def test_a_model_that_is_too_large_is_led_to_nf4_with_commands_that_plan(stage: str) -> None:
    words = ("hardware=p4", "model=omnilmm_12b", f"stage={stage}", *STAGES[stage])
    config = on_one_rank(composed(*words))
    (problem,) = memory_fits(config, STACKS)
    route = re.search(r"it fits\. First: omnilaunch launch (.*) --run-id (\S+)\n    then this command with (.*)", problem.what)
    assert route is not None and "6.1 GiB" in problem.what
    first = check(on_one_rank(composed(*shlex.split(route[1]))), STACKS)
    assert first.ok, "the first command is planned"
    assert route[3].startswith(f"stage.checkpoint={route[2]}")
    then = [part.split("=") for part in route[3].split()[1:]]
    packed = set_values(with_nf4(config, ("projector", "head")), {key: int(value) for key, value in then})
    assert estimate_memory(packed).fits and not estimate_memory(config).fits


def test_int8_is_not_said_to_help_where_its_weights_are_converted_back() -> None:
    config = on_one_rank(composed("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=serve"))
    assert "int8 would not help" in describe_fewer_bits(config)


def test_weights_in_float32_are_offered_in_16_bits() -> None:
    config = on_one_rank(composed("hardware=rtx3090", "model=qwen2_5_vl_7b", "stage=infer", *STAGES["infer"], "precision=fp32"))
    (problem,) = memory_fits(config, STACKS)
    assert any(change.startswith("precision=bf16") for change in problem.changes)


def test_pure_bf16_on_two_small_cards_is_offered_the_rounding_and_the_offload_that_pass() -> None:
    words = ("hardware=rtx3090", "model=minicpm_o_2_6", "stage=full", "precision=pure_bf16", "tune=null")
    (problem,) = memory_fits(composed(*words), STACKS)
    assert problem.changes and "hardware.host_memory_gib is not set" in problem.what
    for change in problem.changes:
        assert "offload_optimizer=true" in change and "precision.rounding=nearest" in change
        verdict = check(composed(*words, *shlex.split(change)), STACKS)
        assert verdict.ok, verdict.problems


def test_a_host_that_is_too_small_gets_one_figure() -> None:
    """It said `129.6 GiB of a node's host memory, which has 64; offloaded, states take up to 15.8 GiB`."""
    words = (
        "strategy=zero3",
        "strategy.offload_optimizer=true",
        "strategy.offload_parameters=true",
        "strategy.gradient_checkpointing=true",
    )
    own = ("data=files", "data.train=a.json", "data.images=b", "data.max_length=1024", "data.max_tiles=1", "tune=null")
    config = composed("hardware=rtx3090", "model=minicpm_o_2_6", "stage=full", "hardware.host_memory_gib=64", *words, *own)
    (problem,) = memory_fits(config, STACKS)
    assert problem.what.count("GiB of a node's host memory") == 1 and "stage=lora" in problem.changes
