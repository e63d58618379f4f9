"""The plan of a run that is resumed: what overrides may change, what must be accepted, and what is refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from launcher.bench.paused_run import PausedRun, read_paused_run
from launcher.bench.rerun import accepted_kinds
from launcher.bench.resume import KINDS, LEARNING, ResumePlan, can_change, kind_of_change, plan_resume
from launcher.bench.worktree import Tree
from launcher.config.conf_folder import ConfFolder
from launcher.config.key import list_keys
from launcher.errors import ConfigRefused
from launcher.image.licence import licence_of
from launcher.image.stack import load_stacks
from launcher.plan.plan import LocalContext, Plan
from launcher.record.record import SourceState, write_record
from tests.launcher.planted import write_run
from tests.launcher.run.test_resume import save, stopped_record
from trainer import contract
from trainer.contract.checkpoint_files import fixed_settings

PROJECT = Path(__file__).resolve().parents[3]
PLACE = LocalContext(project=PROJECT, here=Path("/elsewhere"), interpreter="/python", user="1000:1000")
ENVIRON = {"HOME": "/home/ann"}
LAB = ("cluster=example", "cluster.runtime=docker", "hardware=ascend910b", "model=qwen2_5_vl_7b", "precision=bf16")


@pytest.fixture
def paused(tmp_path: Path, plan_for: Callable[..., Plan]) -> Callable[..., PausedRun]:
    def write(*words: str, status: str = "stopped") -> PausedRun:
        plan = plan_for(f"cluster.root={tmp_path}", *words)
        folder = tmp_path / "runs" / plan.run_id
        plan = replace(plan, folder=str(folder), spec=replace(plan.spec, output=str(folder)) if plan.is_local else plan.spec)
        write_run(folder, plan)
        contract.write(plan.spec, folder / "spec.json")
        write_record(replace(stopped_record(plan.run_id), status=status), folder)  # type: ignore[arg-type]
        return read_paused_run(folder)

    return write


def resume(
    run: PausedRun,
    *overrides: str,
    accept: tuple[str, ...] = (),
    tree: Tree | None = None,
    environ: Mapping[str, str] = ENVIRON,
    conf: Path | ConfFolder = PROJECT / "conf",
) -> ResumePlan:
    tree = tree or Tree(project=PROJECT)
    return plan_resume(run, overrides, accept, tree, PLACE, environ, conf=conf)


def test_without_overrides_the_recorded_plan_is_used(paused: Callable[..., PausedRun]) -> None:
    run = paused("run.steps=40", "stage.optimizer.lr=0.004")
    planned = resume(run)
    assert replace(planned.plan.spec, expects=None) == run.plan.spec and planned.changes == () and planned.notes == ()
    assert planned.plan.folder == str(run.folder) and planned.plan.run_id == run.run_id
    assert planned.plan.commands[0].folder == str(run.folder), "from any folder, since a relative one was relative to another"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("run.save_every=5",), {"run.save_every": "5"}),
        (("run.stop_timeout_s=60", "run.restarts=3"), {"run.stop_timeout_s": "60", "run.restarts": "3"}),
        (("run.trackers=[]", "run.keep_checkpoints=7"), {"run.trackers": "[]", "run.keep_checkpoints": "7"}),
        (("run.evaluation.every=10",), {"run.evaluation.every": "10"}),
    ],
)
def test_what_changes_nothing_that_is_learned_is_allowed_and_recorded(
    paused: Callable[..., PausedRun], words: tuple[str, ...], changes: dict[str, str]
) -> None:
    run = paused()
    planned = resume(run, *words)
    assert {change.key: change.new for change in planned.changes} == changes and not any(change.kind for change in planned.changes)
    assert fixed_settings(planned.plan.spec) == fixed_settings(run.plan.spec)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (
            ("run.steps=400",),
            "steps",
            "run.steps: 300 → 400; the learning rate of the remaining steps follows the linear schedule over 400",
        ),
        (("data=digits_even",), "data", "data.builtin: digits → digits_even"),
        (("cluster.devices_per_node=2",), "nodes", "cluster.devices_per_node: null → 2"),
        (("strategy.micro_batch=4",), "strategy", "strategy.micro_batch: "),
        (("cluster.environment.A=b",), "variable", "cluster.environment.A: null → b"),
    ],
)
def test_what_changes_the_rest_of_the_run_must_be_accepted_by_name(
    paused: Callable[..., PausedRun], words: tuple[str, ...], kind: str, said: str
) -> None:
    run = paused("run.steps=300")
    with pytest.raises(ConfigRefused) as caught:
        resume(run, *words)
    assert f"  {kind}: {said}" in str(caught.value)
    assert f"--resume {run.run_id} {' '.join(words)} --accept {kind}" in str(caught.value), "the command that is offered works"
    planned = resume(run, *words, accept=(kind,))
    assert kind in {change.kind for change in planned.changes} and any(said in note for note in planned.notes)
    assert planned.plan.spec.accepted_changes == ((kind,) if kind in ("steps", "data") else ())


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, rows: int) -> str:
        text = [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": str(row)}]} for row in range(rows)]
        (tmp_path / name).write_text(json.dumps(text), encoding="utf-8")
        return str(tmp_path / name)

    return write


def paused_of_epochs(paused: Callable[..., PausedRun], own: Callable[..., str]) -> PausedRun:
    file = own("rows.json", 40)
    run = paused("data=files", f"data.train={file}", "data.rows=40", "stage.global_batch=8", "run.steps=15", "stage.optimizer.warmup=3")
    config, spec = run.plan.config, run.plan.spec
    plan = replace(
        run.plan,
        config=replace(config, run=replace(config.run, epochs=3.0)),
        spec=replace(spec, data=replace(spec.data, rows=40)),
        overrides=("data=files", f"data.train={file}", "stage.global_batch=8", "run.epochs=3"),
    )
    return replace(run, recorded=replace(run.recorded, plan=plan))


def test_a_run_of_epochs_gets_more_steps_or_more_epochs(paused: Callable[..., PausedRun], own: Callable[..., str]) -> None:
    run = paused_of_epochs(paused, own)
    steps = resume(run, "run.steps=20", accept=("steps",)).plan
    assert (steps.spec.steps, steps.config.run.epochs, steps.spec.data.rows) == (20, None, 0)
    assert steps.overrides[-1] == "run.steps=20" and "run.epochs=3" not in steps.overrides, "a launch takes only one of them"
    with pytest.raises(ConfigRefused, match=r"(?s)  steps: run\.steps: 15 → 20.*run\.epochs=4 --accept steps"):
        resume(run, "run.epochs=4")
    epochs = resume(run, "run.epochs=4", accept=("steps",)).plan
    assert (epochs.spec.steps, epochs.config.run.steps, epochs.config.run.epochs, epochs.spec.data.rows) == (20, 20, 4.0, 40)
    assert epochs.spec.accepted_changes == ("steps",) and fixed_settings(epochs.spec) | {"steps": 15} == fixed_settings(run.plan.spec)


def test_the_rows_of_other_data_are_counted(paused: Callable[..., PausedRun], own: Callable[..., str]) -> None:
    run = paused_of_epochs(paused, own)
    more, few = own("more.json", 60), own("few.json", 4)
    for words in ((f"data.train={more}",), (f"data.train={more}", "data.rows=60")):
        plan = resume(run, *words, accept=("data",)).plan
        assert (plan.config.data.rows, plan.spec.steps, plan.config.run.epochs, plan.spec.data.rows) == (60, 15, None, 0)
    plan = resume(run, f"data.train={more}", "run.epochs=4", accept=("data", "steps")).plan
    assert (plan.spec.steps, plan.spec.data.rows, plan.spec.accepted_changes) == (30, 60, ("steps", "data"))
    with pytest.raises(ConfigRefused, match=r"8 samples, but data\.train has 4 rows") as refused:
        resume(run, f"data.train={few}", "run.steps=20", accept=("data", "steps"))
    assert "would pass" not in str(refused.value), "a resume refuses another batch"
    assert f"start a new run from its weights, with what else it needs: omnilaunch launch stage.checkpoint={run.run_id} data.train=" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ("stage.global_batch=8", False), ("strategy.micro_batch=4", True), ("strategy.micro_batch=4 stage.global_batch=8", False),
        ("hardware=h200", True), ("cluster.devices_per_node=1", True), ("stage=lora", False), ("model=tiny_llava", False),
        ("precision=pure_bf16", False), ("cluster.runtime=docker cluster.root=/srv/omnilaunch", False), ("run.steps=9", True),
        ("data.max_length=64", False),
    ],
)  # fmt: skip
def test_only_changes_that_a_resume_takes_are_offered(offered: str, taken: bool) -> None:
    assert can_change(offered) is taken


def test_the_same_file_with_other_rows_is_counted_where_it_is_accepted(paused: Callable[..., PausedRun], own: Callable[..., str]) -> None:
    run = paused_of_epochs(paused, own)
    own("rows.json", 48)
    assert resume(run).plan.spec.data.rows == 40, "the trainer refuses it"
    plan = resume(run, accept=("data",)).plan
    assert (plan.config.data.rows, plan.spec.data.rows, plan.spec.steps) == (48, 0, 15)


def test_a_constant_learning_rate_does_not_depend_on_the_steps(paused: Callable[..., PausedRun]) -> None:
    run = paused("run.steps=300", "stage.optimizer.schedule=constant", "stage.optimizer.warmup=2")
    assert resume(run, "run.steps=400", accept=("steps",)).notes == ("run.steps: 300 → 400",)


def test_a_variable_that_is_not_used_is_named(paused: Callable[..., PausedRun]) -> None:
    said = ("TORCH_LOGS=+dynamo in your environment is ignored: write cluster.environment.TORCH_LOGS=+dynamo",)
    assert resume(paused(), environ={**ENVIRON, "TORCH_LOGS": "+dynamo"}).notes == said


def test_the_files_of_the_config_are_those_of_the_record(paused: Callable[..., PausedRun], tmp_path: Path) -> None:
    """The next commands name the user's own folder, and `--accept code` judges these files."""
    own, files = tmp_path / "lab", ("conf/stage/projector.yaml", f"{tmp_path}/lab/data/mine.yaml")
    own.mkdir()
    run = paused()
    run = replace(run, recorded=replace(run.recorded, plan=replace(run.plan, conf=str(own), files=files)))
    assert (resume(run).plan.conf, resume(run).plan.files) == (str(own), files)
    plan = resume(run, "data=digits_even", "run.save_every=5", accept=("data",)).plan
    assert plan.files == (files[0], "conf/data/digits_even.yaml")
    other = ConfFolder(project=PROJECT / "conf", own=tmp_path)
    assert resume(run, conf=other).plan.options == ("--conf", str(tmp_path))
    own.rmdir()
    assert resume(run).plan.options == (), "no command can name a folder that is gone"


