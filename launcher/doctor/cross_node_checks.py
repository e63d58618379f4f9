"""Checks that compare the nodes of a plan: differences make a run fail late, or give wrong results without an error. Pure."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from launcher.check.problem import Problem
from launcher.doctor.device_checks import used
from launcher.doctor.findings import EVERY_NODE, CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.network import NetworkChoice, choose_network
from launcher.doctor.offers import offer_devices
from launcher.memory.states import device_count
from trainer.contract.wording import plural

SKEW_WARNED_S = 1.0  # failures of several ranks are ordered by their time
SKEW_REFUSED_S = 60.0  # shared file systems and credentials refuse larger differences


def find_different(nodes: Sequence[CheckedNode], value: Callable[[CheckedNode], Hashable]) -> tuple[Any, dict[str, Any]]:
    """The value of most nodes (the first of equally frequent ones), and host -> value of the nodes that differ."""
    values = {node.host: value(node) for node in nodes}
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {host: found for host, found in values.items() if found != usual}


def check_same_architecture(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """One image is built for all nodes."""
    usual, different = find_different(nodes, lambda node: node.facts.machine)
    fix = "name nodes of one architecture in the cluster file: an image is built for one"
    return {host: failed(f"it is {found}, the others are {usual}", fix) for host, found in different.items()} or same(usual)


def check_same_chips(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """Of the devices that the run takes: a node may have others."""

    def chips(node: CheckedNode) -> str:
        return ", ".join(sorted({device.name for device in used(node)})) or "no device"

    usual, different = find_different(nodes, chips)
    fix = "name nodes with one kind of chip in the cluster file: all wait for the slowest, and kernels differ"
    return {host: failed(f"it has {found}, the others have {usual}", fix) for host, found in different.items()} or same(usual)


def check_same_count(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """More devices than the run takes are only a warning; HCCL advises the same count on every server."""
    usual, different = find_different(nodes, lambda node: len(node.facts.devices))
    wanted, least = device_count(nodes[0].plan.config), min(len(node.facts.devices) for node in nodes)
    fix = "name nodes with the same number of devices in the cluster file"
    offered = offer_devices(nodes[0], least) if least < wanted else ""
    return {
        host: (failed if found < wanted else warned)(
            f"it has {plural(found, 'device')}, the others have {usual}; the run takes {wanted} of each",
            f"{offered}; or {fix}" if offered else fix,
        )
        for host, found in different.items()
    } or same(f"{plural(usual, 'device')}")


def check_same_driver(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    usual, different = find_different(nodes, lambda node: node.facts.driver or "unknown")
    fix = f"install driver {usual} there: mixed drivers are not tested, and results may differ"
    return {host: warned(f"driver {found}, the others have {usual}", fix) for host, found in different.items()} or same(f"driver {usual}")


def check_clocks(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """The least difference that two clocks certainly have; each is known within the time that the question took."""
    found: dict[str, CheckResult] = {}
    for node in nodes:
        skew_s = max(least_difference_s(node, other) for other in nodes)
        text = f"its clock differs from another node's by at least {skew_s:.1f} s"
        if skew_s > SKEW_WARNED_S:
            found[node.host] = (failed if skew_s > SKEW_REFUSED_S else warned)(text, "sudo timedatectl set-ntp true, or start chronyd")
    return found or same(f"clocks within {SKEW_WARNED_S:g} s of each other")


def least_difference_s(node: CheckedNode, other: CheckedNode) -> float:
    first, second = node.facts.clock, other.facts.clock
    return max(first.behind_s - second.ahead_s, second.behind_s - first.ahead_s, 0.0)


def check_distinct(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """Two lines of the cluster file may name one machine. Cloned machines share ids, but neither boot ids nor addresses."""
    seen: dict[Hashable, str] = {}
    found: dict[str, CheckResult] = {}
    for node in nodes:
        facts = node.facts
        identity = (facts.hostname, facts.boot, tuple(each.address for each in facts.network.interfaces))
        first = seen.setdefault(identity, node.host)
        if first != node.host:
            text = f"it is the same machine as {first} ({facts.hostname})"
            found[node.host] = failed(text, "name each machine once in the cluster file")
    return found or same(f"{len(nodes)} machines")


def networks_of(nodes: Sequence[CheckedNode]) -> tuple[NetworkChoice, ...] | Problem:
    return choose_network([node.node for node in nodes], [node.facts.network for node in nodes])


def check_network(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    choices = networks_of(nodes)
    if isinstance(choices, Problem):
        index = int(choices.key.partition("[")[2].rstrip("]"))
        return {nodes[index].node.host: failed(choices.what, " or ".join(choices.changes) or "connect it to the network of the others")}
    return same(", ".join(sorted({f"{choice.interface}: {choice.why}" for choice in choices})))


def check_same_mtu(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """With different MTUs small messages pass and large ones are lost: a run hangs at its first all-reduce."""
    choices = networks_of(nodes)
    if isinstance(choices, Problem):
        return {EVERY_NODE: unchecked("there is no network that all nodes are in")}
    names = {node.host: choice.interface for node, choice in zip(nodes, choices, strict=True)}

    def mtu(node: CheckedNode) -> int:
        return next(each.mtu for each in node.facts.network.interfaces if each.name == names[node.host])

    usual, different = find_different(nodes, mtu)
    return {
        host: warned(f"MTU {found} on {names[host]}, the others have {usual}", f"sudo ip link set {names[host]} mtu {usual}")
        for host, found in different.items()
    } or same(f"MTU {usual}")


def check_same_contents(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """Files are compared by sha256, folders by the names and sizes of their files."""
    found: dict[str, list[str]] = {}
    for path in nodes[0].facts.contents:
        having = {node.host: node for node in nodes if node.facts.contents[path].digest}
        digests = {host: node.facts.contents[path].digest for host, node in having.items()}
        usual = Counter(digests.values()).most_common(1)[0][0] if digests else ""
        for host, digest in digests.items():
            if digest != usual:
                found.setdefault(host, []).append(f"{path} is {digest[:12]}, on the others {usual[:12]}")
    fix = "rsync -a --checksum PATH HOST:PATH from a node that has the right one"
    return {host: failed("\n".join(texts), fix) for host, texts in found.items()} or same("data and model are the same")


def check_same_image(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """By id. Sending replaces an older image; a node that pulls keeps the one it has under that tag. Nodes that build for themselves have
    different ids: there the tag stands for the content, and a launch compares the whole fingerprint."""
    having, plan = [node for node in nodes if node.facts.image_id], nodes[0].plan
    if not having:
        return same("no node has the image yet")
    if plan.config.cluster.delivery.kind == "build_on_nodes":
        return same(f"built by {len(having)} of {plural(len(nodes), 'node')}, each for itself")
    usual, different = find_different(having, lambda node: node.facts.image_id)
    result = failed if plan.config.cluster.delivery.kind == "pull" else warned
    return {
        host: result(f"{plan.image.tag} has the id {found[:19]}, on the others {usual[:19]}", f"docker image rm {plan.image.tag}")
        for host, found in different.items()
    } or same(f"one id on {len(having)} of {plural(len(nodes), 'node')}")


def same(evidence: str) -> dict[str, CheckResult]:
    return {EVERY_NODE: passed(evidence)}
