"""The section `cluster` of a config: nodes, how they get the image, and what their containers have."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Node:
    """`host`: for SSH; `address`: for the other nodes. `port` and `user` default to ~/.ssh/config for the host, and then to 22 and the user of
    the launcher. `devices`: indices of the devices to use, as in nvidia-smi or /dev/davinciN, in any order; empty = the first ones.
    `groups`: gids that the container's user gets as well; empty = those that own the device files of the node.
    `rdma`: the container gets /dev/infiniband; the launch sets it for CUDA on several nodes where a port is active."""

    host: str
    user: str = ""
    port: int | None = None
    address: str = ""
    interface: str = ""
    architecture: Literal["x86_64", "aarch64"] = "x86_64"
    jump: str = ""
    spare: bool = False
    devices: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    rdma: bool = False

    @property
    def reachable_at(self) -> str:
        """Where the other nodes reach it."""
        return self.address or self.host

    @property
    def is_local(self) -> bool:
        """Whether the node is the launcher's own machine. With a port or a jump host, localhost is another machine behind it."""
        return self.host in ("localhost", "127.0.0.1", "::1") and self.port is None and not self.jump


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the nodes get the image. build: built on this machine and sent to the nodes that lack it; ship: the same, but never built; pull:
    each node pulls it from `registry`/<tag>; build_on_nodes: each node that lacks it builds it, from files that are sent to it. `base`
    replaces the base image of the stack. Paths are on this machine."""

    kind: Literal["build", "pull", "ship", "build_on_nodes"] = "build"
    registry: str = ""
    base: str = ""
    index: str = ""
    extra_index: str = ""
    find_links: str = ""
    ca_bundle: str = ""
    proxy: str = ""
    wheelhouse: str = ""
    accept_licence: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`runtime`: auto = process for the CPU of this machine, docker for everything else; a composed config has the one that was taken. `root`:
    folder of runs and data on the nodes, absolute or relative to the launcher's folder. `shm_size`, `ulimits`: as for docker run."""

    name: str
    runtime: Literal["auto", "process", "docker"] = "auto"
    nodes: tuple[Node, ...]
    devices_per_node: int | None = None
    root: str
    delivery: Delivery = field(default_factory=Delivery)
    rendezvous_port: int = 29500
    shm_size: str = "1g"
    ulimits: dict[str, str] = field(default_factory=dict)
    user: str = ""  # uid:gid in the container; '' = those of the launcher, or 1000:1000 for root
    shared: bool = False  # `root` is one folder that all nodes see, such as NFS
    connect_timeout_s: int = 8  # for one SSH connection; each jump host has its own
    silence_s: int = 30  # a connection without any data for so long is closed and opened again
    node_timeout_s: int = 45  # a node that does not respond for so long counts as lost
    ascend_runtime: bool = False  # pass NPUs through Ascend Docker Runtime, which the nodes must have; false: as device files
    environment: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()  # names of variables that the ranks get from the launcher's environment; values are never written
    mounts: tuple[str, ...] = ()  # host paths, mounted read-only at the same path
    sync: tuple[str, ...] = ()  # files and folders of this machine, copied to the same path on the nodes that lack them

    @property
    def working(self) -> tuple[Node, ...]:
        """The nodes that a run starts on, without the spares."""
        return tuple(node for node in self.nodes if not node.spare)

    @property
    def is_local(self) -> bool:
        """Whether the run is on the launcher's own machine."""
        return all(node.is_local for node in self.working)
