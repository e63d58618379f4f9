"""Checks of one node as a host: its shell, memory, disks, ports, Docker engine, and what earlier runs left there. Pure."""

import re
from pathlib import PurePosixPath

from launcher.doctor.findings import Case, CheckResult, fine, unchecked, warn, wrong
from launcher.doctor.node_facts import GIB, Room
from launcher.doctor.parse import PODMAN
from launcher.memory.states import DTYPE_BYTES
from launcher.plan.plan import Plan

POSIX_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "busybox")
OLDEST_KERNEL = (5, 5)  # accelerate, utils/other.py check_os_kernel: below it, ranks were seen to hang
OLDEST_ENGINE = (20, 10)  # the first that was tried, and whose BuildKit the images are written for
LAYERED_STORAGE = ("overlay2", "overlayfs", "fuse-overlayfs", "btrfs", "zfs")  # vfs copies the whole image for every container
FULL_GIB = 2.0
FEW_INODES = 20_000
SHM_GIB = 1.0
HCCL_PORTS = (60000, 60031)  # HCCL_IF_BASE_PORT 60000, hccl_env documentation
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}

# ------------------------------------------------------------------------------------------------------------- the host


def check_shell(case: Case) -> CheckResult:
    shell = PurePosixPath(case.facts.shell).name
    if shell in POSIX_SHELLS or not shell:
        return fine(f"login shell {shell or 'not said'}")
    return wrong(f"the login shell {case.facts.shell} does not read POSIX quoting", f"sudo chsh -s /bin/bash {case.facts.user}")


def check_architecture(case: Case) -> CheckResult:
    machine, said = case.facts.machine, case.node.architecture
    if machine == said:
        return fine(machine)
    return wrong(
        f"it is {machine}, the cluster file says {said}", f"{{host: {case.node.host}, architecture: {machine}}} in the cluster file"
    )


def check_kernel(case: Case) -> CheckResult:
    if numbers(case.facts.kernel) >= OLDEST_KERNEL:
        return fine(case.facts.kernel)
    return warn(f"kernel {case.facts.kernel} is older than {dotted(OLDEST_KERNEL)}: ranks may hang", "update the kernel of the node")


def check_memory(case: Case) -> CheckResult:
    """What offloading puts there must be free; without it, nothing is asked."""
    needed, facts = case.plan.states.host_bytes / GIB, case.facts
    text = f"{facts.memory_available_gib:.1f} of {facts.memory_total_gib:.1f} GiB free, {needed:.1f} needed for offloading"
    if needed <= facts.memory_available_gib:
        return fine(text)
    if needed <= facts.memory_total_gib:
        return warn(text, "end what uses the memory there: ps -eo pid,user,rss,comm --sort=-rss")
    return wrong(text, "more nodes, stage=lora, or strategy.offload_optimizer=false strategy.offload_parameters=false")


def check_shm(case: Case) -> CheckResult:
    facts, cluster = case.facts, case.plan.config.cluster
    if cluster.runtime == "docker":
        size_gib = size_bytes(cluster.shm_size) / GIB
        text = f"cluster.shm_size={cluster.shm_size} of {facts.memory_total_gib:.1f} GiB memory"
        return fine(text) if size_gib <= facts.memory_total_gib else wrong(text, f"cluster.shm_size={int(facts.memory_total_gib / 2)}g")
    if facts.shm and facts.shm.free_gib >= SHM_GIB:
        return fine(f"/dev/shm has {facts.shm.free_gib:.1f} GiB free")
    free = f"{facts.shm.free_gib:.1f} GiB free" if facts.shm else "no size"
    return warn(f"/dev/shm has {free}: data workers and ranks share memory there", "sudo mount -o remount,size=8g /dev/shm")


def check_memlock(case: Case) -> CheckResult:
    """RDMA pins memory, and ends with 'Cannot allocate memory' below the limit."""
    cluster, facts = case.plan.config.cluster, case.facts
    limit = cluster.ulimits.get("memlock", "docker's default") if cluster.runtime == "docker" else facts.memlock_kib
    if limit in (None, "-1", "unlimited"):
        return fine("unlimited")
    fix = "cluster.ulimits.memlock='-1'" if cluster.runtime == "docker" else "memlock unlimited in /etc/security/limits.conf"
    return warn(f"locked memory is limited ({limit}{' KiB' if isinstance(limit, int) else ''}): RDMA needs it unlimited", fix)