def test_what_was_accepted_once_holds_for_later_attempts(paused: Callable[..., PausedRun]) -> None:
    """The newest checkpoint may be from before it."""
    run = paused("run.steps=300")
    longer = resume(run, "run.steps=400", accept=("steps",)).plan
    again = replace(run, recorded=replace(run.recorded, plan=longer))
    assert resume(again).plan.spec.accepted_changes == ("steps",) and resume(again).plan.spec.steps == 400


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage.optimizer.lr=0.5",), "stage.optimizer.lr: 0.002 → 0.5"),
        (("run.seed=2",), "run.seed: 1 → 2"),
        (("model=tiny_qwen2_5_vl",), "model.name: tiny_llava → tiny_qwen2_5_vl"),
        (("precision=bf16",), "precision.weights: float32 → bfloat16"),
        (("stage.global_batch=8",), "stage.global_batch: "),
        (("data.max_length=200",), "data.max_length: "),
        (("run.deterministic=true",), "run.deterministic: false → true"),
    ],
)
def test_what_would_change_what_is_learned_is_refused_with_a_new_run(
    paused: Callable[..., PausedRun], words: tuple[str, ...], said: str
) -> None:
    run = paused()
    with pytest.raises(ConfigRefused, match="change what it learns") as caught:
        resume(run, *words, accept=KINDS)
    assert said in str(caught.value) and f" stage.checkpoint={run.run_id} {' '.join(words)}" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cluster.runtime=docker",), "cluster.runtime: process → docker"),
        (("cluster=example", "cluster.runtime=docker"), "cluster: this machine → other machines"),
    ],
)
def test_a_run_does_not_move_to_where_its_files_are_not(paused: Callable[..., PausedRun], words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigRefused, match="cannot move there") as caught:
        resume(paused(), *words, accept=KINDS)
    assert said in str(caught.value)


