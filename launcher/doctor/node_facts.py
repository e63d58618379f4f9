"""What is known of a node after it was asked: everything that a launch depends on."""

from dataclasses import dataclass, field

from launcher.doctor.network import NetworkView
from launcher.doctor.smi import SmiDevice
from launcher.doctor.smi_fault import SmiFault

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DiskSpace:
    """Of the file system that `path` is on. `inodes`: free ones, None where the file system does not count them."""

    path: str
    free_gib: float
    writable: bool = True
    inodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Bounds, in seconds, of the node's clock minus the launcher's."""

    behind_s: float
    ahead_s: float


@dataclass(frozen=True, kw_only=True)
class Docker:
    """Versions of `client` and `engine`. `engine` is '' when it does not respond; `error` then has the reason. `space`: where it keeps
    images, on a `file_system` of that type. `toolkit`: NVIDIA's container toolkit is installed. `rootless`: it runs as a user. `remapped`: users
    of containers are others on the host. `proxy`: by which it pulls."""

    client: str
    engine: str
    error: str = ""
    runtimes: tuple[str, ...] = ()
    storage_driver: str = ""
    space: DiskSpace | None = None
    toolkit: bool = False
    file_system: str = ""
    rootless: bool = False
    remapped: bool = False
    proxy: str = ""


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container with the label of a run."""

    name: str
    state: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class PathDigest:
    """A path of the data or the model. `digest` is '' when the path is missing or took too long to hash; `error` says which."""

    kind: str
    digest: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class FileMode:
    """Permission bits and owner of a device file."""

    bits: int
    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True)
class RdmaPort:
    """`state`: ACTIVE where it can be used; `kind`: InfiniBand or Ethernet."""

    device: str
    number: str
    state: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """The answers of a node. `memlock_kib` None = unlimited; `ports`: TCP ports in use for listening; `image_id` '' = the image is not on
    the node; `device_faults`: what nvidia-smi or npu-smi warns of, or why no devices could be read; `modes`: of the device files that are
    passed to the container."""

    host: str
    machine: str
    kernel: str
    hostname: str
    boot: str
    user: str
    shell: str
    memory_total_gib: float
    memory_available_gib: float
    shm: DiskSpace | None
    memlock_kib: int | None
    root: DiskSpace | None
    clock: Clock
    docker: Docker | None
    containers: tuple[Container, ...]
    image_id: str
    ports: tuple[int, ...]
    ephemeral_ports: tuple[int, int]
    reserved_ports: tuple[tuple[int, int], ...]
    network: NetworkView
    devices: tuple[SmiDevice, ...]
    device_faults: tuple[SmiFault, ...]
    driver: str
    files: tuple[str, ...]
    contents: dict[str, PathDigest]
    modes: dict[str, FileMode] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # of how the node is reached
    rdma_ports: tuple[RdmaPort, ...] = ()
    rdma_files: tuple[str, ...] = ()
