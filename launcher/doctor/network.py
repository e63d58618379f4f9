"""Which interface and address each node meets the others on, worked out from what the nodes have. IPv4. Pure.

What the cluster file names wins. Else the one network that all nodes are in; of several, the one that their host addresses are in; and
where they share none, each node's route to the others' host addresses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, ip_address, ip_network

from launcher.check.problem import Problem
from launcher.config.schema import Node

# Bridges, tunnels and other networks that end within the node, or in a virtual one above it.
INNER = re.compile(r"(lo|docker\d*|veth.*|br-.*|virbr.*|tun\d*|tap\d*|cni\d*|flannel.*|cali.*|kube.*|ifb\d*|dummy\d*|wg\d*|tailscale.*)")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """An address of a node and the interface that carries it. `speed_mb_s` in Mbit/s as the kernel says it, None when it does not."""

    name: str
    address: str
    prefix: int
    up: bool = True
    mtu: int = 1500
    speed_mb_s: int | None = None

    @property
    def network(self) -> IPv4Network:
        return IPv4Network(f"{self.address}/{self.prefix}", strict=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.address}/{self.prefix}{'' if self.up else ', down'})"


@dataclass(frozen=True, kw_only=True)
class IpRoute:
    """A line of the kernel's table. `network` as 10.0.0.0/24, the default as 0.0.0.0/0."""

    interface: str
    network: str
    metric: int = 0


@dataclass(frozen=True, kw_only=True)
class View:
    """What a node sees of its networks. `reached_at`: its own address that this launcher's SSH came to, '' when that is not known."""

    interfaces: tuple[Interface, ...]
    routes: tuple[IpRoute, ...] = ()
    reached_at: str = ""


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """Empty where a run has one node, which needs no network."""

    interface: str
    address: str
    why: str


def choose_network(nodes: Sequence[Node], views: Sequence[View]) -> tuple[NetworkChoice, ...] | Problem:
    """Interface and address of every node, in their order, such that each can route to each; or the Problem that names the node which
    lacks what it takes."""
    if len(nodes) == 1:
        return (NetworkChoice(interface="", address="", why="one node: nothing goes over a network"),)
    offers = tuple(offered(node, view) for node, view in zip(nodes, views, strict=True))
    for place, (node, view, offer) in enumerate(zip(nodes, views, offers, strict=True)):
        if not offer:
            return lacking(place, node, view)
    shared = shared_networks(offers)
    targets = tuple(target(node, view) for node, view in zip(nodes, views, strict=True))
    met = [network for network in shared if all(at and ip_address(at) in network for at in targets)]
    if len(shared) == 1:
        return within(shared[0], offers, views, "the one network that all nodes are in")
    if len(met) == 1:
        faster = faster_than(met[0], shared, offers)
        return within(met[0], offers, views, f"of {len(shared)} networks that all nodes are in, the one of their host addresses{faster}")
    return by_routes(nodes, views, offers, targets)


def take_network(nodes: Sequence[Node], choices: Sequence[NetworkChoice]) -> tuple[Node, ...]:
    """The nodes with interface and address as chosen; what the cluster file names stays, since the choice has kept it."""
    return tuple(
        replace(node, interface=choice.interface or node.interface, address=choice.address or node.address)
        for node, choice in zip(nodes, choices, strict=True)
    )


def offered(node: Node, view: View) -> tuple[Interface, ...]:
    """Interfaces of a node that may carry the run: the named one whatever it is called, else any that leads out of the node."""
    usable = (each for each in view.interfaces if each.up and not ip_address(each.address).is_loopback)
    if node.interface or node.address:
        named = (each for each in usable if node.interface in ("", each.name))
        return tuple(each for each in named if node.address in ("", each.address))
    return tuple(each for each in usable if not INNER.fullmatch(each.name) and not ip_address(each.address).is_link_local)


def lacking(place: int, node: Node, view: View) -> Problem:
    has = ", ".join(map(str, view.interfaces)) or "no interface with an IPv4 address"
    free = offered(replace(node, interface="", address=""), view)
    key = f"cluster.nodes[{place}]"
    if not (node.interface or node.address):
        return Problem(key=key, what=f"{node.host} has no address that other nodes could reach; it has {has}")
    named = {"interface": node.interface, "address": node.address}
    wanted = " with ".join(f"{name} {value!r}" for name, value in named.items() if value)
    changes = tuple(in_file(node, each) for each in free)
    return Problem(key=key, what=f"{node.host} has no {wanted} that is up; it has {has}", changes=changes)


