"""Which way the image takes, and what is said of a path that a node lacks and of data that cannot be trained on."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import ConfigRefused, ImageFailed, NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan
from launcher.record.record import read_images
from launcher.run import prepare as preparation
from launcher.run.prepare import (
    Session,
    bring_image,
    bring_paths,
    changed_data,
    fetch_problems,
    refuse_data,
    settle_image,
    start_ranks,
)
from launcher.run.signals import StopRequest
from launcher.ssh.transport import Local
from tests.launcher.fake_nodes import CPU, LOCAL, PlanFor
from trainer import contract
from trainer.contract import DATA_FILE, DATA_PROBLEMS_FILE, SCHEMA, DataProblem, DataReport

WAYS = ("pull", "ship", "build", "find", "build_on", "sync")


def desk_for(plan: Plan) -> Session:
    here = Local({})
    return Session(
        project=Path("/nowhere"), transports=(here,) * len(plan.commands), here=here, secrets={}, say=lambda text: None, terminal=False,
        move=lambda plan, lost: (plan, desk_for(plan)),
    )  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Way -> the arguments by place that it was called with."""
    called: dict[str, tuple[Any, ...]] = {}
    for way in WAYS:
        monkeypatch.setattr(preparation, way, lambda *given, way=way, **named: called.__setitem__(way, given) or "sha256:1")
    monkeypatch.setattr(preparation, "is_everywhere", lambda *given: False)
    return called


@pytest.mark.parametrize("words", [CPU, (*CPU, "cluster.delivery.kind=build_on_nodes")])
def test_an_image_that_all_nodes_have_takes_no_way(
    plan_for: PlanFor, taken: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(preparation, "is_everywhere", lambda tag, fingerprint, sites: len(sites) == 2 and tag.endswith(fingerprint[:12]))
    plan = plan_for(*words)
    bring_image(plan, desk_for(plan))
    assert not taken


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        (CPU, {"build", "ship"}),
        ((*CPU, "cluster.delivery.kind=ship"), {"find", "ship"}),
        ((*CPU, "cluster.delivery.kind=pull", "cluster.delivery.registry=registry.example/x"), {"pull"}),
        ((*CPU, "cluster.delivery.kind=build_on_nodes"), {"build_on"}),
        ((*LOCAL, "cluster.runtime=docker"), {"build"}),
        ((*LOCAL, "cluster.runtime=docker", "cluster.delivery.kind=build_on_nodes"), {"build"}),
    ],
)
def test_the_image_takes_the_way_that_is_named(
    plan_for: PlanFor, taken: dict[str, tuple[Any, ...]], words: tuple[str, ...], ways: set[str]
) -> None:
    plan = plan_for(*words)
    bring_image(plan, desk_for(plan))
    assert set(taken) == ways
    if "ship" in ways:
        assert [peer.address for peer in taken["ship"][2]] == [node.address for node in plan.config.cluster.working]


def test_paths_are_copied_to_other_machines_alone(plan_for: PlanFor, taken: dict[str, tuple[Any, ...]]) -> None:
    plan = plan_for(*LOCAL, "cluster.sync=[/data]")
    bring_paths(plan, desk_for(plan))
    assert not taken
    plan = plan_for(*CPU, "cluster.sync=[/data]")
    bring_paths(plan, desk_for(plan))
    assert taken["sync"][0] == ("/data",) and len(taken["sync"][1]) == 2


