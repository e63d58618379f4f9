"""`omnilaunch plan --trace`: what the trainer is asked, what of its answer is shown, and what becomes of its refusals."""

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher import cli
from launcher.errors import ConfigRefused, LaunchError
from launcher.plan import Place, Plan
from launcher.trace import describe_trace, trace_plan
from tests.launcher.conftest import PLACE
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
def trainer(tmp_path: Path) -> Callable[..., Place]:
    """A place whose interpreter writes down its arguments and the spec, and answers."""

    def make(*, code: int = 0, out: str = json.dumps(asdict(REPORT)), err: str = "") -> Place:
        program = tmp_path / "python"
        told = tmp_path / "told.json"
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n"
            f"told = {{'argv': sys.argv[1:], 'spec': json.loads(Path(sys.argv[-1]).read_text()), 'cuda': os.environ['CUDA_VISIBLE_DEVICES']}}\n"
            f"Path({str(told)!r}).write_text(json.dumps(told))\nprint({out!r})\nprint({err!r}, file=sys.stderr)\nsys.exit({code})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return replace(PLACE, interpreter=str(program))

    return make


@pytest.fixture
def plan(plan_for: Callable[..., Plan]) -> Plan:
    return plan_for("run.steps=200")


def test_the_trainer_is_asked_with_the_spec_of_the_plan(plan: Plan, trainer: Callable[..., Place], tmp_path: Path) -> None:
    assert trace_plan(plan, trainer(), {"PATH": "/usr/bin"}) == REPORT
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["argv"][:3] == ["-m", "trainer", "trace"]
    assert told["spec"]["steps"] == 200 and told["spec"]["model"]["name"] == plan.spec.model.name
    assert told["spec"]["output"] != plan.spec.output  # a plan leaves nothing in the run's folder
    assert told["cuda"] == ""


def test_a_refusal_of_the_trainer_is_one_of_the_plan(plan: Plan, trainer: Callable[..., Place]) -> None:
    with pytest.raises(ConfigRefused, match="no module for 'omnilmm'"):
        trace_plan(plan, trainer(code=2, out="", err="model.family: the trainer has no module for 'omnilmm'"), {})


@pytest.mark.parametrize(("code", "out", "said"), ((1, "", "exit code 1"), (0, "{}", "cannot read"), (0, "hello", "cannot read")))
def test_a_failure_is_told_with_what_the_trainer_said(plan: Plan, trainer: Callable[..., Place], code: int, out: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said) as caught:
        trace_plan(plan, trainer(code=code, out=out, err="the last line"), {})
    assert "the last line" in str(caught.value)


def test_the_highest_moment_is_shown_beside_the_plan(plan: Plan) -> None:
    text = describe_trace(REPORT, plan)
    assert "peak, backward      3.000 GiB  the highest" in text
    assert "planned peak" in text and "1 image(s) of 336 x 336, 576 image tokens, 1472 trained" in text
    assert text.index("weights") < text.index("activations")


def test_the_flag_adds_the_trace_to_the_plan(
    trainer: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = trainer()
    monkeypatch.setattr("launcher.place.place_here", lambda project: place)
    assert cli.main(["plan", "--trace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trace"]["peak_bytes"] == 3 * GIB
    assert cli.main(["plan", "--trace"]) == 0
    assert "== a step, traced" in capsys.readouterr().out
