"""What is known of a node when it has been asked: one frozen answer to everything that a launch depends on."""

from dataclasses import dataclass, field

from launcher.doctor.network import View
from launcher.doctor.smi import SmiDevice

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Room:
    """Of the file system that `path` is on. `inodes` None where it counts none."""

    path: str
    free_gib: float
    writable: bool = True
    inodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The node's clock minus the launcher's lies between the two, in seconds."""

    behind_s: float
    ahead_s: float


@dataclass(frozen=True, kw_only=True)
class Docker:
    """`engine` is '' where it does not answer, and `error` says why. `room`: where it keeps images."""

    client: str
    engine: str
    error: str = ""
    runtimes: tuple[str, ...] = ()
    storage_driver: str = ""
    room: Room | None = None
    toolkit: bool = False  # NVIDIA's container toolkit is installed


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container that carries a run's label."""

    name: str
    state: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """A path of the data or the model. `digest` is '' where it is missing or took too long; `error` says which."""

    kind: str
    digest: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Of a device file: the permission bits, and whose it is."""

    bits: int
    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node answered. Memory and room in GiB; `memlock_kib` None = unlimited; `ports`: TCP ports in use for listening;
    `image_id` '' = not there. `devices_error` says why there are no devices. `modes`: of the device
    files that a container is given as they are."""

    host: str
    machine: str
    kernel: str
    hostname: str
    boot: str
    user: str
    shell: str
    memory_total_gib: float
    memory_available_gib: float
    shm: Room | None
    memlock_kib: int | None
    root: Room | None
    clock: Clock
    docker: Docker | None
    containers: tuple[Container, ...]
    image_id: str
    ports: tuple[int, ...]
    ephemeral_ports: tuple[int, int]
    reserved_ports: tuple[tuple[int, int], ...]
    view: View
    devices: tuple[SmiDevice, ...]
    devices_error: str
    driver: str
    files: tuple[str, ...]
    contents: dict[str, Content]
    modes: dict[str, Mode] = field(default_factory=dict)
