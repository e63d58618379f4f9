"""Chains of stages: how they are read, the overrides of each step, and where an interrupted chain is resumed."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import cli
from launcher.bench.cell import list_cells
from launcher.commands.chain import find_newest, launch_chain, plan_chain, refuse_unlaunchable, show_chain
from launcher.config.chain import Chain, Step, find_chain, list_chains, load_chain, overrides_of
from launcher.config.conf_folder import ConfFolder
from launcher.config.variable import describe_devices
from launcher.errors import ConfigRefused
from launcher.plan.visible_devices import with_visible_devices
from launcher.record.record import PLAN_FILE, RECORD_FILE, write_record
from tests.launcher.planted import set_value, write_run
from tests.launcher.run.test_resume import save, stopped_record

PROJECT = Path(__file__).resolve().parents[3]
CONF = PROJECT / "conf"
NAME = "cpu_tiny_llava_chain"
GOLDEN = PROJECT / "tests" / "golden" / "record" / "2"
STEPS = ("tower", "aligned", "tuned", "adapted", "merged", "quantized", "judged")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def test_a_chain_is_not_a_benchmark() -> None:
    assert list_chains(CONF) == (NAME,) and NAME not in list_cells(CONF)
    assert find_chain(("experiment=cpu_tiny_llava_full",), CONF) is None and find_chain((), CONF) is None
    chain = find_chain((f"experiment={NAME}", "run.steps=3"), CONF)
    assert chain is not None and tuple(step.name for step in chain.steps) == STEPS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chain: []", "chain is a list of"),
        ("chain: {a: 1}", "chain is a list of"),
        ("chain: [{name: a, words: [stage=full]}]\nrun: {steps: 3}", "run beside chain"),
        ("chain: [{name: A b, words: [stage=full]}]", "step 'A b': a name has"),
        ("chain: [{name: a, words: [stage=full]}, {name: a, words: [stage=lm]}]", "step a: this name is used twice"),
        ("chain: [{name: a, words: [run.steps=3]}]", "step a: has no stage=..."),
        ("chain: [{name: a, words: [stage=evaluate, 'stage.checkpoint=@b']}]", "stage.checkpoint=@b does not name a step above it"),
        ("chain: [{name: a, words: [3]}]", "chain is a list of"),
    ],
)
def test_an_invalid_chain_is_refused_with_its_file(text: str, said: str, copied: Path) -> None:
    (copied / "experiment" / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match=re.escape(said)) as refused:
        load_chain("odd", copied)
    assert "conf/experiment/odd.yaml" in str(refused.value)


def test_a_step_starts_from_the_last_checkpoint_or_from_the_step_that_it_names() -> None:
    chain = Chain(
        name="c",
        steps=(
            Step(name="a", words=("stage=full",)),
            Step(name="b", words=("stage=evaluate",)),
            Step(name="c", words=("stage=lora",)),
            Step(name="d", words=("stage=evaluate", "stage.checkpoint=@a", "run.evaluation.base=@c")),
        ),
    )
    runs, kinds = {name: f"x-{name}" for name in "abcd"}, ("train", "evaluate", "train", "evaluate")
    words = [overrides_of(chain, place, ("experiment=c", "run.seed=2"), runs, kinds) for place in range(4)]
    assert words == [
        ("run.seed=2", "stage=full"),
        ("run.seed=2", "stage=evaluate", "stage.checkpoint=x-a"),
        ("run.seed=2", "stage=lora", "stage.checkpoint=x-a"),  # an evaluation saves none
        ("run.seed=2", "stage=evaluate", "stage.checkpoint=x-a", "run.evaluation.base=x-c"),
    ]


def never(folder: Path) -> int:
    """In place of a resume."""
    raise AssertionError(folder)


class Launches:
    """In place of `launch`: writes a plan, a config and a record with a given status."""

    def __init__(self, root: Path, failing: str = "") -> None:
        self.root, self.failing, self.made = root, failing, list[tuple[str, tuple[str, ...]]]()

    def __call__(self, words: Sequence[str], run_id: str) -> int:
        self.made.append((run_id, tuple(words)))
        failed = run_id == self.failing
        folder = self.root / "runs" / run_id
        folder.mkdir(parents=True)
        (folder / PLAN_FILE).write_text(json.dumps({"overrides": list(words)}), encoding="utf-8")
        (folder / "config.json").write_text("{}", encoding="utf-8")  # of the run, and not of a model
        record = json.loads((GOLDEN / RECORD_FILE).read_text(encoding="utf-8"))
        (folder / RECORD_FILE).write_text(json.dumps({**record, "status": "failed" if failed else "finished"}), encoding="utf-8")
        return 5 if failed else 0


def test_a_chain_is_resumed_at_the_step_that_failed(tmp_path: Path) -> None:
    chain, typed, said = load_chain(NAME, CONF), (f"experiment={NAME}", f"cluster.root={tmp_path}"), list[str]()
    first = Launches(tmp_path, failing="x-tuned")
    assert launch_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), first, never, said.append) == 5
    assert [run_id for run_id, _ in first.made] == ["x-tower", "x-aligned", "x-tuned"]
    assert "stopped at step tuned" in said[-1] and f"launch experiment={NAME}" in said[-1] and "--run-id x" in said[-1]

    second = Launches(tmp_path)
    assert launch_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), second, never, said.append) == 0
    assert [run_id for run_id, _ in second.made] == ["x-tuned-2", "x-adapted", "x-merged", "x-quantized", "x-judged"]
    words = dict(second.made)
    assert "stage.checkpoint=x-aligned" in words["x-tuned-2"] and "stage.checkpoint=x-tuned-2" in words["x-adapted"]
    assert {"stage.checkpoint=x-quantized", "run.evaluation.base=x-merged"} <= set(words["x-judged"])

    third = Launches(tmp_path)
    assert launch_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), third, never, said.append) == 0 and not third.made
    assert "run x-tuned-2" in said[-1]


def test_a_step_that_was_stopped_is_resumed_from_its_checkpoint(tmp_path: Path) -> None:
    """And only that: a run without a checkpoint, or with other overrides, is made again."""
    chain, typed, conf = load_chain(NAME, CONF), (f"experiment={NAME}", f"cluster.root={tmp_path}"), ConfFolder(project=CONF)
    launch_chain(chain, typed, "x", PROJECT, conf, Launches(tmp_path, failing="x-tuned"), never, lambda text: None)
    shutil.rmtree(folder := tmp_path / "runs" / "x-tuned")
    step = next(step for step in plan_chain(chain, typed, "x", PROJECT, conf, tmp_path).steps if step.name == "tuned")
    plan = replace(step.plan, folder=str(folder), overrides=step.overrides, spec=replace(step.plan.spec, output=str(folder)))
    write_run(folder, plan)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    write_record(stopped_record(plan.run_id), folder)

    def plan_again() -> dict[str, tuple[str, bool]]:
        planned = plan_chain(chain, typed, "x", PROJECT, conf, tmp_path)
        return {step.name: (step.run_id, step.resumes) for step in planned.steps}

    assert plan_again()["tuned"] == ("x-tuned-2", False)
    save(folder, 20)
    set_value(PLAN_FILE, "overrides", [*step.overrides, "run.seed=3"])(folder)
    assert plan_again()["tuned"] == ("x-tuned-2", False)
    set_value(PLAN_FILE, "overrides", list(step.overrides))(folder)
    assert plan_again()["tuned"] == ("x-tuned", True) and plan_again()["adapted"] == ("x-adapted", False)
    said, resumed, later = list[str](), list[Path](), Launches(tmp_path)

    def resume(run: Path) -> int:
        resumed.append(run)
        write_record(replace(stopped_record(plan.run_id), status="finished"), run)
        return 0

    assert launch_chain(chain, typed, "x", PROJECT, conf, later, resume, said.append) == 0
    assert resumed == [folder] and [run_id for run_id, _ in later.made] == ["x-adapted", "x-merged", "x-quantized", "x-judged"]
    assert "stopped, is resumed: run x-tuned" in said[0] and "stage.checkpoint=x-tuned" in dict(later.made)["x-adapted"]


def test_a_chain_with_other_overrides_is_refused(tmp_path: Path) -> None:
    chain, typed = load_chain(NAME, CONF), (f"experiment={NAME}", f"cluster.root={tmp_path}")
    launch_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), Launches(tmp_path, failing="x-aligned"), never, lambda text: None)
    with pytest.raises(ConfigRefused, match="run x-tower has finished with other overrides"):
        plan_chain(chain, (*typed, "run.steps=70"), "x", PROJECT, ConfFolder(project=CONF), tmp_path)


def test_a_step_that_finished_before_an_earlier_one_is_refused(tmp_path: Path) -> None:
    chain, typed = load_chain(NAME, CONF), (f"experiment={NAME}", f"cluster.root={tmp_path}")
    launch_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), Launches(tmp_path), never, lambda text: None)
    (tmp_path / "runs/x-aligned" / RECORD_FILE).unlink()
    assert find_newest("x", chain.steps[1].name, (tmp_path / "runs",)).status == "unfinished"
    with pytest.raises(ConfigRefused, match=r"step tuned has finished .* but the earlier step aligned has not"):
        plan_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), tmp_path)


def test_every_step_is_planned_before_the_first_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"experiment={NAME}", f"cluster.root={tmp_path}", "stage.quantization.scheme=nf4")
    assert cli.main(["launch", *words]) == 2
    assert not (tmp_path / "runs").exists() and "step tower" in capsys.readouterr().err


def test_a_chain_is_shown_before_it_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"experiment={NAME}", f"cluster.root={tmp_path}", "--run-id", "x"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{place + 1}  {name} " in shown for place, name in enumerate(STEPS)) and "run x-judged" in shown
    assert cli.main(["plan", "--json", f"experiment={NAME}"]) == 2 and "--json works for one run" in capsys.readouterr().err


def test_a_chain_is_resumed_with_visible_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch adds overrides of this machine, which it records: the plan of the chain has them too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    conf, (root, name) = ConfFolder(project=CONF), (f"cluster.root={tmp_path}", f"experiment={NAME}")
    chain = Chain(name=NAME, steps=(Step(name="a", words=("stage=projector",)), Step(name="b", words=("stage=full",))))
    typed = (name, root, "hardware=h200", "cluster.runtime=docker", "model=tiny_llava")
    planned = plan_chain(chain, typed, "x", PROJECT, conf, tmp_path)
    for step in planned.steps:
        assert {"cluster.nodes.0.devices=[0,1]", "cluster.devices_per_node=2"} < set(step.overrides)
        assert tuple(with_visible_devices(step.overrides, conf, os.environ)) == step.overrides, "a launch adds nothing more"
        assert step.plan.spec.device.world_size == 2
    Launches(tmp_path)(planned.steps[0].overrides, planned.steps[0].run_id)
    again = plan_chain(chain, typed, "x", PROJECT, conf, tmp_path)
    assert [step.newest.done for step in again.steps] == [True, False]


def test_the_weights_of_a_chain_are_judged_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 1}), encoding="utf-8")
    chain, typed = load_chain(NAME, CONF), (f"cluster.root={tmp_path}", f"model.source.path={tmp_path / 'weights'}", "model=tiny_llava")
    with pytest.raises(ConfigRefused, match=r"step tower .*\n.*weights holds none of the models of conf/model, not tiny_llava"):
        plan_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), tmp_path)


def test_a_refused_chain_says_what_it_took_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a single plan does: the devices were not typed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    words = (
        f"cluster.root={tmp_path}",
        "hardware=h200",
        "cluster.runtime=docker",
        "model=tiny_llava",
        "cluster.delivery.accept_licence=false",
    )
    typed = (f"experiment={NAME}", *words)
    chain = load_chain(NAME, CONF)
    planned = plan_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), tmp_path)
    note = describe_devices(os.environ, planned.steps[0].plan.overrides)
    assert note and "CUDA_VISIBLE_DEVICES" in note
    with pytest.raises(ConfigRefused) as refused:
        refuse_unlaunchable(planned)
    assert str(refused.value).endswith(note) and "cannot be launched" in str(refused.value)
    show_chain(chain, typed, "x", PROJECT, ConfFolder(project=CONF), print)
    shown = capsys.readouterr().out
    assert shown.count("note: NCCL_DEBUG=INFO in your environment is ignored") == 1 and "a launch is refused" in shown


def test_a_step_is_judged_for_the_bits_of_the_weights_that_it_will_get(copied: Path, tmp_path: Path) -> None:
    """Of NF4 weights that an earlier step makes; without them, OmniLMM-12B takes three times the memory of a P4."""
    quantized = (
        "stage=quantize, stage.quantization.scheme=nf4, stage.quantization.compare=false, 'stage.quantization.keep=[projector,head]'"
    )
    steps = f"- {{name: small, words: [{quantized}]}}\n- {{name: judged, words: [stage=evaluate, 'stage.checkpoint=@small']}}"
    (copied / "experiment" / "route.yaml").write_text(f"chain:\n{steps}\n", encoding="utf-8")
    words = ("experiment=route", "model=omnilmm_12b", "hardware=p4", "run.evaluation.batch=1")
    chain = find_chain(words, copied)
    assert chain is not None
    judged = plan_chain(chain, words, "C", PROJECT, ConfFolder(project=copied), tmp_path).steps[1].plan
    assert judged.memory is not None and judged.memory.fits and judged.memory.total_bytes < 8 * 2**30
    assert judged.config.stage.recorded is not None and judged.config.stage.recorded.kept == ("projector", "head")