# ----------------------------------------------------------------------------------------------------------------- disk


def check_room(case: Case) -> CheckResult:
    """For checkpoints: weights, master and two moments of what is trained, as often as they are kept and once more."""
    config, states, room = case.plan.config, case.plan.states, case.facts.root
    if room is None:
        return unchecked(f"df did not answer for {root_of(case.plan)}")
    element_bytes = DTYPE_BYTES[config.precision.weights] + 3 * DTYPE_BYTES[config.precision.optimizer]
    one_gib = states.trainable * element_bytes / GIB
    all_gib = one_gib * (config.run.keep_checkpoints + 1)
    text = f"{room.free_gib:.1f} GiB free at {room.path}; a checkpoint takes about {one_gib:.1f} GiB, {all_gib:.1f} with those kept"
    if room.free_gib < max(one_gib, 0.1):
        return wrong(text, f"free room there (du -xh --max-depth=2 {room.path} | sort -h | tail), or cluster.root=FOLDER")
    return warn(text, "run.keep_checkpoints=1, or cluster.root=FOLDER") if room.free_gib < all_gib else fine(text)


def check_writable(case: Case) -> CheckResult:
    room, root, user = case.facts.root, root_of(case.plan), case.facts.user
    if room is None:
        return unchecked(f"df did not answer for {root}")
    if room.writable:
        return fine(f"{user} may write to {room.path}")
    return wrong(f"{user} may not write to {room.path}, where runs and data lie or are made", f"sudo install -d -o {user} {root}")


def check_inodes(case: Case) -> CheckResult:
    room = case.facts.root
    if room is None or room.inodes is None:
        return unchecked("the file system counts no inodes")
    text = f"{room.inodes:,} free inodes at {room.path}"
    return (
        fine(text)
        if room.inodes >= FEW_INODES
        else warn(text, f"remove many small files there (du --inodes -x {room.path} | sort -n | tail)")
    )


def check_contents(case: Case) -> CheckResult:
    """Data and model are used where they lie: nothing is copied but what cluster.sync names."""
    synced = case.plan.config.cluster.sync
    missing = {path: content.error for path, content in case.facts.contents.items() if not content.digest}
    unnamed = [path for path in missing if not any(PurePosixPath(path).is_relative_to(named) for named in synced)]
    if unnamed:
        fix = f"cluster.sync=[{','.join((*synced, *unnamed))}] copies it there from this machine; or mount it on every node"
        return wrong("\n".join(f"{path}: {missing[path]}" for path in unnamed), fix)
    if missing:
        return fine(f"{', '.join(missing)} is not there yet; launch copies it (cluster.sync)")
    return fine(f"{len(case.facts.contents)} path(s) of data and model are there")


def check_leftovers(case: Case) -> CheckResult:
    """Containers of other runs: a live one may be a sibling, a dead one is to be looked at and removed."""
    others = [each for each in case.facts.containers if each.run_id != case.plan.run_id]
    if not others:
        return fine("no containers of other runs")
    names = " ".join(each.name for each in others if each.state != "running")
    text = ", ".join(f"{each.name} ({each.state})" for each in others)
    return warn(
        f"containers of other runs: {text}", f"docker rm {names}" if names else f"let it end, or: omnilaunch stop {others[0].run_id}"
    )


# --------------------------------------------------------------------------------------------------------------- docker


def check_docker_client(case: Case) -> CheckResult:
    docker = case.facts.docker
    if docker and docker.client:
        return fine(f"docker {docker.client}")
    return wrong("there is no docker command", "install it (docs.docker.com/engine/install), or cluster.runtime=process for one node")


def check_docker_engine(case: Case) -> CheckResult:
    docker, user = case.facts.docker, case.facts.user
    if docker and docker.engine:
        return fine(f"engine {docker.engine} answers {user} without sudo")
    error = docker.error if docker else "not asked"
    if "permission denied" in error.lower():
        return wrong(f"{user} may not use Docker: {error}", f"sudo usermod -aG docker {user}, then log in anew")
    if error == PODMAN:
        return wrong(error, "install Docker (docs.docker.com/engine/install) and remove podman-docker")
    return wrong(f"the Docker engine does not answer: {error}", "sudo systemctl enable --now docker")


def check_docker_version(case: Case) -> CheckResult:
    engine = case.facts.docker.engine if case.facts.docker else ""
    if not engine:
        return unchecked("the engine does not answer")
    if numbers(engine) >= OLDEST_ENGINE:
        return fine(f"engine {engine}")
    return wrong(f"engine {engine} is older than {dotted(OLDEST_ENGINE)}", "update it: docs.docker.com/engine/install")


