"""A plan is made from a record: recorded values are kept, differences are refused, and the code is found. No run is started here."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.bench import worktree as tree_module
from launcher.bench.rerun import KINDS, Rerun, accepted_kinds, plan_rerun
from launcher.bench.worktree import Tree, differing_files, find_tree
from launcher.cli import parse
from launcher.config.compose import compose, compose_over
from launcher.config.schema import Config, Delivery
from launcher.errors import ConfigRefused, RunEnded
from launcher.image.licence import OVERRIDE, AcceptedLicence
from launcher.image.stack import Stack, load_stacks, render
from launcher.plan.machine import Machine
from launcher.plan.plan import LocalContext, Plan, carry_over, encode_spec, move_plan
from launcher.record.record import open_run
from launcher.record.recorded_run import RecordedRun, load_recorded_run
from launcher.record.source import SourceState, SourceTree, read_source
from launcher.run import launch
from tests.launcher.fake_nodes import CPU
from tests.launcher.run.test_resume import save
from trainer.contract import Expectation, Inputs, TrainSpec, decode, facts_of

PROJECT = Path(__file__).resolve().parents[3]
GOLDEN = PROJECT / "tests/golden/record"
HERE = LocalContext(project=PROJECT, here=Path("/home/bob/elsewhere"), interpreter="/venv/bin/python", user="1000:1000")


@pytest.fixture(scope="module")
def recorded() -> RecordedRun:
    """The golden record, as if this tree had made it."""
    found = load_recorded_run(GOLDEN / "1")
    image = render(load_stacks(PROJECT / "images")["cpu"], architecture="x86_64", root=PROJECT)
    return replace(
        found,
        plan=replace(found.plan, image=image),
        lock="torch==2.13.0+cpu\nNumPy==2.4.6\n",
        inputs=Inputs(schema=1, data={"train.json": "1"}, weights={"checkpoint/model.safetensors": "2"}),
    )


def rerun(recorded: RecordedRun, *overrides: str, accepted: tuple[str, ...] = (), tree: Tree | None = None) -> Rerun:
    return plan_rerun(recorded, overrides, accepted, tree or Tree(project=PROJECT), HERE, {}, conf=PROJECT / "conf", run_id="again")


def test_only_the_folder_of_the_run_changes(recorded: RecordedRun) -> None:
    made = rerun(recorded, "cluster.root=.")
    before, now = recorded.plan, made.plan
    assert now.spec.output == "/home/bob/elsewhere/runs/again" and now.spec.data.root == "/home/bob/elsewhere/.cache/data"
    place = {"run_id": "again", "output": now.spec.output, "data": now.spec.data, "expects": now.spec.expects}
    assert replace(before.spec, **place) == now.spec  # type: ignore[arg-type]
    assert (now.rerun_of, now.accepted, now.config.run) == ("golden", (), before.config.run)
    assert made.notes == () and made.project == PROJECT


def test_the_recorded_root_is_used_if_none_is_given(recorded: RecordedRun) -> None:
    assert rerun(recorded).plan.spec.output == "/home/ann/work/runs/again"


def test_the_expectations_of_the_ranks(recorded: RecordedRun) -> None:
    expects = rerun(recorded, "cluster.root=.").plan.spec.expects
    assert expects is not None and expects.run_id == "golden"
    assert expects.data_sha256 == recorded.record.data_sha256 and expects.weights == {"checkpoint/model.safetensors": "2"}
    assert expects.facts["threads"] == "2" and expects.facts["variable OMP_NUM_THREADS"] == "2" and expects.facts["python"] == "3.11.7"
    packages = {key for key in expects.facts if key.startswith("package ")}
    assert packages == {"package torch", "package numpy"}, "those of the lock: what else is installed there changes nothing"
    assert not {"variable OMNILAUNCH_RUN_ID", "variable MASTER_PORT"} & expects.facts.keys()


def test_a_later_launcher_keeps_the_recorded_values(recorded: RecordedRun) -> None:
    """As if a default had changed since: the recorded value is kept, in the spec and in the environment."""
    spec = replace(recorded.plan.spec, loss_chunk=77, gradient_checkpointing=True)
    command = recorded.plan.commands[0]
    command = replace(command, environment={**command.environment, "TOKENIZERS_PARALLELISM": "true"})
    older = replace(recorded, plan=replace(recorded.plan, spec=spec, commands=(command,)))
    plan = rerun(older).plan
    assert (plan.spec.loss_chunk, plan.spec.gradient_checkpointing) == (77, True)
    assert plan.commands[0].environment["TOKENIZERS_PARALLELISM"] == "true"
    assert rerun(older, "strategy.loss_chunk=5").plan.spec.loss_chunk == 5, "but what is asked for is done"


def test_an_override_changes_its_key_only(recorded: RecordedRun) -> None:
    plan = rerun(recorded, "run.seed=7", "cluster.environment.MKL_CBWR=COMPATIBLE").plan
    assert plan.spec.seed == 7 and replace(plan.spec, seed=1, expects=None, run_id="golden").steps == recorded.plan.spec.steps
    assert plan.spec.expects is not None and "variable MKL_CBWR" in plan.spec.expects.free
    assert plan.overrides == (*recorded.plan.overrides, "run.seed=7", "cluster.environment.MKL_CBWR=COMPATIBLE")
    words = rerun(recorded, "run.steps=9").plan.overrides
    assert "run.steps=3" not in words and words[-1] == "run.steps=9", "as they would be typed to launch it"


def test_the_files_of_the_config_are_those_of_the_record(recorded: RecordedRun, tmp_path: Path) -> None:
    files = ("conf/stage/projector.yaml", f"{tmp_path}/model/mine.yaml")
    mine = replace(recorded, plan=replace(recorded.plan, conf=str(tmp_path), files=files))
    assert (rerun(mine).plan.conf, rerun(mine).plan.files) == (str(tmp_path), files)
    assert rerun(mine, "run.seed=7", "data=digits_even").plan.files == (*files, "conf/data/digits_even.yaml")


def test_the_variables_that_a_rerun_does_not_use_are_named(recorded: RecordedRun) -> None:
    environ = {"TORCH_LOGS": "+dynamo"}
    made = plan_rerun(recorded, (), (), Tree(project=PROJECT), HERE, environ, conf=PROJECT / "conf", run_id="again")
    assert made.notes == ("TORCH_LOGS=+dynamo in your environment is ignored: write cluster.environment.TORCH_LOGS=+dynamo",)


def test_other_hardware_expects_the_same_data_and_weights_alone(recorded: RecordedRun) -> None:
    plan = rerun(recorded, "hardware=rtx3090", "cluster.delivery.accept_licence=true", "cluster.runtime=docker").plan
    assert plan.config.hardware.name == "rtx3090" and plan.config.precision == recorded.plan.config.precision
    assert plan.spec.device.backend == "nccl" and plan.image.stack == "cuda126"
    assert plan.spec.expects is not None and plan.spec.expects.facts == {}
    assert plan.spec.expects.data_sha256 and plan.spec.expects.weights


def test_a_process_of_the_cpu_starts_in_the_image_of_other_hardware(recorded: RecordedRun) -> None:
    def runtime(*overrides: str) -> str:
        return rerun(recorded, *overrides, "cluster.delivery.accept_licence=true").plan.config.cluster.runtime

    assert recorded.plan.config.cluster.runtime == runtime() == runtime("hardware=cpu") == "process"
    assert runtime("hardware=rtx3090") == "docker" and runtime("hardware=rtx3090", "cluster=local") == "docker"
    assert runtime("hardware=rtx3090", "cluster.runtime=process") == "process"
    typed = replace(recorded, plan=replace(recorded.plan, overrides=("cluster.runtime=process",)))
    assert rerun(typed, "hardware=rtx3090").plan.config.cluster.runtime == "process", "as it was typed for the recorded run"


def test_a_licence_that_another_user_accepted_is_asked_for_again(recorded: RecordedRun) -> None:
    """What was part of the recorded command stays part of it."""
    cluster = replace(recorded.plan.config.cluster, runtime="docker", delivery=Delivery(accept_licence=True))
    hardware = compose(("hardware=p4",), PROJECT / "conf").hardware
    config = replace(recorded.plan.config, cluster=cluster, hardware=hardware)
    for how, problems in ((OVERRIDE, []), ("omnilaunch licence accept cuda", ["cluster.delivery.accept_licence"])):
        licence = AcceptedLicence(name="cuda", sha256="ab", how=how)
        made = rerun(replace(recorded, plan=replace(recorded.plan, config=config, licence=licence)))
        assert [problem.key for problem in made.plan.verdict.problems] == problems


def test_this_machine_is_asked_for_the_rerun_and_not_for_the_record(recorded: RecordedRun) -> None:
    asked = []

    def context_for(config: Config, stacks: Mapping[str, Stack], project: Path) -> LocalContext:
        asked.append(config.hardware.name)
        return replace(HERE, machine=Machine(interpreter="/venv/bin/python", has_docker=False))

    words = ("hardware=rtx3090", "cluster.delivery.accept_licence=true")
    made = plan_rerun(recorded, words, (), Tree(project=PROJECT), HERE, {}, conf=PROJECT / "conf", run_id="again", context_for=context_for)
    assert asked == ["rtx3090"] and "no docker command" in made.plan.verdict.problems[0].what


@pytest.mark.parametrize(("kind", "key"), [("package", "package torch"), ("variable", "variable DS_ACCELERATOR"), ("threads", "threads")])
def test_an_accepted_kind_is_not_checked(recorded: RecordedRun, kind: str, key: str) -> None:
    whole, less = (rerun(recorded, accepted=accepted).plan.spec.expects for accepted in ((), (kind,)))
    assert whole is not None and less is not None and key in whole.facts and key not in less.facts
    assert rerun(recorded, accepted=("data", "weights")).plan.spec.expects == replace(whole, data_sha256="", weights={})


def test_an_unknown_kind_is_refused() -> None:
    assert accepted_kinds(("code,data", "code")) == ("code", "data")
    with pytest.raises(ConfigRefused, match=r"--accept pakage: did you mean 'package'\?"):
        accepted_kinds(("pakage",))
    assert {"code", "data", "weights", "image", "driver", "threads", "variable"} <= set(KINDS)


def test_other_threads_are_another_expectation(recorded: RecordedRun) -> None:
    expects = rerun(recorded, "hardware.threads=1").plan.spec.expects
    assert expects is not None and "threads" not in expects.facts and "variable OMP_NUM_THREADS" in expects.free


def test_a_record_without_hashes_of_weights_says_so(recorded: RecordedRun) -> None:
    spec = recorded.plan.spec
    bare = replace(recorded, inputs=None, plan=replace(recorded.plan, spec=replace(spec, stage=replace(spec.stage, checkpoint="/c/x"))))
    assert rerun(bare).notes == ("the record has no hashes of the weights in /c/x",)


# ------------------------------------------------------------------------------------------------------------------- code


def test_code_that_differs_is_refused_until_it_is_accepted(recorded: RecordedRun) -> None:
    other = Tree(project=PROJECT, differs=("lock.txt", "trainer/train/loop.py"), why="commit c0ffee is not here")
    with pytest.raises(
        ConfigRefused, match=r"(?s)code: this tree differs in lock\.txt, trainer/train/loop\.py\n  commit c0ffee.*--accept code"
    ):
        rerun(recorded, tree=other)
    assert "accepted" in rerun(recorded, tree=other, accepted=("code",)).notes[0]


def test_the_same_tree_does_not_differ(recorded: RecordedRun) -> None:
    assert differing_files(recorded, PROJECT) == ()


@pytest.fixture
def clone(tmp_path: Path, recorded: RecordedRun) -> tuple[Path, RecordedRun]:
    """A separate tree with one commit, and a record made from it."""
    project = tmp_path / "clone"
    for name in ("images", "trainer", "launcher", "conf"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    commands = (("init", "-q"), ("add", "."), ("-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "first"))
    for words in commands:
        subprocess.run(("git", *words), cwd=project, check=True)
    commit = subprocess.run(("git", "rev-parse", "HEAD"), cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    return project, replace(recorded, source=replace(recorded.source, commit=commit, record_schema=2))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("trainer/train/loop.py", "trainer/train/loop.py"),
        ("images/locks/cpu-x86_64.txt", "lock.txt"),
        ("images/cpu.Dockerfile.j2", "Dockerfile"),
        ("images/entrypoint.sh", "entrypoint.sh"),
    ],
)
def test_the_recorded_commit_is_used_if_the_tree_has_changed(clone: tuple[Path, RecordedRun], tmp_path: Path, file: str, name: str) -> None:
    project, recorded = clone
    with (project / file).open("a") as opened:
        opened.write("# moved on\n")
    tree = find_tree(recorded, project, tmp_path / "scratch")
    assert tree.is_recorded and not tree.differs and name in tree.why
    assert "moved on" not in (tree.project / file).read_text() and differing_files(recorded, tree.project) == ()
    assert find_tree(recorded, project, tmp_path / "scratch").project == tree.project, "and found again"


def test_a_recorded_tree_with_changes_is_restored(clone: tuple[Path, RecordedRun], tmp_path: Path) -> None:
    project, recorded = clone
    (project / "trainer/train/loop.py").write_text((project / "trainer/train/loop.py").read_text() + "# not committed\n")
    image = render(load_stacks(project / "images")["cpu"], architecture="x86_64", root=project)
    source = read_source(project)
    dirty = replace(recorded, source=source.state, diff=source.diff, plan=replace(recorded.plan, image=image))
    subprocess.run(("git", "checkout", "-q", "."), cwd=project, check=True)
    tree = find_tree(dirty, project, tmp_path / "scratch")
    assert tree.is_recorded and (tree.project / "trainer/train/loop.py").read_text().endswith("# not committed\n")
    for broken in (replace(dirty, diff=b"x"), replace(dirty, source=replace(source.state, diff_lacks="all of it"))):
        assert find_tree(broken, project, tmp_path / "other").differs == ("trainer/train/loop.py",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"commit": "0" * 40}, "git fetch origin 000"),
        ({"commit": ""}, "names no commit"),
        ({"dirty": True, "record_schema": 1}, "records of schema 1 do not hold them"),
    ],
)
def test_a_commit_that_is_not_available_is_reported(
    clone: tuple[Path, RecordedRun], tmp_path: Path, change: dict[str, object], why: str
) -> None:
    project, recorded = clone
    (project / "trainer/train/loop.py").write_text("")
    source = replace(recorded.source, **change)  # type: ignore[arg-type]
    tree = find_tree(replace(recorded, source=source), project, tmp_path)
    assert tree.differs == ("trainer/train/loop.py",) and why in tree.why


def test_a_changed_or_incomplete_worktree_is_reported(clone: tuple[Path, RecordedRun], tmp_path: Path) -> None:
    project, recorded = clone
    (project / "trainer/train/loop.py").write_text("")
    made = find_tree(recorded, project, tmp_path).project
    (made / "trainer/kernels/cross_entropy.py").unlink()
    tree = find_tree(recorded, project, tmp_path)
    assert (
        tree.differs == ("trainer/train/loop.py",)
        and f"differs too, in trainer/kernels/cross_entropy.py: git worktree remove --force {made}" in tree.why
    )


def test_a_full_disk_is_reported_in_few_lines(clone: tuple[Path, RecordedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git prints a line for every file that it could not write."""
    project, recorded = clone
    (project / "trainer/train/loop.py").write_text("")
    (tmp_path / "file").touch()
    assert "could not be checked out" in find_tree(recorded, project, tmp_path / "file").why
    ask = tree_module.git

    def full(project: Path, *words: str) -> bytes:
        if words[:2] != ("worktree", "add"):
            return ask(project, *words)
        said = "".join(f"error: unable to write file {number}\n" for number in range(600))
        raise subprocess.CalledProcessError(128, words, stderr=f"{said}fatal: Could not reset index file\n".encode())

    monkeypatch.setattr(tree_module, "git", full)
    why = find_tree(recorded, project, tmp_path).why
    assert why.endswith("unable to write file 0\n... 599 more lines\nfatal: Could not reset index file")


