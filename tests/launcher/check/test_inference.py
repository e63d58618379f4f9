"""The stages that come after training: what a plan says of them, and which are refused, each change tried."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from launcher.check.inference import OPTIONS
from launcher.check.problem import Problem
from launcher.check.rules import check
from launcher.config.compose import compose, options
from launcher.config.defaults import keys_of, without_keys
from launcher.errors import ConfigRefused
from launcher.image.stack import Stack, load_stacks
from launcher.memory.estimate import estimate_memory
from launcher.plan.plan import Plan
from launcher.plan.short import describe_short
from launcher.plan.stop_limit import LEAST_S, LEAVING_S
from trainer.contract import SINGLE_PROCESS_KINDS

ROOT = Path(__file__).parents[3]
GIB = 2**30
RUN = f"stage.checkpoint={os.sep}a"
ASKED = ("stage=infer", RUN, "stage.inference.prompt=what")


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


def problems(*words: str) -> list[Problem]:
    return [problem for problem in check(compose(words, ROOT / "conf"), stacks()).problems if not problem.launch_only]


@pytest.mark.parametrize(("kind", "name"), tuple(product(OPTIONS, options(ROOT / "conf")["hardware"])))
def test_every_stage_can_be_planned_on_every_hardware(kind: str, name: str, plan_for: Callable[..., Plan]) -> None:
    named = ("stage.inference.prompt=what",) if kind == "infer" else ()
    plan = plan_for(f"stage={kind}", f"hardware={name}", "tune=null", RUN, *named)
    stage = plan.spec.stage
    assert getattr(stage, OPTIONS[kind]) is not None and sum(getattr(stage, option) is not None for option in OPTIONS.values()) == 1
    assert plan.spec.device.world_size == (1 if kind in SINGLE_PROCESS_KINDS else plan.config.hardware.devices_per_node)
    torchrun = ["torch.distributed.run" in command.start for command in plan.commands]
    assert torchrun == [kind not in SINGLE_PROCESS_KINDS] * len(plan.commands)
    assert "DeepSpeed" not in describe_short(plan) and "samples a step" not in describe_short(plan)


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (("stage=infer", RUN), "stage.inference.prompt", "there is no question"),
        ((*ASKED, "stage.inference.input=rows.jsonl"), "stage.inference.prompt", "whose rows have their own"),
        (
            (*ASKED, "stage.inference.sampling.beams=4", "stage.inference.sampling.temperature=1"),
            "stage.inference.sampling.beams",
            "samples tokens at random",
        ),
        (("stage=serve", RUN, "stage.serving.address=0.0.0.0"), "stage.serving.address", "reached from other machines"),
        (("stage=serve", RUN, "stage.serving.address=127.0.0.2"), "stage.serving.address", "reached from other machines"),
        (("stage=serve", RUN, "stage.serving.address=gpu7"), "stage.serving.address", "is not an IP address"),
        (("stage=serve", RUN, "stage.serving.token=T"), "stage.serving.token", "is not in cluster.secrets"),
        (("stage=serve", RUN, "stage.serving.port=0"), "stage.serving.port", "at least 1"),
        (("stage=serve", RUN, "stage.serving=null"), "stage.serving", "is of kind serve"),
        (("stage=quantize", RUN, "stage.quantization.scheme=nf4"), "stage.quantization.scheme", "works on CUDA devices"),
        (("stage=merge", "model=llava_1_5_7b"), "stage.checkpoint", "needs the adapter of a LoRA run"),
        (("stage=evaluate", RUN, "data.builtin=''"), "data.evaluation", "set its path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_is_refused_with_a_change_that_does(words: tuple[str, ...], key: str, said: str) -> None:
    found = {problem.key: problem for problem in problems(*words)}
    assert said in found[key].what and found[key].changes
    change = found[key].changes[0].replace("'What is this?'", "what").replace("FILE", "file").split()
    kept = without_keys(words, {key, *keys_of(change)})
    if "RUN_ID" not in found[key].changes[0]:
        assert key not in {problem.key for problem in problems(*kept, *change)}


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigRefused, match=r"(?s)run.evaluation.metrics.*bleu.*exact_match.*perplexity"):
        compose(("run.evaluation.metrics=[bleu]",), ROOT / "conf")


def test_a_stage_of_files_needs_no_room_on_the_device() -> None:
    whole = estimate_memory(compose(("stage=merge", RUN, "model=qwen2_5_vl_32b", "hardware=p4"), ROOT / "conf"))
    assert whole.fits and whole.total_bytes < GIB and not whole.host_items


def test_a_model_that_no_card_holds_is_spread() -> None:
    """Seed B: 32 billion parameters in bfloat16 are 62 GiB, a card has 64."""
    words = ("model=qwen2_5_vl_32b", "hardware=ascend910b", *ASKED)
    (problem,) = problems(*words)
    assert problem.changes[0] == "stage.inference.spread=auto cluster.devices_per_node=8" and not problems(
        *words, *problem.changes[0].split()
    )
    one, spread = (estimate_memory(compose((*words, *more), ROOT / "conf")) for more in ((), ("stage.inference.spread=auto",)))
    sizes = [next(item.size_bytes for item in memory.items if item.name == "weights") for memory in (one, spread)]
    assert sizes[1] == -(-sizes[0] // 8)
    assert [item.size_bytes for item in spread.host_items] == [sizes[0]]  # one process loads it, once


def test_a_spread_model_is_one_rank_that_sees_every_card(plan_for: Callable[..., Plan]) -> None:
    accepted = "cluster.delivery.accept_licence=true"
    plan = plan_for("hardware=ascend910b", "cluster.runtime=docker", accepted, *ASKED, "stage.inference.spread=auto", "tune=null")
    (command,), device = plan.commands, plan.spec.device
    assert (device.world_size, device.devices_per_node, device.cards) == (1, 1, 8)
    assert [part for part in command.start if part.startswith("/dev/davinci") and part[-1].isdigit()] == [
        f"/dev/davinci{n}" for n in range(8)
    ]


def test_a_server_has_the_time_to_answer_what_it_has_accepted(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for("stage=serve", "stage.serving.drain_timeout_s=300", RUN)
    assert plan.stop_limit_s == 300 + LEAVING_S
    assert plan_for("stage=serve", "stage.serving.drain_timeout_s=1", RUN).stop_limit_s == LEAST_S
    assert plan_for("stage=serve", "run.stop_timeout_s=20", "stage.serving.drain_timeout_s=1", RUN).stop_limit_s == 20


def test_a_p4_asks_for_converted_weights_and_names_the_command() -> None:
    """Seed D1 and D2: published in bfloat16, which the chip does not have."""
    words = ("model=omnilmm_3b", "hardware=p4", "stage=evaluate", "run.evaluation.batch=1")
    (note,) = (note for note in check(compose(words, ROOT / "conf"), stacks()).notes if "convert" in note)
    command = note.partition("with ")[2].partition(";")[0].split()
    assert command[:2] == ["omnilaunch", "launch"] and not problems(*command[2:])
    assert "stage.checkpoint=RUN_ID" in note
    config = compose((*words, RUN), ROOT / "conf")
    assert not any("convert" in note for note in check(config, stacks()).notes)
    assert not any("convert" in note for note in check(replace(config, hardware=compose((), ROOT / "conf").hardware), stacks()).notes)