def in_file(node: Node, interface: Interface) -> str:
    """What the node's line of the cluster file would say."""
    return f"{{host: {node.host}, interface: {interface.name}, address: {interface.address}}} in the cluster file"


def shared_networks(offers: Sequence[tuple[Interface, ...]]) -> list[IPv4Network]:
    """Networks that every node is in. One in which two nodes have the same address is a private one of each (a hypervisor's)."""
    first, *others = ({each.network for each in offer} for offer in offers)
    shared = sorted(first.intersection(*others))
    return [network for network in shared if len({in_network(offer, network)[0].address for offer in offers}) == len(offers)]


def in_network(offer: tuple[Interface, ...], network: IPv4Network) -> list[Interface]:
    return [each for each in offer if each.network == network]


def within(network: IPv4Network, offers: Sequence[tuple[Interface, ...]], views: Sequence[View], why: str) -> tuple[NetworkChoice, ...]:
    """Each node's interface in that network; of two, the one that its own route there takes."""
    choices = []
    for offer, view in zip(offers, views, strict=True):
        mine = in_network(offer, network)
        taken = interface_towards(view, str(network.network_address + 1))
        best = next((each for each in mine if each.name == taken), mine[0])
        choices.append(NetworkChoice(interface=best.name, address=best.address, why=f"{network}: {why}"))
    return tuple(choices)


def faster_than(network: IPv4Network, shared: Sequence[IPv4Network], offers: Sequence[tuple[Interface, ...]]) -> str:
    """A hint where another of the shared networks is faster on every node, as the kernel says."""

    def speed(at: IPv4Network) -> int:
        return min(in_network(offer, at)[0].speed_mb_s or 0 for offer in offers)

    best = max(shared, key=speed)
    if speed(best) <= speed(network):
        return ""
    return f" ({best} on {in_network(offers[0], best)[0].name} is faster: name it as interface in the cluster file to have it)"


def by_routes(
    nodes: Sequence[Node], views: Sequence[View], offers: Sequence[tuple[Interface, ...]], targets: Sequence[str]
) -> tuple[NetworkChoice, ...] | Problem:
    """Each node's only interface, or the one that its routes to the others' host addresses take; held against those routes."""
    choices = []
    for place, (node, view, offer) in enumerate(zip(nodes, views, offers, strict=True)):
        towards = {interface_towards(view, at) for other, at in enumerate(targets) if other != place and at}
        found = offer if len(offer) == 1 else tuple(each for each in offer if {each.name} == towards)
        if not found:
            names = ", ".join(map(str, offer))
            what = f"{node.host} has several interfaces, and no route that tells which leads to the others: {names}"
            return Problem(key=f"cluster.nodes[{place}]", what=what, changes=tuple(in_file(node, each) for each in offer))
        why = "its route to the others" if len(offer) > 1 else "the one that it has" if not (node.interface or node.address) else "named"
        choices.append(NetworkChoice(interface=found[0].name, address=found[0].address, why=why))
    return unroutable(nodes, views, choices) or tuple(choices)


def unroutable(nodes: Sequence[Node], views: Sequence[View], choices: Sequence[NetworkChoice]) -> Problem | None:
    """The first node whose route to another's address is missing, or leaves by an interface that was not chosen."""
    for place, (node, view, mine) in enumerate(zip(nodes, views, choices, strict=True)):
        for other, theirs in zip(nodes, choices, strict=True):
            taken = mine.interface if other is node else interface_towards(view, theirs.address)
            if taken != mine.interface:
                how = f"leaves by {taken}, not by {mine.interface}" if taken else "does not exist"
                what = f"the route of {node.host} to {theirs.address} ({other.host}) {how}"
                return Problem(key=f"cluster.nodes[{place}]", what=what, changes=("interfaces that are in one network",))
    return None


def interface_towards(view: View, address: str) -> str:
    """The interface that packets to `address` leave by: longest prefix, then lowest metric; '' when there is no route."""
    ways = [(ip_network(route.network), route) for route in view.routes]
    fitting = [(network.prefixlen, -route.metric, route.interface) for network, route in ways if ip_address(address) in network]
    return max(fitting)[2] if fitting else ""


def target(node: Node, view: View) -> str:
    """The address that the launcher knows the node by; '' when it is a name which only SSH understands."""
    at = view.reached_at or node.host
    try:
        address = ip_address(at)
    except ValueError:
        return ""
    return "" if address.version != 4 or address.is_loopback else at
