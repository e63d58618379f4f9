"""Rules about the nodes of a cluster file: names, addresses, and which devices are used. What only the nodes know is checked by the doctor."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config, Node
from launcher.image.stack import Stack
from launcher.memory.states import device_count
from trainer.contract.wording import plural

SSH_PORT = 22
ROOT = "/srv/omnilaunch"  # a folder for cluster.root that is offered
# A name or an address that no program reads as an option or as syntax.
HOST = re.compile(r"[\w:][\w.:%-]{0,252}")
USER = re.compile(r"\w[\w.@\\+-]{0,63}\$?")
INTERFACE = re.compile(r"\w[\w.@-]{0,14}")  # IFNAMSIZ of Linux is 16, with the final NUL
HOST_AND_PORT = re.compile(r"([\w.-]+):(\d{1,5})")  # an IPv6 address has more colons
NAMES = {"host": HOST, "address": HOST, "user": USER, "interface": INTERFACE}
# user@, then a name, [v6] or a bare v6 address; the first two with :port
JUMP = re.compile(r"(ssh://)?(\w[\w.+-]*@)?((\w[\w.-]*|\[[\w:.%]+\])(:\d{1,5})?|[\w.%]*(:[\w.%]*){2,})")
# Reserved for documentation: RFC 5737 (TEST-NET-1 to 3), RFC 3849 and 9637 (IPv6), RFC 2606 (names).
PLACEHOLDERS = tuple(map(ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")))
PLACEHOLDER_NAMES, PLACEHOLDER_DOMAINS = ("example.com", "example.net", "example.org"), ("example",)
LOOPBACK = re.compile(r"localhost|127\..*|::1")


def nodes_are_named(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Names are passed to SSH, to variables, and printed in commands that a person copies."""
    for place, node in enumerate(config.cluster.nodes):
        for field, pattern in NAMES.items():
            value = getattr(node, field)
            if (value or field == "host") and not pattern.fullmatch(value):
                changes = split_host(place, value) if field == "host" else ()
                yield Problem(
                    key=f"cluster.nodes.{place}.{field}", what=f"{value!r} of node {node.host!r} is not a valid {field}", changes=changes
                )
        if node.jump.lower() not in ("", "none") and not all(JUMP.fullmatch(hop.strip()) for hop in node.jump.split(",")):
            what = f"{node.jump!r} of node {node.host!r} is not a valid jump host: write user@host:port, and commas between several"
            yield Problem(key=f"cluster.nodes.{place}.jump", what=what)


def split_host(place: int, value: str) -> tuple[str, ...]:
    """ann@host becomes two keys."""
    user, at, host = value.rpartition("@")
    valid = at and USER.fullmatch(user) and HOST.fullmatch(host)
    return (f"cluster.nodes.{place}.host={host} cluster.nodes.{place}.user={user}",) if valid else ()