def check_docker_storage(case: Case) -> CheckResult:
    driver = case.facts.docker.storage_driver if case.facts.docker else ""
    if not driver:
        return unchecked("the engine does not answer")
    if driver in LAYERED_STORAGE:
        return fine(driver)
    return warn(
        f"storage driver {driver}: every container start copies the image", '{"storage-driver": "overlay2"} in /etc/docker/daemon.json'
    )


def check_docker_room(case: Case) -> CheckResult:
    room: Room | None = case.facts.docker.room if case.facts.docker else None
    if room is None:
        return unchecked("the engine does not say where it keeps images")
    wanted_gib = 0 if case.facts.image_id else case.stack.image_gib
    text = f"{room.free_gib:.1f} GiB free at {room.path}" + (
        f", about {wanted_gib} for the image" if wanted_gib else ", the image is there"
    )
    if room.free_gib < FULL_GIB:
        return wrong(text, "docker system df shows what takes it; docker image prune frees what nothing uses")
    return fine(text) if room.free_gib >= wanted_gib else warn(text, "docker system df shows what takes it")


def check_toolkit(case: Case) -> CheckResult:
    docker = case.facts.docker
    if not docker or not docker.engine:
        return unchecked("the engine does not answer")
    if docker.toolkit or "nvidia" in docker.runtimes:
        return fine("NVIDIA container toolkit is installed")
    fix = "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    return wrong("docker run --gpus needs the NVIDIA container toolkit, which is not there", fix)


def check_image(case: Case) -> CheckResult:
    tag, kind = case.plan.image.tag, case.plan.config.cluster.delivery.kind
    if case.facts.image_id:
        return fine(f"{tag} is there ({case.facts.image_id[:19]})")
    how = {
        "build": "launch builds and sends it",
        "ship": "launch sends it",
        "pull": "launch pulls it",
        "build_on_nodes": "launch has it built there",
    }[kind]
    return fine(f"{tag} is not there yet; {how}")


# ---------------------------------------------------------------------------------------------------------------- ports


def check_rendezvous_port(case: Case) -> CheckResult:
    """Rank 0 of the ranks listens there; the other nodes need no port of their own for it."""
    port = case.plan.config.cluster.rendezvous_port
    if case.rank != 0:
        return fine("only node rank 0 listens")
    if port not in case.facts.ports:
        return fine(f"port {port} is free")
    free = next(other for other in range(port + 1, port + 1000) if other not in case.facts.ports)
    return wrong(f"port {port} is in use there (sudo ss -ltnp 'sport = :{port}' says by whom)", f"cluster.rendezvous_port={free}")


def check_hccl_ports(case: Case) -> CheckResult:
    low, high = HCCL_PORTS
    taken = [port for port in case.facts.ports if low <= port <= high]
    if not taken:
        return fine(f"ports {low}-{high} are free")
    named = ", ".join(map(str, taken))
    return wrong(f"HCCL's port(s) {named} are in use there (sudo ss -ltnp says by whom)", "cluster.environment.HCCL_IF_BASE_PORT='61000'")


def check_hccl_reserved(case: Case) -> CheckResult:
    """An outgoing connection of anybody may otherwise hold one of HCCL's ports."""
    (low, high), (first, last) = HCCL_PORTS, case.facts.ephemeral_ports
    covered = any(start <= low and high <= end for start, end in case.facts.reserved_ports)
    if covered or last < low or first > high:
        return fine(f"ports {low}-{high} are not given to other connections")
    fix = f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={low}-{high}"
    return warn(f"the kernel gives ports {first}-{last} to any connection, HCCL's {low}-{high} among them", fix)


# -------------------------------------------------------------------------------------------------------------- numbers


def root_of(plan: Plan) -> str:
    """cluster.root as the nodes know it, absolute: the run's folder is runs/RUN below it."""
    return str(PurePosixPath(plan.spec.output).parents[1])


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 20.10.24+dfsg1 -> (20, 10, 24)."""
    return tuple(int(part) for part in (re.match(r"\d+(\.\d+)*", version) or [""])[0].split(".") if part)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def size_bytes(text: str) -> float:
    """A size as docker takes it (16g, 512m, 64), in bytes; 0 when it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    return float(found.group(1)) * UNITS[found.group(2)] if found else 0
