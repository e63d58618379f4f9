"""`omnilaunch plan --trace`: what the trainer is asked, what of its answer is shown, and what becomes of its refusals."""

import json
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher import cli
from launcher.check.rules import RULES_BUT_MEMORY
from launcher.config.compose import compose
from launcher.errors import ConfigRefused, LaunchError
from launcher.image.stack import load_stacks
from launcher.memory.estimate import estimate_memory
from launcher.plan.plan import LocalContext, Plan, make_plan
from launcher.plan.short import describe_short
from launcher.plan.trace import describe_trace, go_by_trace, trace_plan
from tests.launcher.conftest import PLACE, PROJECT
from trainer.contract import SCHEMA, TracePhase, TraceReport

GIB = 2**30
REPORT = TraceReport(
    schema=SCHEMA,
    torch="2.13.0",
    peak_bytes=3 * GIB,
    peak_phase="backward",
    phases=(
        TracePhase(phase="forward", peak_bytes=2 * GIB, items_bytes={"weights": 2 * GIB}),
        TracePhase(phase="backward", peak_bytes=3 * GIB, items_bytes={"activations": GIB, "weights": 2 * GIB}),
    ),
    host_bytes=0,
    parameters=1000,
    trainable=1000,
    samples=1,
    length=2048,
    images=1,
    image_size=(336, 336),
    image_tokens=576,
    trained_tokens=1472,
    cpu_seconds=1.5,
    resident_bytes=500 * 2**20,
    notes=("tensors alone",),
)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., LocalContext]:
    """A place whose interpreter writes down its arguments and the spec, and answers."""

    def make(*, code: int = 0, out: str = json.dumps(asdict(REPORT)), err: str = "") -> LocalContext:
        program = tmp_path / "python"
        seen = tmp_path / "seen.json"
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n"
            f"seen = {{'argv': sys.argv[1:], 'spec': json.loads(Path(sys.argv[-1]).read_text()), 'cuda': os.environ['CUDA_VISIBLE_DEVICES']}}\n"
            f"Path({str(seen)!r}).write_text(json.dumps(seen))\nprint({out!r})\nprint({err!r}, file=sys.stderr)\nsys.exit({code})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return replace(PLACE, interpreter=str(program))

    return make


@pytest.fixture
def plan(plan_for: Callable[..., Plan]) -> Plan:
    return plan_for("run.steps=200")


def test_the_trainer_is_asked_with_the_spec_of_the_plan(plan: Plan, trainer: Callable[..., LocalContext], tmp_path: Path) -> None:
    assert trace_plan(plan, trainer(), {"PATH": "/usr/bin"}) == REPORT
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["argv"][:3] == ["-m", "trainer", "trace"]
    assert seen["spec"]["steps"] == 200 and seen["spec"]["model"]["name"] == plan.spec.model.name
    assert seen["spec"]["output"] != plan.spec.output  # a plan leaves nothing in the run's folder
    assert seen["cuda"] == ""


def test_a_refusal_of_the_trainer_is_one_of_the_plan(plan: Plan, trainer: Callable[..., LocalContext]) -> None:
    with pytest.raises(ConfigRefused, match="no module for 'omnilmm'"):
        trace_plan(plan, trainer(code=2, out="", err="model.family: the trainer has no module for 'omnilmm'"), {})


@pytest.mark.parametrize(("code", "out", "said"), ((1, "", "exit code 1"), (0, "{}", "cannot read"), (0, "hello", "cannot read")))
def test_a_failure_is_reported_with_what_the_trainer_said(
    plan: Plan, trainer: Callable[..., LocalContext], code: int, out: str, said: str
) -> None:
    with pytest.raises(LaunchError, match=said) as caught:
        trace_plan(plan, trainer(code=code, out=out, err="the last line"), {})
    assert "the last line" in str(caught.value)


def test_the_highest_moment_is_shown_beside_the_plan(plan: Plan) -> None:
    text = describe_trace(REPORT, plan)
    assert "peak, backward          3.000 GiB  the highest" in text
    assert "peak by arithmetic" in text and "1 image of 336 x 336 pixels, 576 image tokens, 1472 trained" in text
    assert text.index("weights") < text.index("activations")


ACCEPTED = "cluster.delivery.accept_licence=true"
FULL_7B = (
    *("hardware=rtx3090", ACCEPTED, "model=llava_1_5_7b", "stage=full", "strategy=zero2", "strategy.micro_batch=1"),
    *("data=files", "data.train=a.json", "data.images=photos", "data.max_length=1024"),
)
STACKS = load_stacks(PROJECT / "images")


def untraced(*overrides: str) -> Plan:
    """What `plan --trace` has before its step is traced."""
    return make_plan(compose(overrides, PROJECT / "conf"), STACKS, PLACE, run_id="R", overrides=overrides, rules=RULES_BUT_MEMORY)


def peak_of(**items_gib: float) -> TraceReport:
    """The trace of a step that is highest in its backward pass, with these items."""
    items = {name.replace("_", " "): int(size * GIB) for name, size in items_gib.items()}
    highest = TracePhase(phase="backward", peak_bytes=sum(items.values()), items_bytes=items)
    return replace(REPORT, peak_bytes=highest.peak_bytes, phases=(REPORT.phases[0], highest))