def ports_are_keys(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for place, node in enumerate(config.cluster.nodes):
        if found := HOST_AND_PORT.fullmatch(node.host):
            key, what = f"cluster.nodes.{place}.host", f"{node.host!r} contains a port; write the port in its own key"
            yield Problem(key=key, what=what, changes=(f"{key}={found[1]} cluster.nodes.{place}.port={found[2]}",))


def nodes_are_distinct(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    nodes = config.cluster.nodes
    if not config.cluster.working:
        what = "every node is a spare, so no node can start the run" if nodes else f"no node is listed: add them to {file_of(config)}"
        yield Problem(key="cluster.nodes", what=what, changes=("cluster.nodes.0.spare=false",) if nodes else ())
    for name, called in (("host", host_of), ("address", address_of)):
        counts = Counter(map(called, nodes))
        twice = sorted(value for value, count in counts.items() if count > 1)
        if twice:
            what = f"listed twice: {', '.join(twice)}; a node runs one container. Keep one of them in {file_of(config)}"
            yield Problem(key=f"cluster.nodes.{name}", what=what)


def file_of(config: Config) -> str:
    return f"the cluster file, {config.cluster.name}.yaml"


def find_placeholders(config: Config) -> tuple[Problem, ...]:
    """Addresses that stand for other ones in documentation, such as those of conf/cluster/example.yaml: no host ever has one."""
    found = [node.host for node in config.cluster.nodes if is_placeholder(node.host) or is_placeholder(node.address)]
    if not found:
        return ()
    return (Problem(key="cluster.nodes", what=describe_placeholders(found), launch_only=True),)


def describe_placeholders(hosts: Sequence[str]) -> str:
    are = "is a placeholder" if len(hosts) == 1 else "are placeholders"
    return (
        f"{', '.join(hosts)} {are}, reserved for documentation: no machine has such an address. Copy conf/cluster/example.yaml to "
        "conf/cluster/YOURS.yaml, set the addresses of your nodes in it, and write cluster=YOURS"
    )


def is_placeholder(host: str) -> bool:
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        parts = host.lower().rstrip(".").split(".")
        return (len(parts) > 1 and parts[-1] in PLACEHOLDER_DOMAINS) or ".".join(parts[-2:]) in PLACEHOLDER_NAMES
    return any(address in network for network in PLACEHOLDERS)


def host_of(node: Node) -> str:
    """The same text for every spelling of a host that can be recognised without the network."""
    return "localhost" if node.is_local else f"{node.host.lower().rstrip('.')}:{node.port or SSH_PORT}"


def address_of(node: Node) -> str:
    return node.address.lower() or (host_of(node) if LOOPBACK.fullmatch(node.host) else node.host.lower())


def addresses_are_not_loopback(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    nodes = config.cluster.nodes
    for place, node in enumerate(nodes):
        if len(nodes) > 1 and LOOPBACK.fullmatch(node.address):
            what = f"{node.address} of node {node.host} is the loopback address: with it, the other nodes would reach themselves"
            yield Problem(key=f"cluster.nodes.{place}.address", what=what, changes=(f"cluster.nodes.{place}.address=''",))


def architectures_are_equal(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    nodes = config.cluster.nodes
    first = nodes[0].architecture if nodes else ""
    others = {place: node for place, node in enumerate(nodes) if node.architecture != first}
    if others:
        names = ", ".join(f"{node.host} is {node.architecture}" for node in others.values())
        what = f"{names}, but {nodes[0].host} is {first}: one image is built for all nodes"
        change = " ".join(f"cluster.nodes.{place}.architecture={first}" for place in others)
        yield Problem(key="cluster.nodes.architecture", what=what, changes=(change,))


def cluster_suits_runtime(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    cluster = config.cluster
    remote = [node.host for node in cluster.nodes if not node.is_local]
    if cluster.runtime == "process" and (len(cluster.nodes) > 1 or remote):
        what = "process works on this machine only: without a container, the nodes would have different environments"
        root = "" if cluster.root.startswith("/") else f" cluster.root={ROOT}"
        yield Problem(key="cluster.runtime", what=what, changes=(f"cluster.runtime=docker{root}", "cluster=local"))
    if remote and len(remote) < len(cluster.nodes):
        what = f"this machine is listed as localhost next to {', '.join(remote)}: list it by the host name under which the other nodes reach it over SSH"
        yield Problem(key="cluster.nodes", what=what)
    if remote and not cluster.root.startswith("/"):
        what = f"{cluster.root!r} is a relative path, which is not defined on {', '.join(remote)}"
        yield Problem(key="cluster.root", what=what, changes=(f"cluster.root={ROOT}",))


def interfaces_are_named_for_all(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Ranks that listen on one interface and ranks that listen on any do not find each other."""
    nodes = config.cluster.working
    unnamed = [node.host for node in nodes if not node.interface]
    if len(nodes) > 1 and 0 < len(unnamed) < len(nodes):
        what = f"no interface is set for {', '.join(unnamed)}, but other nodes have one: set it for all nodes or for none"
        yield Problem(key="cluster.nodes.interface", what=what)


# -------------------------------------------------------------------------------------------------------------- devices


def devices_are_counted(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Every node runs the same number of ranks, each on its own device. On the CPU, a rank has no device."""
    wanted = device_count(config)
    for place, node in enumerate(config.cluster.nodes if config.hardware.accelerator != "cpu" else ()):
        key, count = f"cluster.nodes.{place}.devices", len(node.devices)
        twice = sorted(number for number, times in Counter(node.devices).items() if times > 1)
        if twice:
            once = ",".join(map(str, dict.fromkeys(node.devices)))
            what = f"{', '.join(map(str, twice))} of node {node.host} is listed twice"
            yield Problem(key=key, what=what, changes=(f"{key}=[{once}]",))
        elif node.devices and count != wanted:
            what = f"node {node.host} lists {plural(count, 'device')}, but {wanted} are used on every node"
            yield Problem(key=key, what=what, changes=(f"cluster.devices_per_node={count}", f"{key}=[]"))


def modules_are_whole(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A job gets all dies of a module or none."""
    multiple = config.hardware.device_multiple
    for place, node in enumerate(config.cluster.nodes if multiple > 1 else ()):
        modules = Counter(number // multiple for number in node.devices)
        partly = sorted(module * multiple for module, dies in modules.items() if dies < multiple)
        if partly:
            spans = ", ".join(f"{first}-{first + multiple - 1}" for first in partly)
            what = f"node {node.host} lists only a part of {spans}, but a job gets {config.hardware.title} in whole modules of {multiple}"
            yield Problem(key=f"cluster.nodes.{place}.devices", what=what, forcible=True)


CLUSTER_RULES: tuple[Rule, ...] = (
    nodes_are_named,
    ports_are_keys,
    nodes_are_distinct,
    addresses_are_not_loopback,
    architectures_are_equal,
    cluster_suits_runtime,
    interfaces_are_named_for_all,
    devices_are_counted,
    modules_are_whole,
)
