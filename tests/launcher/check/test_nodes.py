"""Clusters that cannot work, each named before anything is reached."""

import time
from collections.abc import Callable

import pytest

from launcher.check.nodes import is_placeholder
from launcher.cli import main
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


@pytest.mark.parametrize(
    ("host", "placeholder"),
    [
        ("192.0.2.11", True), ("198.51.100.1", True), ("203.0.113.255", True), ("2001:db8::7", True), ("[2001:db8::7]", True),
        ("node1.example.com", True), ("Example.ORG.", True), ("gpu.example", True), ("x.invalid", False),
        ("192.0.3.1", False), ("10.0.0.1", False), ("gpu1", False), ("example", False), ("example.co", False), ("myexample.com", False),
        ("fd00::1", False),
    ],
)  # fmt: skip
def test_addresses_of_documentation_are_known(host: str, placeholder: bool) -> None:
    assert is_placeholder(host) is placeholder


def test_placeholders_can_be_planned_and_not_launched(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=example", "hardware=h200", "model=tiny_llava", "cluster.delivery.accept_licence=true"]
    said = "192.0.2.11, 192.0.2.12 are placeholders, reserved for documentation"
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("planned; a launch is refused:") and said in printed and "next: omnilaunch launch" not in printed
    began = time.monotonic()
    assert main(["launch", *words]) == 4
    assert main(["doctor", *words]) == 4
    assert time.monotonic() - began < 60
    assert capsys.readouterr().err.count("Copy conf/cluster/example.yaml to conf/cluster/YOURS.yaml, set the addresses") == 2
