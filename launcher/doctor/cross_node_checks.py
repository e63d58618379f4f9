"""Checks that hold the nodes against each other: what differs makes a run fail late, or not fail and be wrong. Pure."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from launcher.check.problem import Problem
from launcher.doctor.device_checks import used
from launcher.doctor.findings import EVERY_NODE, Case, CheckResult, fine, unchecked, warn, wrong
from launcher.doctor.network import NetworkChoice, choose_network
from launcher.memory.states import device_count

SKEW_WARNED_S = 1.0  # the failures of several ranks are put in order by their time
SKEW_REFUSED_S = 60.0  # shared file systems and credentials refuse more


def odd_ones(cases: Sequence[Case], value: Callable[[Case], Hashable]) -> tuple[Hashable, dict[str, Hashable]]:
    """What most nodes have (of equals the first), and host -> what it has instead."""
    values = {case.node.host: value(case) for case in cases}
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {host: found for host, found in values.items() if found != usual}


def check_same_architecture(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """One image is built for all nodes."""
    usual, odd = odd_ones(cases, lambda case: case.facts.machine)
    fix = "nodes of one architecture in the cluster file: an image is built for one"
    return {host: wrong(f"it is {found}, the others are {usual}", fix) for host, found in odd.items()} or agreed(str(usual))


def check_same_chips(cases: Sequence[Case]) -> dict[str, CheckResult]:
    usual, odd = odd_ones(cases, chips)
    fix = "nodes of one chip in the cluster file: the slowest sets the pace, and kernels differ"
    return {host: wrong(f"it has {found}, the others have {usual}", fix) for host, found in odd.items()} or agreed(str(usual))


def chips(case: Case) -> str:
    """Of the devices that the run takes: a node may have others."""
    return ", ".join(sorted({device.name for device in used(case)})) or "no device"


def check_same_count(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """More than the run takes is no harm; HCCL advises the same count on every server."""
    usual, odd = odd_ones(cases, lambda case: len(case.facts.devices))
    wanted = device_count(cases[0].plan.config)
    least = min(len(case.facts.devices) for case in cases)
    return {
        host: (wrong if int(str(found)) < wanted else warn)(
            f"it has {found} device(s), the others have {usual}, {wanted} are used on each", f"cluster.devices_per_node={least}"
        )
        for host, found in odd.items()
    } or agreed(f"{usual} device(s)")


def check_same_driver(cases: Sequence[Case]) -> dict[str, CheckResult]:
    usual, odd = odd_ones(cases, lambda case: case.facts.driver)
    fix = f"install driver {usual} there: mixed ones are tried by nobody, and results may differ"
    return {host: warn(f"driver {found or 'unknown'}, the others have {usual}", fix) for host, found in odd.items()} or agreed(
        f"driver {usual or 'unknown'}"
    )


def check_clocks(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """The least that two clocks surely differ by, each known within the time that asking took."""
    found: dict[str, CheckResult] = {}
    for case in cases:
        skew_s = max(surely_apart(case, other) for other in cases)
        text = f"its clock is at least {skew_s:.1f} s off another node's"
        if skew_s > SKEW_WARNED_S:
            found[case.node.host] = (wrong if skew_s > SKEW_REFUSED_S else warn)(text, "sudo timedatectl set-ntp true, or start chronyd")
    return found or agreed(f"clocks within {SKEW_WARNED_S:g} s of each other")


def surely_apart(case: Case, other: Case) -> float:
    mine, theirs = case.facts.clock, other.facts.clock
    return max(mine.behind_s - theirs.ahead_s, theirs.behind_s - mine.ahead_s, 0.0)


def check_distinct(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """Two lines of the cluster file may reach one machine by two names. Cloned machines share ids, but neither boots nor addresses."""
    seen: dict[Hashable, str] = {}
    found: dict[str, CheckResult] = {}
    for case in cases:
        facts = case.facts
        identity = (facts.hostname, facts.boot, tuple(each.address for each in facts.view.interfaces))
        first = seen.setdefault(identity, case.node.host)
        if first != case.node.host:
            found[case.node.host] = wrong(
                f"it is the same machine as {first} ({facts.hostname})", "name each machine once in the cluster file"
            )
    return found or agreed(f"{len(cases)} machines")


def networks_of(cases: Sequence[Case]) -> tuple[NetworkChoice, ...] | Problem:
    return choose_network([case.node for case in cases], [case.facts.view for case in cases])


def check_network(cases: Sequence[Case]) -> dict[str, CheckResult]:
    choices = networks_of(cases)
    if isinstance(choices, Problem):
        place = int(choices.key.partition("[")[2].rstrip("]"))
        return {cases[place].node.host: wrong(choices.what, " or ".join(choices.changes) or "connect it to the network of the others")}
    return agreed(", ".join(sorted({f"{choice.interface}: {choice.why}" for choice in choices})))


def check_same_mtu(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """Unequal ones pass small messages and lose large ones: a run hangs at its first all-reduce."""
    choices = networks_of(cases)
    if isinstance(choices, Problem):
        return {EVERY_NODE: unchecked("no network was found that all nodes are in")}
    names = {case.node.host: choice.interface for case, choice in zip(cases, choices, strict=True)}

    def mtu(case: Case) -> int:
        return next(each.mtu for each in case.facts.view.interfaces if each.name == names[case.node.host])

    usual, odd = odd_ones(cases, mtu)
    return {
        host: warn(f"MTU {found} on {names[host]}, the others have {usual}", f"sudo ip link set {names[host]} mtu {usual}")
        for host, found in odd.items()
    } or agreed(f"MTU {usual}")


def check_same_contents(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """Files by their sha256, folders by the names and sizes of what is in them."""
    found: dict[str, list[str]] = {}
    for path in cases[0].facts.contents:
        having = [case for case in cases if case.facts.contents[path].digest]
        if having:
            usual, odd = odd_ones(having, lambda case, path=path: case.facts.contents[path].digest)  # type: ignore[misc]
            for host, digest in odd.items():
                found.setdefault(host, []).append(f"{path} is {str(digest)[:12]}, on the others {str(usual)[:12]}")
    fix = "rsync -a --checksum PATH HOST:PATH from a node that has the right one"
    return {host: wrong("\n".join(texts), fix) for host, texts in found.items()} or agreed("data and model are the same")


def check_same_image(cases: Sequence[Case]) -> dict[str, CheckResult]:
    """By id. Sending replaces an older one; a node that pulls keeps what it has under that tag. What each node builds for itself has an
    id of its own: the tag says what it is made of, and a launch compares the whole fingerprint."""
    having = [case for case in cases if case.facts.image_id]
    if not having:
        return agreed("no node has the image yet")
    plan = cases[0].plan
    if plan.config.cluster.delivery.kind == "build_on_nodes":
        return agreed(f"built by {len(having)} of {len(cases)} node(s), each for itself")
    usual, odd = odd_ones(having, lambda case: case.facts.image_id)
    judge = wrong if plan.config.cluster.delivery.kind == "pull" else warn
    fix = f"docker image rm {plan.image.tag}"
    return {
        host: judge(f"{plan.image.tag} has the id {str(found)[:19]}, on the others {str(usual)[:19]}", fix) for host, found in odd.items()
    } or agreed(f"one id on {len(having)} of {len(cases)} node(s)")


def agreed(evidence: str) -> dict[str, CheckResult]:
    return {EVERY_NODE: fine(evidence)}
