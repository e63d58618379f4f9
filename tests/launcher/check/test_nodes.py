"""Clusters that cannot work, each named before anything is reached."""

from collections.abc import Callable

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan

A, B = "{host: 192.0.2.1, address: 192.0.2.1, interface: eth0}", "{host: 192.0.2.2, address: 192.0.2.2, interface: eth0}"
DOCKER = "cluster.runtime=docker"


def nodes(*texts: str) -> str:
    return f"cluster.nodes=[{', '.join(texts)}]"


@pytest.mark.parametrize(("overrides", "words"), [
    ((DOCKER, nodes(A, "{host: localhost}")), ("this machine is listed as localhost next to 192.0.2.1",)),
    ((DOCKER, nodes(A, "{host: 192.0.2.2}")), ("no interface is set for 192.0.2.2",)),
    ((DOCKER, nodes(A), "cluster.delivery.kind=pull"), ("is empty, but cluster.delivery.kind=pull", "cluster.delivery.kind=build")),
])  # fmt: skip
def test_what_cannot_work(plan_for: Callable[..., Plan], overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigRefused) as caught:
        plan_for(*overrides, "cluster.root=/srv/omnilaunch")
    for word in words:
        assert word in str(caught.value)


def test_two_nodes_and_a_spare_can(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(DOCKER, nodes(A, B, "{host: 192.0.2.3, interface: eth0, spare: true}"), "cluster.root=/srv/omnilaunch")
    assert [command.host for command in plan.commands] == ["192.0.2.1", "192.0.2.2"]
    assert plan.folder == "/home/ann/work/runs/R" and plan.spec.output == "/srv/omnilaunch/runs/R" and plan.verdict.ok