def test_a_licence_that_was_accepted_before_is_no_change(paused: Callable[..., PausedRun]) -> None:
    run = paused(*LAB)
    known = licence_of(load_stacks(PROJECT / "images")[run.plan.config.hardware.stack].licence)
    assert known is not None
    asked = replace(PLACE, accepted={known.sha256: "2026-11-21"})
    planned = plan_resume(
        run, (), (), Tree(project=PROJECT), PLACE, ENVIRON, conf=PROJECT / "conf", context_for=lambda config, stacks, project: asked
    )
    assert planned.changes == () and planned.plan.config.cluster.delivery.accept_licence
    assert planned.plan.licence is not None and planned.plan.licence.accepted_at == "2026-11-21"


def test_other_nodes_are_reported_by_name_and_the_strategy_follows(paused: Callable[..., PausedRun]) -> None:
    run = paused(*LAB)
    nodes = "cluster.nodes=[{host: new1}, {host: new2}]"
    with pytest.raises(ConfigRefused) as caught:
        resume(run, nodes)
    assert "nodes: cluster.nodes: " in str(caught.value) and "→ new1, new2" in str(caught.value)
    assert "--accept nodes" in str(caught.value)
    planned = resume(run, nodes, accept=("nodes",))
    assert [command.host for command in planned.plan.commands] == ["new1", "new2"]
    assert planned.plan.commands[0].name == run.plan.commands[0].name