def test_words_and_options_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse by itself takes the words before the first option alone."""
    asked = parse(["rerun", "first", "run.seed=2", "--accept", "code", "cluster.root=.", "--run-id", "again", "run.steps=9"])
    assert (asked.run, list(asked.overrides), asked.run_id) == ("first", ["run.seed=2", "cluster.root=.", "run.steps=9"], "again")
    assert parse(["runs", "prune", "--keep", "1", "stage=lora"]).words == ["prune", "stage=lora"]
    for words in (
        ["rerun", "first", "--run-id", "again", "--acept=code"],
        ["status", "a", "b=c"],
    ):
        with pytest.raises(SystemExit):
            parse(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_an_older_trainer_gets_a_spec_that_it_can_read(recorded: RecordedRun, tmp_path: Path) -> None:
    raw = json.loads((GOLDEN / "1/spec.json").read_text())
    assert "expects" not in raw
    made = rerun(recorded, tree=Tree(project=PROJECT, why="moved on", is_recorded=True))
    assert made.plan.spec.expects is None and "does not check what it finds" in made.notes[-1] and made.original.older
    written = json.loads(encode_spec(made.plan.spec, like=GOLDEN / "1/spec.json"))
    assert written.keys() == raw.keys() and decode(TrainSpec, written) == made.plan.spec


# ------------------------------------------------------------------------------------------------------------------ parts


def test_overrides_over_a_config_that_is_there(recorded: RecordedRun) -> None:
    config = recorded.plan.config
    changed = compose_over(config, ("stage=lora", "run.steps=9", "data.train='a, b.json'"), PROJECT / "conf")
    assert changed.stage.lora is not None and changed.run.steps == 9 and changed.data.train == "a, b.json"
    assert (changed.model, changed.run.seed, changed.cluster) == (config.model, config.run.seed, config.cluster)
    for wrong, said in (
        ("run.stepz=1", "did you mean"),
        ("run.steps=x", "whole number"),
        ("experiment=a", "several sections|unknown experiment"),
    ):
        with pytest.raises(ConfigRefused, match=said):
            compose_over(config, (wrong,), PROJECT / "conf")


def test_carry_over() -> None:
    kept, before = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 9, "b": {"c": 8, "d": 7}, "e": 0}
    assert carry_over(kept, before, {"a": 9, "b": {"c": 5, "d": 7}, "e": 0}) == {"a": 1, "b": {"c": 5, "d": 3}, "e": 0}


def test_facts_do_not_name_hosts_and_ports(recorded: RecordedRun) -> None:
    assert recorded.environment is not None
    facts = facts_of(recorded.environment)
    assert facts["device 0"] == "Intel(R) Xeon(R) Processor @ 2.50GHz" and facts["package deepspeed"] == "0.19.8"
    assert not any("MASTER_" in key or "TORCHELASTIC" in key for key in facts)


def test_a_rerun_that_restarts_on_other_nodes_keeps_the_recorded_values(plan_for: Callable[..., Plan]) -> None:
    """Another network of the same nodes changes nothing; with fewer nodes, the values of all nodes are not expected."""
    plan = plan_for(*CPU)
    expects = Expectation(run_id="first", data_sha256="d", facts={"world_size": "2"})
    rerun_plan = replace(plan, spec=replace(plan.spec, loss_chunk=77, expects=expects))
    cluster, stacks = plan.config.cluster, load_stacks(PROJECT / "images")
    same = move_plan(rerun_plan, replace(cluster, rendezvous_port=29777), stacks, HERE)
    assert (same.spec.loss_chunk, same.spec.expects) == (77, expects)
    fewer = move_plan(rerun_plan, replace(cluster, nodes=cluster.nodes[:1]), stacks, HERE)
    assert fewer.spec.device.world_size < plan.spec.device.world_size
    assert fewer.spec.loss_chunk == 77 and fewer.spec.expects == replace(expects, facts={})


def test_a_full_disk_ends_the_launch_with_a_clear_error(
    plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*given: object, **named: object) -> Path:
        raise OSError(28, r"No space left on device")

    monkeypatch.setattr(launch, "open_run", full)
    session = SimpleNamespace(project=tmp_path, say=print)
    with pytest.raises(RunEnded, match=r"runs/R could not be written: No space left on device\. Free some disk space there"):
        launch.launch(plan_for(), SourceTree(state=SourceState(commit="", dirty=False)), session)  # type: ignore[arg-type]


def test_a_checkpoint_of_a_rerun_is_named_as_everywhere(recorded: RecordedRun, tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    """By `last`, or by the beginning of an id; the plan has the folder, and its overrides the whole id."""
    for run_id, model in (("first-1", recorded.plan.config.model.name), ("other-2", "tiny_internvl")):
        plan = plan_for(f"cluster.root={tmp_path}", f"model={model}")
        plan = replace(plan, run_id=run_id, folder=str(tmp_path / "runs" / run_id))
        plan = replace(plan, spec=replace(plan.spec, run_id=run_id, output=plan.folder))
        save(open_run(plan, SourceState(commit="", dirty=False)), 3)
    place = replace(HERE, here=tmp_path)

    def again(*words: str) -> Plan:
        return plan_rerun(recorded, words, (), Tree(project=PROJECT), place, {}, conf=PROJECT / "conf", run_id="again").plan

    folder = str(tmp_path / "runs/first-1/checkpoints/step-000003")
    for text in ("first", "first-1", "first/3", folder):
        plan = again(f"stage.checkpoint={text}")
        assert plan.spec.stage.checkpoint == folder
        full = {"first": "first-1", "first/3": "first-1/3"}.get(text, text)
        assert f"stage.checkpoint={full}" in plan.overrides
    with pytest.raises(ConfigRefused, match=r"is not the model of run other-2"):
        again("stage.checkpoint=last")
    with pytest.raises(ConfigRefused, match=r"there is no folder and no run of this name"):
        again("stage.checkpoint=nothing")
