"""Which way the image takes, and what is said of a path that a node lacks."""

from pathlib import Path
from typing import Any

import pytest

from launcher import preparation
from launcher.errors import NodeFailed
from launcher.interrupt import StopRequest
from launcher.plan import Plan
from launcher.preparation import Desk, bring_image, bring_paths, start_ranks
from launcher.transport import Local
from tests.launcher.hospital import CPU, LOCAL, PlanFor

WAYS = ("pull", "ship", "build", "find", "build_on", "sync")


def desk_for(plan: Plan) -> Desk:
    here = Local({})
    return Desk(
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
