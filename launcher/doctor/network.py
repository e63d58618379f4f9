"""Chooses the interface and address by which each node reaches the others. IPv4. Pure.

The cluster file decides where it names them. Else the one network that all nodes are in; of several, the one of their host addresses;
where they share none, the route of each node to the host addresses of the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, ip_address, ip_network

from launcher.check.problem import Problem
from launcher.config.schema import Node

# Bridges, tunnels and other interfaces of networks inside the node, or of virtual ones on top of it.
VIRTUAL = re.compile(r"(lo|docker\d*|veth.*|br-.*|virbr.*|tun\d*|tap\d*|cni\d*|flannel.*|cali.*|kube.*|ifb\d*|dummy\d*|wg\d*|tailscale.*)")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """An address of a node and its interface. `speed_mb_s` in Mbit/s as the kernel reports it, None when it does not."""

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
    """A line of the kernel's routing table. `network` as 10.0.0.0/24; the default route is 0.0.0.0/0."""

    interface: str
    network: str
    metric: int = 0


@dataclass(frozen=True, kw_only=True)
class NetworkView:
    """The interfaces and routes of a node. `reached_at`: its own address that the launcher's SSH connection arrived at, '' = unknown."""

    interfaces: tuple[Interface, ...]
    routes: tuple[IpRoute, ...] = ()
    reached_at: str = ""


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """Interface and address are empty where a run has one node, which needs no network."""

    interface: str
    address: str
    why: str


def choose_network(nodes: Sequence[Node], views: Sequence[NetworkView]) -> tuple[NetworkChoice, ...] | Problem:
    """Interface and address of every node, in their order, such that each has a route to each other; or the Problem, which names the
    node."""
    if len(nodes) == 1:
        return (NetworkChoice(interface="", address="", why="one node: no network is used"),)
    usable = tuple(usable_interfaces(node, view) for node, view in zip(nodes, views, strict=True))
    for index, (node, view, interfaces) in enumerate(zip(nodes, views, usable, strict=True)):
        if not interfaces:
            return describe_missing(index, node, view)
    shared = shared_networks(usable)
    known = tuple(known_address(node, view) for node, view in zip(nodes, views, strict=True))
    of_hosts = [network for network in shared if all(address and ip_address(address) in network for address in known)]
    if len(shared) == 1:
        return choose_within(shared[0], usable, views, "the one network that all nodes are in")
    if len(of_hosts) == 1:
        faster = describe_faster(of_hosts[0], shared, usable)
        why = f"of {len(shared)} networks that all nodes are in, the one of their host addresses{faster}"
        return choose_within(of_hosts[0], usable, views, why)
    return choose_by_routes(nodes, views, usable, known)


def take_network(nodes: Sequence[Node], choices: Sequence[NetworkChoice]) -> tuple[Node, ...]:
    """The nodes with the chosen interface and address."""
    return tuple(
        replace(node, interface=choice.interface or node.interface, address=choice.address or node.address)
        for node, choice in zip(nodes, choices, strict=True)
    )


def usable_interfaces(node: Node, view: NetworkView) -> tuple[Interface, ...]:
    """Interfaces that are up: the one that the cluster file names, whatever its kind, else all that lead out of the node."""
    up = (each for each in view.interfaces if each.up and not ip_address(each.address).is_loopback)
    if node.interface or node.address:
        return tuple(each for each in up if node.interface in ("", each.name) and node.address in ("", each.address))
    return tuple(each for each in up if not VIRTUAL.fullmatch(each.name) and not ip_address(each.address).is_link_local)


def describe_missing(index: int, node: Node, view: NetworkView) -> Problem:
    has = ", ".join(map(str, view.interfaces)) or "no interface with an IPv4 address"
    key = f"cluster.nodes[{index}]"
    if not (node.interface or node.address):
        return Problem(key=key, what=f"{node.host} has no address that other nodes could reach; it has {has}")
    named = {"interface": node.interface, "address": node.address}
    wanted = " with ".join(f"{name} {value!r}" for name, value in named.items() if value)
    changes = tuple(write_node(node, each) for each in usable_interfaces(replace(node, interface="", address=""), view))
    return Problem(key=key, what=f"{node.host} has no {wanted} that is up; it has {has}", changes=changes)


def write_node(node: Node, interface: Interface) -> str:
    """The node's line of the cluster file with this interface."""
    return f"{{host: {node.host}, interface: {interface.name}, address: {interface.address}}} in the cluster file"


