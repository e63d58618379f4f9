"""Interface and address per node from the interfaces and routes of the nodes: NetworkView -> choices, or a problem that names the node."""

import pytest

from launcher.check.problem import Problem
from launcher.config.schema import Node
from launcher.doctor.network import Interface, IpRoute, NetworkChoice, NetworkView, choose_network, interface_towards, take_network

DOCKER = Interface(name="docker0", address="172.17.0.1", prefix=16)


def interface(name: str, address: str, prefix: int = 24, **more: int | bool) -> Interface:
    return Interface(name=name, address=address, prefix=prefix, **more)  # type: ignore[arg-type]


def view(*interfaces: Interface, default: str = "", routes: dict[str, str] | None = None, reached_at: str = "") -> NetworkView:
    """Connected routes of the interfaces, then `routes` (network -> interface), then the default."""
    table = {str(each.network): each.name for each in interfaces} | (routes or {}) | ({"0.0.0.0/0": default} if default else {})
    lines = tuple(IpRoute(interface=name, network=network) for network, name in table.items())
    return NetworkView(interfaces=interfaces, routes=lines, reached_at=reached_at)


def nodes(*hosts: str, **named: str) -> tuple[Node, ...]:
    return tuple(Node(host=host, **named) for host in hosts)  # type: ignore[arg-type]


def chosen(places: tuple[Node, ...], *views: NetworkView) -> list[tuple[str, str]]:
    choices = choose_network(places, views)
    assert not isinstance(choices, Problem), str(choices)
    return [(choice.interface, choice.address) for choice in choices]


def refused(places: tuple[Node, ...], *views: NetworkView) -> Problem:
    problem = choose_network(places, views)
    assert isinstance(problem, Problem), problem
    return problem


def test_one_node_needs_none() -> None:
    assert chosen(nodes("localhost"), view()) == [("", "")]


def test_the_one_shared_network_without_bridges() -> None:
    views = (view(DOCKER, interface("eth0", "10.0.0.1")), view(DOCKER, interface("ens3", "10.0.0.2")))
    assert chosen(nodes("a", "b"), *views) == [("eth0", "10.0.0.1"), ("ens3", "10.0.0.2")]


def test_a_network_in_which_two_nodes_have_one_address_is_no_shared_one() -> None:
    inner = interface("priv0", "192.168.122.1")
    assert chosen(nodes("a", "b"), *(view(inner, interface("eth0", f"10.0.0.{i}")) for i in (1, 2))) == [
        ("eth0", "10.0.0.1"),
        ("eth0", "10.0.0.2"),
    ]


@pytest.mark.parametrize("name", ["lo", "docker0", "veth12ab", "br-0a1b2c", "tun0", "virbr0"])
def test_inner_interfaces_are_passed_over_but_may_be_named(name: str) -> None:
    views = tuple(view(interface(name, f"10.9.0.{i}"), interface("eth0", f"10.0.0.{i}")) for i in (1, 2))
    assert chosen(nodes("a", "b"), *views)[0] == ("eth0", "10.0.0.1")
    assert chosen(nodes("a", "b", interface=name), *views)[0] == (name, "10.9.0.1")


def two_networks(reached_at: bool, **speeds: int) -> tuple[NetworkView, ...]:
    return tuple(
        view(
            interface("eth0", f"10.0.0.{i}", speed_mb_s=1000),
            interface("ib0", f"10.1.0.{i}", speed_mb_s=speeds.get("ib0", 1000)),
            reached_at=f"10.0.0.{i}" if reached_at else "",
        )
        for i in (1, 2, 3)
    )


def test_of_two_shared_networks_that_of_the_host_addresses() -> None:
    assert chosen(nodes("a", "b", "c"), *two_networks(True))[2] == ("eth0", "10.0.0.3")
    assert chosen(nodes("10.1.0.1", "10.1.0.2", "10.1.0.3"), *two_networks(False))[2] == ("ib0", "10.1.0.3")


def test_a_faster_network_is_named() -> None:
    choices = choose_network(nodes("a", "b", "c"), two_networks(True, ib0=100_000))
    assert isinstance(choices, tuple) and "10.1.0.0/24 on ib0 is faster" in choices[0].why
    assert "faster" not in str(choose_network(nodes("a", "b", "c"), two_networks(True)))


