"""The plan on one screen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.check.problem import Problem
from launcher.check.rules import RULES, Verdict
from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.image.stack import load_stacks
from launcher.plan.data.rows import BUILTIN_ROWS
from launcher.plan.full import describe_full
from launcher.plan.host_memory import judge
from launcher.plan.plan import Plan, plan_json
from launcher.plan.short import describe_short, order_notes
from launcher.plan.text import measure
from trainer.contract import decode

CONF = Path(__file__).parents[3] / "conf"

PLANS: tuple[tuple[str, ...], ...] = (
    (),
    ("hardware=p4", "run.steps=100"),
    ("hardware=h200", "model=qwen2_5_vl_7b", "stage=full", "cluster=example", "cluster.delivery.accept_licence=true"),
    ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "precision=bf16", "cluster=example"),
    ("hardware=rtx3090", "model=minicpm_v_2_6", "stage=lora", "cluster.runtime=docker", "run.force=to see it fail"),
    ("hardware=h200", "model=llava_1_5_7b", "stage=evaluate"),
    ("stage=serve", "stage.checkpoint=x"),
    ("stage=merge", "stage.checkpoint=x"),
)


def without_notes(plan: Plan) -> Plan:
    return replace(plan, verdict=replace(plan.verdict, notes=()))


def count_rows(lines: list[str], width: int) -> int:
    """Of a terminal."""
    return sum(-(-measure(line) // width) for line in lines)


@pytest.mark.parametrize("overrides", PLANS, ids=" ".join)
@pytest.mark.parametrize("width", [80, 100])
def test_it_fits_on_a_screen(plan_for: Callable[..., Plan], overrides: tuple[str, ...], width: int) -> None:
    plan = plan_for(*overrides)
    noisy = replace(plan, verdict=replace(plan.verdict, notes=plan.verdict.notes * 9 + ("long " * 200,)))
    for each in (plan, noisy):
        lines = describe_short(each, width=width).splitlines()
        assert count_rows(lines, width) <= max(30, count_rows(describe_short(without_notes(each), width=width).splitlines(), width) + 4)
        assert not [line for line in lines if line != line.rstrip() or "\033" in line]


def test_what_a_person_reads(plan_for: Callable[..., Plan]) -> None:
    overrides = ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example", "cluster.delivery.accept_licence=true")
    plan = replace(plan_for(*overrides), overrides=overrides)
    text = describe_short(plan, built=False).splitlines()
    tag = plan.image.tag
    assert text[:9] == [
        "ok: this run can be launched",
        "hardware=ascend910b model=qwen2_5_vl_32b stage=lora precision=bf16 strategy=zero3 data=digits",
        "  cluster=example",
        "memory    [####--------------------] 10.8 of 64 GiB on each device (17%), 53.2 free",
        "          largest, in GiB: weights 3.91; runtime 2.30; activations, language 1.96",
        "host      up to 11.6 GiB of each node's own memory (model while it loads 11.6): not checked, because",
        "          hardware.host_memory_gib is not set. omnilaunch doctor asks the nodes",
        "strategy  zero3, micro-batch 1: the fastest with at most 70% for states and 95% at the peak; the",
        "          peak takes 17%",
    ]
    assert f"image     {tag}, not built; launch builds it, and sends it to the nodes" in text
    assert "ranks     2 nodes x 8 devices, 16 ranks" in text
    assert "batch     16 samples a step = micro-batch 1 x 1 accumulated x 16 ranks, 1000 steps" in text
    assert "cost      1,000 steps = 16,000 samples = 10.7 epochs of 1,500 rows, at most 1,088,000 tokens" in text
    assert text[-2].startswith("next: omnilaunch launch hardware=ascend910b") and text[-1].startswith("more: omnilaunch plan --full ")


@pytest.mark.parametrize(
    ("built", "text"), [(True, ", built"), (False, ", not built; launch builds it"), (None, "no Docker engine answers here")]
)
def test_the_image_is_built_or_not_or_not_known(plan_for: Callable[..., Plan], built: bool | None, text: str) -> None:
    plan = plan_for("cluster.runtime=docker")
    shown = " ".join(describe_short(plan, built=built).split())
    assert f"{plan.image.tag}{', ' if built is None else ''}{text}" in shown
    assert "image not used" in " ".join(describe_short(plan_for(), built=built).split())


def test_a_launch_prints_no_next_command(plan_for: Callable[..., Plan]) -> None:
    text = describe_short(plan_for(), launching=True)
    assert "next:" not in text and "--full" not in text and text.startswith("ok: this run can be launched\n")


def test_a_refused_launch_comes_first_with_what_would_pass(plan_for: Callable[..., Plan]) -> None:
    lines = describe_short(plan_for("hardware=h200", "cluster.runtime=docker"), colours=True).splitlines()
    assert lines[0] == "\033[31mplanned; a launch is refused:\033[0m" and "would pass: cluster.delivery.accept_licence=true" in lines[2]
    assert not [line for line in lines if line.startswith("next:")]


def test_notes_that_are_left_out_are_counted(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for()
    many = replace(plan, verdict=replace(plan.verdict, notes=tuple(f"note {number}" for number in range(40))))
    lines = describe_short(many).splitlines()
    shown = sum(line.startswith("note: note ") for line in lines)
    assert f"and {40 - shown} more notes, with --full" in lines and len(lines) == 30


def test_the_rows_of_the_built_in_sets_are_those_that_the_trainer_writes() -> None:
    digits = pytest.importorskip("trainer.data.digits", reason="the trainer's packages are not installed in this environment")
    assert BUILTIN_ROWS == digits.TRAIN_ROWS


# --------------------------------------------------------------------------------------------------- tight, and not only ok

CLOSE = ("hardware=p4", "model=omnilmm_3b", "stage=lora", "data=files", "data.train=a.json", "data.images=b", "data.max_length=512")
REMOTE = ("cluster.nodes=[{host: far}]", "cluster.root=/srv/x", "cluster.delivery.accept_licence=true")


def test_a_peak_above_the_margin_is_tight(plan_for: Callable[..., Plan]) -> None:
    """It said `ok: this run can be launched` at 98 % of the device."""
    plan = plan_for(*CLOSE, *REMOTE)
    assert plan.verdict.tight and plan.verdict.launchable and plan.memory is not None and plan.memory.fits
    lines, text = describe_short(plan).splitlines(), " ".join(describe_short(plan).split())
    assert lines[0] == "tight: this run can be launched, but it may end for lack of memory"
    assert "tight: the estimate may be off by 5%, more than what is free. With a margin: " in text
    assert "\ntight: this run can be launched" in describe_full(plan) and "\ntight: the estimate may be off" in describe_full(plan)
    data = json.loads(plan_json(plan))["verdict"]
    assert (data["ok"], data["launchable"], data["tight"]) == (True, True, True) and data["roomier"] == list(plan.verdict.roomier)
    assert describe_short(plan, launching=True).startswith("tight: ")


def test_what_a_tight_plan_offers_leaves_the_margin(plan_for: Callable[..., Plan]) -> None:
    offered = plan_for(*CLOSE, *REMOTE).verdict.roomier
    assert "data.max_length=256" in offered and len(offered) >= 2
    for change in offered:
        keys = {part.partition("=")[0] for part in change.split()}
        plan = plan_for(*(word for word in CLOSE if word.partition("=")[0] not in keys), *REMOTE, *change.split())
        assert plan.verdict.launchable and not plan.verdict.tight, change


def test_a_plan_with_room_is_not_tight(plan_for: Callable[..., Plan]) -> None:
    for words in ((), ("hardware=p4", *REMOTE), ("hardware=h200", "model=llava_1_5_7b", "stage=evaluate", *REMOTE)):
        plan = plan_for(*words)
        assert not plan.verdict.tight and not plan.verdict.roomier and describe_short(plan).startswith("ok: this run can be launched\n")


def test_a_run_that_takes_nearly_all_of_this_machine_is_tight() -> None:
    resolved = resolve(compose((), CONF))
    assert resolved.memory is not None
    taken = resolved.memory.total_bytes
    for own, tight in ((taken + 1, True), (int(taken / 0.95) + 2, False), (0, False)):
        verdict, _, _ = judge(compose((), CONF), dict(load_stacks(CONF.parent / "images")), RULES, None, own)
        assert (verdict.launchable, verdict.tight) == (True, tight), own


def test_an_earlier_record_has_no_word_about_it(plan_for: Callable[..., Plan]) -> None:
    data = json.loads(plan_json(plan_for()))["verdict"]
    verdict: Verdict = decode(Verdict, {key: value for key, value in data.items() if key not in ("tight", "roomier")})
    assert (verdict.tight, verdict.roomier) == (False, ())


def test_the_height_of_the_terminal_bounds_it(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example")
    noisy = replace(plan, verdict=replace(plan.verdict, notes=("a note",) * 99))
    for height in (24, 30, 50):
        lines = describe_short(noisy, height=height).splitlines()
        rest = count_rows(describe_short(without_notes(plan), height=height).splitlines(), 100)
        assert count_rows(lines, 100) == max(height, rest + 4), "three notes are always there, and how many more there are"


def test_notes_stand_in_the_order_of_their_cost(plan_for: Callable[..., Plan]) -> None:
    """A plan of a long run said which revision it takes, and not that nothing is saved before the end."""
    words = ("hardware=h200", "model=qwen2_5_vl_7b", "stage=full", "cluster=example", "data=files", "data.train=/d/a.json", "data.rows=250")
    notes = order_notes(plan_for(*words, "run.steps=99", "precision=fp16").verdict.notes)
    begin = (
        "run.save_every=0",
        "run.steps=99 uses each of",
        "each container downloads the weights",
        "Qwen/Qwen2.5-VL-7B-Instruct is in bfloat16",
    )
    assert [note.startswith(words) for note, words in zip(notes, begin, strict=False)] == [True] * 4
    assert notes[-1].startswith("model.source.revision is empty")
    slow = plan_for(*TINY, "run.steps=99", "stage.optimizer.lr=1e-5").verdict.notes
    assert ["will learn almost nothing" in note for note in order_notes(slow)][:1] == [True]


TINY = ("data=files", "data.train=/d/a.json", "data.rows=250", "data.max_length=64", "stage.optimizer.warmup=5")


def test_a_refused_plan_has_the_three_dearest_notes(plan_for: Callable[..., Plan]) -> None:
    words = (
        "hardware=h200",
        "model=qwen2_5_vl_7b",
        "stage=full",
        "cluster.runtime=docker",
        "data=files",
        "data.train=/d/a.json",
        "data.rows=250",
    )
    plan = plan_for(*words)
    problem = Problem(key="hardware", what="\n".join(["a long reason"] * 40), launch_only=True)
    refused = replace(plan, verdict=replace(plan.verdict, problems=(*plan.verdict.problems, problem), launchable=False))
    lines = describe_short(refused, width=80).splitlines()
    shown = [line for line in lines if line.startswith("note: ")]
    assert [line.split()[1] for line in shown] == ["run.save_every=0:", "run.steps=1000", "each"]
    assert all(line.endswith(" ...") and measure(line) <= 80 for line in shown)
    assert lines[lines.index(shown[2]) + 1] == "and 1 more note, with --full" and len(plan.verdict.notes) == 4


def test_the_full_plan_begins_with_the_verdict(plan_for: Callable[..., Plan]) -> None:
    assert describe_full(plan_for()).splitlines()[0] == "ok: this run can be launched"
    refused = describe_full(plan_for("hardware=h200", "cluster.runtime=docker")).splitlines()
    assert refused[0] == "planned; a launch is refused, for 1 reason at the end" and "planned; a launch is refused:" in refused[1:]
