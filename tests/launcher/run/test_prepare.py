"""How the image is delivered, and the error for a path that a node does not have."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import ImageFailed, NodeFailed
from launcher.plan.plan import Plan
from launcher.run import prepare as preparation
from launcher.run.prepare import (
    deliver_image,
    record_image_ids,
    start_ranks,
    sync_paths,
)
from launcher.run.session import Session
from launcher.run.signals import StopRequest
from launcher.ssh.transport import Local
from tests.launcher.fake_nodes import CPU, LOCAL, PlanFor

WAYS = ("pull", "ship", "build", "find", "build_on", "sync")


def session_for(plan: Plan) -> Session:
    here = Local({})
    return Session(
        project=Path("/nowhere"), transports=(here,) * len(plan.commands), here=here, secrets={}, say=lambda text: None, terminal=False,
        move=lambda plan, lost: (plan, session_for(plan)),
    )  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The functions that were called -> their positional arguments."""
    called: dict[str, tuple[Any, ...]] = {}
    for way in WAYS:
        monkeypatch.setattr(preparation, way, lambda *given, way=way, **named: called.__setitem__(way, given) or "sha256:1")
    monkeypatch.setattr(preparation, "is_everywhere", lambda *given: False)
    return called


@pytest.mark.parametrize("words", [CPU, (*CPU, "cluster.delivery.kind=build_on_nodes")])
def test_an_image_that_all_nodes_have_is_not_delivered(
    plan_for: PlanFor, taken: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(preparation, "is_everywhere", lambda tag, fingerprint, nodes: len(nodes) == 2 and tag.endswith(fingerprint[:12]))
    plan = plan_for(*words)
    deliver_image(plan, session_for(plan))
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
def test_the_image_is_delivered_as_the_config_says(
    plan_for: PlanFor, taken: dict[str, tuple[Any, ...]], words: tuple[str, ...], ways: set[str]
) -> None:
    plan = plan_for(*words)
    deliver_image(plan, session_for(plan))
    assert set(taken) == ways
    if "ship" in ways:
        assert [peer.address for peer in taken["ship"][2]] == [node.address for node in plan.config.cluster.working]


def test_paths_are_copied_only_to_other_machines(plan_for: PlanFor, taken: dict[str, tuple[Any, ...]]) -> None:
    plan = plan_for(*LOCAL, "cluster.sync=[/data]")
    sync_paths(plan, session_for(plan))
    assert not taken
    plan = plan_for(*CPU, "cluster.sync=[/data]")
    sync_paths(plan, session_for(plan))
    assert taken["sync"][0] == ("/data",) and len(taken["sync"][1]) == 2


def test_a_missing_path_is_named_with_the_option_that_copies_it(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(*CPU, "cluster.sync=[/base]")
    said = "docker: Error response from daemon: invalid mount config for type \"bind\": bind source path does not exist: /d/my set.\nSee 'docker run --help'."

    def refuse(*given: Any) -> None:
        raise NodeFailed(said)

    monkeypatch.setattr(preparation, "start_trainers", refuse)
    with pytest.raises(NodeFailed, match=r"Next: cluster\.sync=\[/base,/d/my set\] copies it there"):
        start_ranks(plan, session_for(plan), StopRequest())
    said = "docker: no space left on device"
    with pytest.raises(NodeFailed) as caught:
        start_ranks(plan, session_for(plan), StopRequest())
    assert str(caught.value) == said


def test_image_ids_are_recorded_and_an_image_that_differs_from_the_record_is_refused(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = replace(plan_for(*CPU), folder=str(tmp_path))
    ids = {command.host: f"sha256:{place}" for place, command in enumerate(plan.commands)}
    monkeypatch.setattr(preparation, "images_on", lambda nodes, tag: [SimpleNamespace(id=ids[node.command.host]) for node in nodes])
    record_image_ids(plan, session_for(plan))
    assert json.loads((tmp_path / "images.json").read_text()) == ids and len(ids) == 2
    record_image_ids(replace(plan, image_id=", ".join(ids.values())), session_for(plan))
    second = list(ids)[1]
    with pytest.raises(
        ImageFailed, match=rf"(?s)not the image that run first had, sha256:0:\n  image on {second}: sha256:1\n.*--accept image"
    ):
        record_image_ids(replace(plan, image_id="sha256:0", rerun_of="first"), session_for(plan))


def test_an_image_that_was_built_again_since_the_run_began_is_reported(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, said = replace(plan_for(*CPU), folder=str(tmp_path)), list[str]()
    session = replace(session_for(plan), say=said.append)
    for built in ("a", "a", "b"):
        monkeypatch.setattr(
            preparation, "images_on", lambda nodes, tag, built=built: [SimpleNamespace(id=f"sha256:{built}") for _ in nodes]
        )
        record_image_ids(plan, session)
        assert bool(said) == (built == "b")
    assert said == [
        f"{command.host}: image {plan.image.tag} was built again since this run began: sha256:a → sha256:b, of the same files"
        for command in plan.commands
    ]