def test_a_path_that_a_node_lacks_is_named_with_what_brings_it(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(*CPU, "cluster.sync=[/base]")
    said = "docker: Error response from daemon: invalid mount config for type \"bind\": bind source path does not exist: /d/my set.\nSee 'docker run --help'."

    def refuse(*given: Any) -> None:
        raise NodeFailed(said)

    monkeypatch.setattr(preparation, "start_members", refuse)
    with pytest.raises(NodeFailed, match=r"Next: cluster\.sync=\[/base,/d/my set\] copies it there"):
        start_ranks(plan, desk_for(plan), StopRequest())
    said = "docker: no space left on device"
    with pytest.raises(NodeFailed) as caught:
        start_ranks(plan, desk_for(plan), StopRequest())
    assert str(caught.value) == said


# -------------------------------------------------------------------------------------------------------------- bad data


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """A data check that has ended on a node, whose folder of the run lies elsewhere, with 60 problems of which the report has 50."""
    (tmp_path / "node").mkdir()
    (tmp_path / "here").mkdir()
    problems = tuple(
        DataProblem(file="/d/rows.json", row=row, field="image", problem="no such file", fix="put it there") for row in range(1, 61)
    )
    report = DataReport(
        schema=SCHEMA, sha256="", train_rows=90, evaluation_rows=0, images=0, problems=problems[:50], problem_count=len(problems)
    )  # fmt: skip
    contract.write(report, tmp_path / "node" / DATA_FILE)
    (tmp_path / "node" / DATA_PROBLEMS_FILE).write_text("".join(f"{json.dumps(asdict(problem))}\n" for problem in problems))
    command = NodeCommand(
        host="192.0.2.11", node_rank=0, runtime="docker", name="c", folder=str(tmp_path / "node"), environment={}, prepare=(), start=()
    )
    return SimpleNamespace(command=command)


def desk_here(plan: Plan) -> Session:
    here = Local({"PATH": os.environ["PATH"]})
    return replace(desk_for(plan), transports=(here,), here=here)


def test_all_problems_come_here_and_the_refusal_says_where(plan_for: PlanFor, tmp_path: Path, check: Any) -> None:
    here = tmp_path / "here"
    fetch_problems(here, desk_here(plan_for(*CPU)), check)
    rows = [json.loads(line)["row"] for line in (here / DATA_PROBLEMS_FILE).read_text().splitlines()]
    assert rows == list(range(1, 61))
    with pytest.raises(ConfigRefused) as caught:
        refuse_data(here, check)
    said = str(caught.value)
    assert "the data on 192.0.2.11 cannot be trained on (60 problem(s))" in said
    assert said.count("/d/rows.json row ") == 20 and "... and 40 more" in said
    assert said.endswith(f"all of them, a JSON object a line: {here / DATA_PROBLEMS_FILE}")


def test_a_list_that_does_not_come_is_named_where_it_lies(
    plan_for: PlanFor, tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.run.run_folder.FOLDER_BYTES", (tmp_path / "node" / DATA_FILE).stat().st_size)
    (tmp_path / "node" / DATA_PROBLEMS_FILE).write_text("x" * 2**20)
    fetch_problems(tmp_path / "here", desk_here(plan_for(*CPU)), check)
    assert [path.name for path in (tmp_path / "here").iterdir()] == [DATA_FILE]
    with pytest.raises(ConfigRefused) as caught:
        refuse_data(tmp_path / "here", check)
    assert str(caught.value).endswith(f"192.0.2.11:{tmp_path / 'node' / DATA_PROBLEMS_FILE}")


def test_the_image_that_each_node_has_is_kept_and_another_than_the_recorded_one_refused(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = replace(plan_for(*CPU), folder=str(tmp_path))
    ids = {command.host: f"sha256:{place}" for place, command in enumerate(plan.commands)}
    monkeypatch.setattr(preparation, "image_on", lambda site, tag: SimpleNamespace(id=ids[site.command.host]))
    settle_image(plan, desk_for(plan))
    assert read_images(tmp_path) == ids and len(ids) == 2
    settle_image(replace(plan, image_id=", ".join(ids.values())), desk_for(plan))
    second = list(ids)[1]
    with pytest.raises(
        ImageFailed, match=rf"(?s)not the image that run first had, sha256:0:\n  image on {second}: sha256:1\n.*--accept image"
    ):
        settle_image(replace(plan, image_id="sha256:0", rerun_of="first"), desk_for(plan))


def test_in_a_rerun_the_files_that_changed_are_named(tmp_path: Path) -> None:
    for name, data in (("recorded_inputs.json", {"a": "1", "b": "2", "c": "3"}), ("inputs.json", {"a": "1", "b": "4", "d": "3"})):
        contract.write(contract.Inputs(schema=SCHEMA, data=data), tmp_path / name)
    assert changed_data(tmp_path) == ["b: another file", "c: missing", "d: new"]
    (tmp_path / "inputs.json").unlink()
    assert changed_data(tmp_path) == []