def test_a_finished_run_gets_more_steps_or_a_new_run(paused: Callable[..., PausedRun]) -> None:
    run = paused("run.steps=300", status="finished")
    with pytest.raises(ConfigRefused, match=r"is finished: all 300 steps are done.*launch .*run\.steps=300 stage\.checkpoint=R$") as caught:
        resume(run, "run.save_every=3")
    assert "--resume" not in str(caught.value), "no checkpoint of it could be resumed"
    save(run.folder, 250)
    with pytest.raises(ConfigRefused, match=r"launch --resume R run\.steps=600 --accept steps"):
        resume(run)
    assert resume(run, "run.steps=600", accept=("steps",)).plan.spec.steps == 600


def test_a_run_that_ended_early_would_end_there_again(paused: Callable[..., PausedRun]) -> None:
    run = paused("run.steps=300", "run.evaluation.every=10", "run.early_stop.patience=2", status="finished")
    assert run.record is not None
    run = replace(run, record=replace(run.record, ended="stopped early at step 40"))
    save(run.folder, 30)
    for words in ((), ("run.steps=600",)):
        with pytest.raises(
            ConfigRefused, match=r"ended early \(stopped early at step 40\), and would end there again.*stage\.checkpoint=R$"
        ) as caught:
            resume(run, *words, accept=("steps",))
        assert "for more steps" not in str(caught.value)


def test_other_code_must_be_accepted(paused: Callable[..., PausedRun]) -> None:
    tree = Tree(project=PROJECT, differs=("trainer/a.py",), why="commit abc is not here")
    with pytest.raises(ConfigRefused, match=r"this tree differs in trainer/a\.py\n.*--accept code|(.|\n)*--accept code"):
        resume(paused(), tree=tree)


def test_an_older_trainer_is_not_given_keys_that_it_does_not_know(paused: Callable[..., PausedRun]) -> None:
    run = paused("run.steps=300")
    spec = (run.folder / "spec.json").read_text(encoding="utf-8")
    (run.folder / "spec.json").write_text(spec.replace('"accepted_changes"', '"other"').replace('"expects"', '"others"'), encoding="utf-8")
    older = Tree(project=PROJECT, is_recorded=True, why="older")
    assert resume(run, tree=older).plan.spec.expects is None
    with pytest.raises(ConfigRefused, match="cannot resume with other steps"):
        resume(run, "run.steps=400", accept=("steps",), tree=older)


def test_unknown_kinds_are_refused() -> None:
    assert accepted_kinds(["steps,data", "nodes"], KINDS) == ("steps", "data", "nodes")
    with pytest.raises(ConfigRefused, match="--accept step: did you mean 'steps'"):
        accepted_kinds(["step"], KINDS)


def config_keys_of_the_spec() -> Iterator[str]:
    """Keys of the config that reach the settings which every checkpoint must have in common."""
    for key in list_keys():
        axis, _, rest = key.partition(".")
        if axis in ("model", "stage", "precision") and rest not in ("title", "notes"):
            yield key


def test_a_key_that_no_rule_names_would_change_what_is_learned() -> None:
    assert {kind_of_change(key) for key in config_keys_of_the_spec()} == {LEARNING}
    assert kind_of_change("run.something_new") == LEARNING and kind_of_change("data.max_pixels") == LEARNING
    assert is_dataclass(SourceState) and all(field.name for field in fields(SourceState))