def test_what_is_traced_stands_in_the_place_of_what_is_counted() -> None:
    plan = untraced("hardware=rtx3090")
    planned = estimate_memory(plan.config)
    traced = go_by_trace(plan, peak_of(weights=2, optimizer=4, activations=3, backward_pass=1), STACKS)
    memory = traced.memory
    assert memory is not None and traced.verdict == plan.verdict
    found = {item.name: item for item in memory.items}
    kept = {item.name: item for item in planned.items}
    assert {name for name, item in found.items() if item.basis == "traced"} == {"weights", "optimizer", "activations", "backward pass"}
    assert set(found) == {"weights", "optimizer", "activations", "backward pass", "fragmentation", "runtime"}
    assert found["runtime"] == kept["runtime"] and found["runtime"].size_bytes > 0
    assert found["fragmentation"].size_bytes == int(plan.config.hardware.fragmentation * 4 * GIB) > 0  # states do not come and go
    assert memory.total_bytes == 10 * GIB + found["fragmentation"].size_bytes + found["runtime"].size_bytes
    assert memory.limit_bytes == 24 * GIB
    assert (memory.host_items, memory.start_bytes) == (planned.host_items, planned.start_bytes)
    assert "one step of such a batch was traced; its peak is in the backward phase" in memory.assumption


def test_a_traced_peak_that_does_not_fit_is_refused_though_the_counted_one_does(plan_for: Callable[..., Plan]) -> None:
    counted = plan_for("hardware=rtx3090", ACCEPTED)
    assert counted.verdict.launchable and counted.memory is not None and counted.memory.fits
    report = peak_of(weights=2, optimizer=4, activations=30)
    with pytest.raises(ConfigRefused, match=r"by a traced step, the peak takes \d+\.\d GiB on each device .*, which has 24:") as caught:
        go_by_trace(untraced("hardware=rtx3090"), report, STACKS)
    assert f"by arithmetic {counted.memory.total_bytes / GIB:.1f} GiB" in str(caught.value)
    forced = go_by_trace(untraced("hardware=rtx3090", ACCEPTED, "run.force=to see it fail"), report, STACKS)
    assert forced.verdict.launchable and "by a traced step" in forced.verdict.forced[0].what


def test_what_would_pass_leaves_room_for_what_the_count_is_below_the_trace() -> None:
    """The same peak, above the card's memory, of a count that was nearly right and of one that was far off."""
    words = FULL_7B
    near = untraced(*words)
    report = peak_of(weights=estimate_memory(near.config).total_bytes / GIB)
    with pytest.raises(ConfigRefused) as caught:
        go_by_trace(near, report, STACKS)
    assert "strategy=zero3" in str(caught.value) and "would pass" in str(caught.value)
    with pytest.raises(ConfigRefused) as other:
        go_by_trace(near, peak_of(weights=10_000), STACKS)
    assert "would pass" not in str(other.value)


def test_a_traced_peak_that_fits_passes_the_plan_but_no_launch(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused, match="the peak takes"):
        plan_for(*FULL_7B)  # without a trace the arithmetic holds
    traced = go_by_trace(untraced(*FULL_7B), peak_of(weights=12, activations=4), STACKS)
    assert traced.memory is not None and traced.memory.fits
    assert traced.verdict.ok and not traced.verdict.launchable
    text = describe_short(traced)
    assert "planned; a launch is refused:" in text and "fits by a traced step, with a peak of 17." in text
    assert "would pass: run.force='fits by a traced step'" in text
    assert plan_for(*FULL_7B, "run.force=fits by a traced step").verdict.launchable  # as the text says


def run_plan(place: LocalContext, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("launcher.plan.local_context.local_context", lambda project: place)
    return cli.main(["plan", *words])


def test_the_flag_has_the_plan_go_by_the_trace(
    trainer: Callable[..., LocalContext], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(trainer(), monkeypatch, "--trace", "--json", "hardware=rtx3090") == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["trace"]["peak_bytes"] == 3 * GIB
    sizes = {item["name"]: item["size_bytes"] for item in seen["memory"]["items"] if item["basis"] == "traced"}
    assert sizes == {"weights": 2 * GIB, "activations": GIB}
    assert seen["memory"]["total_bytes"] == sum(item["size_bytes"] for item in seen["memory"]["items"]) > 3 * GIB
    assert run_plan(trainer(), monkeypatch, "--trace", "--full", "hardware=rtx3090") == 0
    text = capsys.readouterr().out
    assert "== a traced step" in text and re.search(r"^activations +1\.000 GiB  traced$", text, re.MULTILINE)


def test_the_flag_refuses_by_the_trace(
    trainer: Callable[..., LocalContext], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = trainer(out=json.dumps(asdict(peak_of(weights=25))))
    assert run_plan(place, monkeypatch, "--trace", "hardware=rtx3090") == 2
    assert "by a traced step, the peak takes 2" in capsys.readouterr().err
    assert run_plan(place, monkeypatch, "hardware=rtx3090") == 0


def test_without_the_trainers_packages_no_plan_is_shown(
    trainer: Callable[..., LocalContext], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = trainer(code=2, out="", err="this interpreter has no torch")
    assert run_plan(place, monkeypatch, "--trace", "hardware=rtx3090") == 2
    seen = capsys.readouterr()
    assert seen.out == "" and "this step cannot be traced:\nthis interpreter has no torch" in seen.err
