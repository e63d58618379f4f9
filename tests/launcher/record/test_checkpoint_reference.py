"""The values of stage.checkpoint, and the folder that the nodes get for each."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.check.start import write_start_notes
from launcher.config.compose import compose
from launcher.config.schema import Config, Node
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.record.checkpoint_reference import resolve_checkpoint, with_full_ids
from launcher.record.record import SourceState, open_run
from trainer.contract import CHECKPOINTS, SCHEMA
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILE

CONF = Path(__file__).resolve().parents[3] / "conf"
SOURCE = SourceState(commit="", dirty=False)
REMOTE = "/srv/omnilaunch/runs/R"


def config_for(text: str, *words: str, hosts: tuple[str, ...] = ()) -> Config:
    stage = () if any(word.startswith("stage=") for word in words) else ("stage=lora",)
    config = compose([*stage, *words], CONF)
    nodes = tuple(Node(host=host) for host in hosts) or config.cluster.nodes
    root = config.cluster.root if not hosts else "/srv/omnilaunch"
    return replace(config, cluster=replace(config.cluster, nodes=nodes, root=root), stage=replace(config.stage, checkpoint=text))


@pytest.fixture
def run(plan_for: Callable[..., Plan], tmp_path: Path) -> Path:
    """The folder of a run on this machine that has saved nothing yet."""
    return open_run(plan_for(f"cluster.root={tmp_path}"), SOURCE)


def save(run: Path, step: int, *, whole: bool = True, base: str = "") -> Path:
    folder = run / CHECKPOINTS / CHECKPOINT_NAME.format(step=step)
    folder.mkdir(parents=True)
    (folder / "weights").write_text("1234")
    if base:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    state = {"schema": SCHEMA, "step": step, "weights_sha256": "", "data_sha256": "", "world_size": 0, "spec": {}}
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": {"weights": 4 if whole else 5}}))
    return folder


def remote_run(
    tmp_path: Path, plan: Plan, *, host: str = "gpu1", shared: bool = False, checkpoint: str = "checkpoints/step-000007"
) -> Path:
    """What this machine has of a run on other nodes: its plan and its record."""
    folder = open_run(replace(plan, folder=str(tmp_path / "runs/R")), SOURCE)
    plain: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    plain["spec"]["output"], plain["commands"][0]["host"], plain["config"]["cluster"]["shared"] = REMOTE, host, shared
    (folder / "plan.json").write_text(json.dumps(plain))
    if checkpoint is not None:
        (folder / "result.json").write_text(json.dumps({"checkpoint": checkpoint}))
    return folder


def resolved(config: Config, tmp_path: Path) -> str:
    return resolve_checkpoint(config, tmp_path / "runs").stage.checkpoint


def test_a_run_id_or_a_runs_folder_means_its_newest_complete_checkpoint(run: Path, tmp_path: Path) -> None:
    save(run, 10)
    newest = save(run, 1000000)
    save(run, 2000000, whole=False)
    (run / CHECKPOINTS / ".step-3000000.partial").mkdir()
    assert resolved(config_for("R"), tmp_path) == resolved(config_for(str(run)), tmp_path) == str(newest)
    assert resolved(config_for(str(save(run, 5))), tmp_path) == str(run / CHECKPOINTS / "step-000005"), "a checkpoint is itself"
    assert resolve_checkpoint(config_for("R"), tmp_path / "elsewhere", tmp_path / "runs").stage.checkpoint == str(newest)


def test_a_run_is_named_by_a_prefix_or_last_and_one_of_its_steps(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole, newest = save(run, 10), save(run, 20)
    save(run, 30, whole=False)
    (tmp_path / "runs/R").rename(tmp_path / "runs/Run-7")
    newest, whole = (tmp_path / "runs/Run-7" / path.relative_to(run) for path in (newest, whole))
    for text, wanted in (("last", newest), ("Ru", newest), ("last/10", whole), ("Run-7/step-000010", whole), ("R/step-10", whole)):
        assert resolved(config_for(text), tmp_path) == str(wanted), text
        (full,) = with_full_ids((f"stage.checkpoint={text}",), tmp_path / "runs")
        assert full.startswith("stage.checkpoint=Run-7"), "the full id is recorded"
    for text, said in (("R/40", "no checkpoint of step 40; it has: step-000010, step-000020"), ("R/30", "incomplete: weights missing")):
        with pytest.raises(ConfigRefused, match=said):
            resolved(config_for(text), tmp_path)
    unchanged = (
        "run.seed=1",
        "stage.checkpoint=Run-7",
        "stage.checkpoint=/R/10",
        "stage.checkpoint=gpu1:/R",
        "run.force=last",
        "stage.checkpoint=",
    )
    assert with_full_ids(unchanged, tmp_path / "runs") == unchanged
    assert with_full_ids(("run.evaluation.base='last'",), tmp_path / "runs") == ("run.evaluation.base=Run-7",)


def test_an_ambiguous_prefix_is_refused_and_a_folder_is_taken_before_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("abc", "abd"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigRefused, match=r"stage\.checkpoint=ab: 'ab' is the beginning of 2 run ids"):
        resolved(config_for("ab"), tmp_path)
    (tmp_path / "ab").mkdir()
    assert resolved(config_for("ab"), tmp_path) == "ab"


def test_a_run_without_a_whole_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match=r"stage\.checkpoint=R: that run saved no checkpoint\. See .*result\.json"):
        resolved(config_for("R"), tmp_path)
    save(run, 10, whole=False)
    with pytest.raises(ConfigRefused, match=r"no checkpoint of that run is complete: step-000010: weights missing or not of the size"):
        resolved(config_for("R"), tmp_path)


def test_a_missing_checkpoint_is_refused_if_all_nodes_are_local(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/folder").mkdir(parents=True)
    with pytest.raises(ConfigRefused, match=r"stage\.checkpoint=Q: there is no folder and no run of this name in .*the newest are: R"):
        resolved(config_for("Q"), tmp_path)
    for text in ("some/foldr", "n" * 300, "/nowhere/at/all"):
        with pytest.raises(ConfigRefused, match=r"there is no folder and no run of this name"):
            resolved(config_for(text), tmp_path)
    for text in ("some/folder", "./some/folder", ""):
        assert resolved(config_for(text), tmp_path) == text
    assert resolved(config_for("/nodes/only", hosts=("gpu1",)), tmp_path) == "/nodes/only"


def test_a_checkpoint_of_this_machine_is_synced_to_remote_nodes(run: Path, tmp_path: Path) -> None:
    newest = save(run, 10, base="/srv/base")
    config = resolve_checkpoint(config_for("R", "cluster.runtime=docker", hosts=("gpu1", "gpu2")), tmp_path / "runs")
    assert config.stage.checkpoint == str(newest)
    assert config.cluster.sync == (str(newest), "/srv/base")
    assert config.cluster.mounts == ("/srv/base",), "an adapter is of no use in a container that lacks its base"
    assert resolve_checkpoint(config_for("R"), tmp_path / "runs").cluster.sync == (), "nothing to bring to where it is"


def test_the_checkpoint_of_a_remote_run_is_used_on_the_node_that_has_it(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    remote_run(tmp_path, plan_for())
    assert resolved(config_for("R", hosts=("gpu1",)), tmp_path) == f"{REMOTE}/checkpoints/step-000007"
    with pytest.raises(
        ConfigRefused, match=r"the checkpoint is on gpu1 only, and these nodes of the run do not have it: gpu2.*scp -r gpu1:/srv/"
    ):
        resolved(config_for("R", hosts=("gpu1", "gpu2")), tmp_path)
    with pytest.raises(ConfigRefused, match=r"the checkpoint is on gpu1, which is not a node of this run"):
        resolved(config_for("R", hosts=("gpu2",)), tmp_path)
    with pytest.raises(ConfigRefused, match=r"the checkpoint is on gpu1, which is not"):
        resolved(config_for("R"), tmp_path)


def test_a_remote_run_whose_nodes_share_its_folder(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    remote_run(tmp_path, plan_for(), shared=True)
    assert resolved(config_for("R", hosts=("gpu1", "gpu2")), tmp_path).endswith("step-000007")


@pytest.mark.parametrize(("checkpoint", "said"), [(None, "has not ended.*omnilaunch attach R"), ("", "saved no checkpoint")])
def test_a_remote_run_without_a_checkpoint_is_refused(checkpoint: str, said: str, plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    remote_run(tmp_path, plan_for(), checkpoint=checkpoint)
    with pytest.raises(ConfigRefused, match=said):
        resolved(config_for("R", hosts=("gpu1",)), tmp_path)


def test_a_node_without_a_name_is_written_as_scp_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match=r"scp -r '\[fd00::5\]:/srv/my runs/step-000001' FOLDER"):
        resolved(config_for("[fd00::5]:/srv/my runs/step-000001", hosts=("gpu2",)), tmp_path)


@pytest.mark.parametrize("text", ["gpu1:/srv/c/step-000001", "ann@gpu1:/srv/c/step-000001"])
def test_a_folder_on_a_node_is_named_as_scp_does(text: str, tmp_path: Path) -> None:
    assert resolved(config_for(text, hosts=("gpu1",)), tmp_path) == "/srv/c/step-000001"
    assert resolved(config_for(text, "cluster.shared=true", hosts=("gpu1", "gpu2")), tmp_path) == "/srv/c/step-000001"
    with pytest.raises(ConfigRefused, match="the checkpoint is on gpu1, which is not a node of this run"):
        resolved(config_for(text, hosts=("gpu2",)), tmp_path)


@pytest.mark.parametrize("text", ["typo", "typo/300"])
@pytest.mark.parametrize("words", [("stage=merge",), ("stage=evaluate",), ()])
def test_a_run_that_does_not_exist_is_refused_on_a_cluster_too(text: str, words: tuple[str, ...], run: Path) -> None:
    config = config_for(text, *words, hosts=("gpu1",))
    with pytest.raises(ConfigRefused, match=rf"stage.checkpoint={text}: there is no folder and no run of this name.*/PATH/FOLDER"):
        resolve_checkpoint(config, run.parent)


def test_a_folder_of_the_nodes_is_allowed_and_said_to_be_unread(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for("/data/base", "stage=merge", "model=tiny_internvl", hosts=("gpu1",))
    assert resolve_checkpoint(config, run.parent).stage.checkpoint == "/data/base"
    assert any("did not look into it: it is planned as an adapter of tiny_internvl" in note for note in write_start_notes(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert resolve_checkpoint(config_for("weights", hosts=("gpu1",)), run.parent).stage.checkpoint == "weights"
    assert not list(write_start_notes(config_for(str(tmp_path / "weights"))))