def shared_networks(usable: Sequence[tuple[Interface, ...]]) -> list[IPv4Network]:
    """Networks that every node is in. A network in which two nodes have the same address is a private one of each (a hypervisor's)."""
    first, *others = ({each.network for each in interfaces} for interfaces in usable)
    shared = sorted(first.intersection(*others))
    return [network for network in shared if len({in_network(interfaces, network)[0].address for interfaces in usable}) == len(usable)]


def in_network(interfaces: tuple[Interface, ...], network: IPv4Network) -> list[Interface]:
    return [each for each in interfaces if each.network == network]


def choose_within(
    network: IPv4Network, usable: Sequence[tuple[Interface, ...]], views: Sequence[NetworkView], why: str
) -> tuple[NetworkChoice, ...]:
    """Each node's interface in that network; of two, the one that its own route uses."""
    choices = []
    for interfaces, view in zip(usable, views, strict=True):
        candidates = in_network(interfaces, network)
        routed = interface_towards(view, str(network.network_address + 1))
        best = next((each for each in candidates if each.name == routed), candidates[0])
        choices.append(NetworkChoice(interface=best.name, address=best.address, why=f"{network}: {why}"))
    return tuple(choices)


def describe_faster(network: IPv4Network, shared: Sequence[IPv4Network], usable: Sequence[tuple[Interface, ...]]) -> str:
    """A hint where another shared network is faster on every node, as the kernel reports it."""

    def speed(at: IPv4Network) -> int:
        return min(in_network(interfaces, at)[0].speed_mb_s or 0 for interfaces in usable)

    best = max(shared, key=speed)
    if speed(best) <= speed(network):
        return ""
    return f" ({best} on {in_network(usable[0], best)[0].name} is faster: to use it, name it as interface in the cluster file)"


def choose_by_routes(
    nodes: Sequence[Node], views: Sequence[NetworkView], usable: Sequence[tuple[Interface, ...]], known: Sequence[str]
) -> tuple[NetworkChoice, ...] | Problem:
    """Each node's only interface, or the one that its routes to the host addresses of the others use; checked against those routes."""
    choices = []
    for index, (node, view, interfaces) in enumerate(zip(nodes, views, usable, strict=True)):
        towards = {interface_towards(view, address) for other, address in enumerate(known) if other != index and address}
        found = interfaces if len(interfaces) == 1 else tuple(each for each in interfaces if {each.name} == towards)
        if not found:
            what = f"{node.host} has several interfaces, and its routes do not show which leads to the others: {', '.join(map(str, interfaces))}"
            return Problem(key=f"cluster.nodes[{index}]", what=what, changes=tuple(write_node(node, each) for each in interfaces))
        only = "named in the cluster file" if node.interface or node.address else "its only interface"
        why = "its route to the others" if len(interfaces) > 1 else only
        choices.append(NetworkChoice(interface=found[0].name, address=found[0].address, why=why))
    return find_unroutable(nodes, views, choices) or tuple(choices)


def find_unroutable(nodes: Sequence[Node], views: Sequence[NetworkView], choices: Sequence[NetworkChoice]) -> Problem | None:
    """The first node whose route to another's address is missing, or uses an interface that was not chosen."""
    for index, (node, view, own) in enumerate(zip(nodes, views, choices, strict=True)):
        for other, theirs in zip(nodes, choices, strict=True):
            routed = own.interface if other is node else interface_towards(view, theirs.address)
            if routed != own.interface:
                how = f"uses {routed}, not {own.interface}" if routed else "does not exist"
                what = f"the route of {node.host} to {theirs.address} ({other.host}) {how}"
                return Problem(key=f"cluster.nodes[{index}]", what=what, changes=("name interfaces of one network in the cluster file",))
    return None


def interface_towards(view: NetworkView, address: str) -> str:
    """The interface that packets to `address` leave by: longest prefix, then lowest metric; '' when there is no route."""
    routes = [(ip_network(route.network), route) for route in view.routes]
    matching = [(network.prefixlen, -route.metric, route.interface) for network, route in routes if ip_address(address) in network]
    return max(matching)[2] if matching else ""


def known_address(node: Node, view: NetworkView) -> str:
    """The IPv4 address by which the launcher knows the node; '' for a loopback address, or a name that only SSH resolves."""
    text = view.reached_at or node.host
    try:
        address = ip_address(text)
    except ValueError:
        return ""
    return "" if address.version != 4 or address.is_loopback else text