def test_two_shared_networks_and_only_names_is_ambiguous() -> None:
    problem = refused(nodes("a", "b", "c"), *two_networks(False))
    assert "a has several interfaces" in problem.what
    assert problem.changes[1] == "{host: a, interface: ib0, address: 10.1.0.1} in the cluster file"


def test_the_cluster_file_wins() -> None:
    places = (Node(host="a", interface="ib0"), Node(host="b", address="10.1.0.2"), Node(host="c"))
    assert chosen(places, *two_networks(True)) == [("ib0", "10.1.0.1"), ("ib0", "10.1.0.2"), ("ib0", "10.1.0.3")]


def test_no_shared_network_the_routes_decide() -> None:
    views = (
        view(interface("eth0", "10.0.1.1"), interface("eth1", "192.168.7.1"), routes={"10.0.2.0/24": "eth0"}, default="eth1"),
        view(interface("eth0", "10.0.2.1"), default="eth0"),
    )
    assert chosen(nodes("10.0.1.1", "10.0.2.1"), *views) == [("eth0", "10.0.1.1"), ("eth0", "10.0.2.1")]


def test_two_interfaces_in_one_network_the_route_decides() -> None:
    pair = (interface("eth0", "10.0.0.1"), interface("eth1", "10.0.0.9"))
    first = NetworkView(
        interfaces=pair,
        routes=(IpRoute(interface="eth0", network="10.0.0.0/24", metric=200), IpRoute(interface="eth1", network="10.0.0.0/24", metric=100)),
    )
    assert chosen(nodes("a", "b"), first, view(interface("eth0", "10.0.0.2"))) == [("eth1", "10.0.0.9"), ("eth0", "10.0.0.2")]


def test_the_node_that_lacks_a_named_interface_is_named() -> None:
    problem = refused(nodes("a", "b", interface="ib0"), *two_networks(True)[:1], view(interface("eth0", "10.0.0.2")))
    assert problem.key == "cluster.nodes[1]" and "b has no interface 'ib0'" in problem.what and "eth0 (10.0.0.2/24)" in problem.what
    assert problem.changes == ("{host: b, interface: eth0, address: 10.0.0.2} in the cluster file",)


def test_an_interface_that_is_down_and_a_wrong_address_are_named() -> None:
    down = view(interface("eth0", "10.0.0.2", up=False))
    assert "eth0 (10.0.0.2/24, down)" in refused(nodes("a", "b"), view(interface("eth0", "10.0.0.1")), down).what
    places = (Node(host="a"), Node(host="b", address="10.0.0.77"))
    assert "b has no address '10.0.0.77'" in refused(places, *two_networks(True)[:2]).what


def test_a_node_without_a_route_to_the_other_is_named() -> None:
    problem = refused(nodes("a", "b"), view(interface("eth0", "10.0.1.1")), view(interface("eth0", "10.0.2.1")))
    assert problem.what == "the route of a to 10.0.2.1 (b) does not exist"
    views = (
        view(interface("eth0", "10.0.1.1"), interface("eth1", "10.3.0.1"), default="eth0"),
        view(interface("eth0", "10.0.2.1"), default="eth0"),
    )
    assert "uses eth0, not eth1" in refused((Node(host="a", interface="eth1"), Node(host="b")), *views).what


def test_longest_prefix_then_metric() -> None:
    lines = (("far", "0.0.0.0/0", 0), ("slow", "10.0.0.0/8", 9), ("fast", "10.0.0.0/8", 1))
    seen = NetworkView(
        interfaces=(), routes=tuple(IpRoute(interface=name, network=network, metric=metric) for name, network, metric in lines)
    )
    assert [interface_towards(seen, address) for address in ("10.1.1.1", "8.8.8.8")] == ["fast", "far"]
    assert interface_towards(NetworkView(interfaces=()), "10.1.1.1") == ""


def test_nodes_take_what_was_chosen() -> None:
    choices = (NetworkChoice(interface="eth0", address="10.0.0.1", why=""), NetworkChoice(interface="", address="", why=""))
    taken = take_network((Node(host="a"), Node(host="b", interface="x")), choices)
    assert [(node.interface, node.address) for node in taken] == [("eth0", "10.0.0.1"), ("x", "")]
