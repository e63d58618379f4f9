"""Checks of one node as a host: its shell, memory, disks, ports, Docker engine, and the containers of earlier runs. Pure."""

import re
from dataclasses import replace
from pathlib import PurePosixPath

from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.node_facts import GIB
from launcher.doctor.offers import free_hccl_ports, free_port, offer
from launcher.doctor.parse import PODMAN
from launcher.memory.estimate import estimate_memory
from launcher.memory.states import DTYPE_BYTES
from launcher.plan.commands import HCCL_PORT_VARIABLE, hccl_ports
from launcher.plan.host_memory import host_bytes, list_needed
from launcher.plan.plan import Plan
from trainer.contract.listing import list_some
from trainer.contract.wording import plural

POSIX_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "busybox")
OLDEST_KERNEL = (5, 5)  # accelerate, utils/other.py check_os_kernel: below it, ranks were seen to hang
# The first whose seccomp profile knows clone3, by which the C library of the images starts threads (docker-library/python issue 835).
OLDEST_ENGINE = (20, 10, 10)
LAYERED_STORAGE = ("overlay2", "overlayfs", "fuse-overlayfs", "btrfs", "zfs")  # vfs copies the whole image for every container
FULL_GIB = 2.0
FEW_INODES = 20_000
SHM_GIB = 1.0
SHOWN_PORTS = 6
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
END_PROCESSES = "end processes that use memory on the node: ps -eo pid,user,rss,comm --sort=-rss"
NO_ENGINE = "the Docker engine does not respond"

# ------------------------------------------------------------------------------------------------------------- the host


def check_shell(checked: CheckedNode) -> CheckResult:
    shell = PurePosixPath(checked.facts.shell).name
    if shell in POSIX_SHELLS or not shell:
        return passed(f"login shell {shell or 'unknown'}")
    return passed(f"login shell {shell}; commands are run by /bin/sh")


def check_ssh_config(checked: CheckedNode) -> CheckResult:
    """The node was reached without these keywords; they are named because OpenSSH may behave otherwise."""
    if not checked.facts.remarks:
        return passed("the ssh config asks for nothing that is ignored")
    return warned("\n".join(checked.facts.remarks), "nothing, if the node is the right one; docs/cluster.md has the list of keywords")


def check_architecture(checked: CheckedNode) -> CheckResult:
    machine, planned = checked.facts.machine, checked.node.architecture
    if machine == planned:
        return passed(machine)
    fix = f"{{host: {checked.host}, architecture: {machine}}} in the cluster file"
    return failed(f"it is {machine}, the cluster file says {planned}", fix)


def check_kernel(checked: CheckedNode) -> CheckResult:
    kernel = checked.facts.kernel
    if version_numbers(kernel) >= OLDEST_KERNEL:
        return passed(kernel)
    return warned(f"kernel {kernel} is older than {write_version(OLDEST_KERNEL)}: ranks may hang", "update the kernel of the node")


def check_memory(checked: CheckedNode) -> CheckResult:
    """What the plan takes of the node's own memory, against what is free of it."""
    config, facts = checked.plan.config, checked.facts
    memory = checked.plan.memory or estimate_memory(config)
    needed, what = host_bytes(config, memory) / GIB, list_needed(config, memory)
    text = f"{facts.memory_available_gib:.1f} of {facts.memory_total_gib:.1f} GiB free, up to {needed:.1f} needed{what}"
    if needed <= facts.memory_available_gib:
        return passed(text)
    if config.run.force:
        return warned(f"{text}; forced: {config.run.force}", END_PROCESSES)
    if needed <= facts.memory_total_gib:
        return warned(text, END_PROCESSES)
    held = replace(config, strategy=replace(config.strategy, offload_optimizer=False, offload_parameters=False))
    fits = host_bytes(held, estimate_memory(held)) / GIB <= facts.memory_total_gib
    without = offer(checked, {"strategy.offload_optimizer": False, "strategy.offload_parameters": False}) if fits else ""
    return failed(text, "more nodes, or nodes with more memory" + (f"; or {without}" if without else ""))


def check_shm(checked: CheckedNode) -> CheckResult:
    facts, cluster = checked.facts, checked.plan.config.cluster
    if cluster.runtime == "docker":
        text = f"cluster.shm_size={cluster.shm_size} of {facts.memory_total_gib:.1f} GiB memory"
        if size_bytes(cluster.shm_size) / GIB <= facts.memory_total_gib:
            return passed(text)
        half_gib = facts.memory_total_gib / 2
        fix = offer(checked, {"cluster.shm_size": f"{int(half_gib)}g" if half_gib >= 1 else f"{int(half_gib * 1024)}m"})
        return failed(text, fix or "a node with more memory")
    if facts.shm and facts.shm.free_gib >= SHM_GIB:
        return passed(f"/dev/shm has {facts.shm.free_gib:.1f} GiB free")
    free = f"has {facts.shm.free_gib:.1f} GiB free" if facts.shm else "could not be read"
    return warned(f"/dev/shm {free}: data workers and ranks share memory there", "sudo mount -o remount,size=8g /dev/shm")


def check_memlock(checked: CheckedNode) -> CheckResult:
    """RDMA locks memory, and fails with 'Cannot allocate memory' at the limit."""
    cluster, facts = checked.plan.config.cluster, checked.facts
    in_docker = cluster.runtime == "docker"
    limit = cluster.ulimits.get("memlock", "docker's default") if in_docker else facts.memlock_kib
    if limit in (None, "-1", "unlimited"):
        return passed("unlimited")
    fix = offer(checked, {"cluster.ulimits.memlock": "-1"}) if in_docker else "memlock unlimited in /etc/security/limits.conf"
    return warned(f"locked memory is limited ({limit}{' KiB' if isinstance(limit, int) else ''}): RDMA needs it unlimited", fix)


# ----------------------------------------------------------------------------------------------------------------- disk


def check_room(checked: CheckedNode) -> CheckResult:
    """Space for checkpoints: weights, master weights and two moments of the trained parameters, times the number that is kept plus one."""
    config, states, space = checked.plan.config, checked.plan.states, checked.facts.root
    if space is None:
        return unchecked(f"df failed for {root_of(checked.plan)}")
    element_bytes = DTYPE_BYTES[config.precision.weights] + 3 * DTYPE_BYTES[config.precision.optimizer]
    one_gib = states.trainable * element_bytes / GIB
    all_gib = one_gib * (config.run.keep_checkpoints + 1)
    text = f"{space.free_gib:.1f} GiB free at {space.path}; a checkpoint takes about {one_gib:.1f} GiB, {all_gib:.1f} with those kept"
    elsewhere = "cluster.root=FOLDER on a larger disk"
    if space.free_gib < max(one_gib, 0.1):
        return failed(text, f"free disk space (du -xh --max-depth=2 {space.path} | sort -h | tail), or {elsewhere}")
    if space.free_gib >= all_gib:
        return passed(text)
    fewer = offer(checked, {"run.keep_checkpoints": 1}) if space.free_gib >= 2 * one_gib else ""
    return warned(text, f"{fewer or 'free disk space there'}, or {elsewhere}")


def check_writable(checked: CheckedNode) -> CheckResult:
    space, root, user = checked.facts.root, root_of(checked.plan), checked.facts.user
    if space is None:
        return unchecked(f"df failed for {root}")
    if space.writable:
        return passed(f"{user} may write to {space.path}")
    return failed(f"{user} may not write to {space.path}, the folder of runs and data", f"sudo install -d -o {user} {root}")


def check_inodes(checked: CheckedNode) -> CheckResult:
    space = checked.facts.root
    if space is None or space.inodes is None:
        return unchecked("the file system does not count inodes")
    text = f"{space.inodes:,} free inodes at {space.path}"
    if space.inodes >= FEW_INODES:
        return passed(text)
    return warned(text, f"remove small files there (du --inodes -x {space.path} | sort -n | tail)")


def check_contents(checked: CheckedNode) -> CheckResult:
    """Data and model are read where they are: only the paths of cluster.sync are copied."""
    synced = checked.plan.config.cluster.sync
    missing = {path: content.error for path, content in checked.facts.contents.items() if not content.digest}
    not_synced = [path for path in missing if not any(PurePosixPath(path).is_relative_to(folder) for folder in synced)]
    if not_synced:
        fix = f"cluster.sync=[{','.join((*synced, *not_synced))}] copies it there from this machine; or mount it on every node"
        return failed("\n".join(f"{path}: {missing[path]}" for path in not_synced), fix)
    if missing:
        return passed(f"{', '.join(missing)} is not there yet; launch copies it (cluster.sync)")
    return passed(f"{plural(len(checked.facts.contents), 'path')} of data and model are there")


def check_leftovers(checked: CheckedNode) -> CheckResult:
    """Containers of other runs: a running one may belong to a run that is wanted, an ended one can be removed."""
    others = [each for each in checked.facts.containers if each.run_id != checked.plan.run_id]
    if not others:
        return passed("no containers of other runs")
    names = " ".join(each.name for each in others if each.state != "running")
    text = ", ".join(f"{each.name} ({each.state})" for each in others)
    fix = f"docker rm {names}" if names else f"wait for its end, or: omnilaunch stop {others[0].run_id}"
    return warned(f"containers of other runs: {text}", fix)


# --------------------------------------------------------------------------------------------------------------- docker


def check_docker_client(checked: CheckedNode) -> CheckResult:
    docker = checked.facts.docker
    if docker and docker.client:
        return passed(f"docker {docker.client}")
    # An accelerator needs the torch of its image.
    without = offer(checked, {"cluster.runtime": "process"}) if checked.plan.config.hardware.accelerator == "cpu" else ""
    install = "install it: docs.docker.com/engine/install"
    return failed("there is no docker command on the PATH of the login", f"{install}; or {without}" if without else install)


def check_docker_engine(checked: CheckedNode) -> CheckResult:
    docker, user = checked.facts.docker, checked.facts.user
    if docker and docker.engine:
        return passed(f"engine {docker.engine} responds to {user} without sudo")
    error = docker.error if docker else "not asked"
    if "permission denied" in error.lower():
        return failed(f"{user} may not use Docker: {error}", f"sudo usermod -aG docker {user}, then log in again")
    if error == PODMAN:
        return failed(error, "install Docker (docs.docker.com/engine/install) and remove podman-docker")
    return failed(f"{NO_ENGINE}: {error}", "sudo systemctl enable --now docker")


def check_docker_version(checked: CheckedNode) -> CheckResult:
    engine = checked.facts.docker.engine if checked.facts.docker else ""
    if not engine:
        return unchecked(NO_ENGINE)
    if version_numbers(engine) >= OLDEST_ENGINE:
        return passed(f"engine {engine}")
    text = f"engine {engine} is older than {write_version(OLDEST_ENGINE)}: programs of the image can start no thread in it"
    return failed(text, "update it: docs.docker.com/engine/install")


def check_docker_storage(checked: CheckedNode) -> CheckResult:
    driver = checked.facts.docker.storage_driver if checked.facts.docker else ""
    if not driver:
        return unchecked(NO_ENGINE)
    if driver in LAYERED_STORAGE:
        return passed(driver)
    fix = '{"storage-driver": "overlay2"} in /etc/docker/daemon.json'
    return warned(f"storage driver {driver}: the image is copied at every start of a container", fix)


def check_docker_room(checked: CheckedNode) -> CheckResult:
    space = checked.facts.docker.space if checked.facts.docker else None
    if space is None:
        return unchecked("the engine does not report where it keeps images")
    wanted_gib = 0 if checked.facts.image_id else checked.stack.image_gib
    needs = f"the image takes about {wanted_gib}" if wanted_gib else "the image is there"
    text = f"{space.free_gib:.1f} GiB free at {space.path}, {needs}"
    if space.free_gib < FULL_GIB:
        return failed(text, "docker system df shows what is large; docker image prune removes unused images")
    return passed(text) if space.free_gib >= wanted_gib else warned(text, "docker system df shows what is large")


def check_toolkit(checked: CheckedNode) -> CheckResult:
    docker = checked.facts.docker
    if not docker or not docker.engine:
        return unchecked(NO_ENGINE)
    if docker.toolkit or "nvidia" in docker.runtimes:
        return passed("NVIDIA container toolkit is installed")
    fix = "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    return failed("docker run --gpus needs the NVIDIA container toolkit, which is not installed", fix)


def check_image(checked: CheckedNode) -> CheckResult:
    tag, kind = checked.plan.image.tag, checked.plan.config.cluster.delivery.kind
    if checked.facts.image_id:
        return passed(f"{tag} is there ({checked.facts.image_id[:19]})")
    how = {"build": "builds and sends it", "ship": "sends it", "pull": "pulls it", "build_on_nodes": "builds it there"}[kind]
    return passed(f"{tag} is not there yet; launch {how}")


# ---------------------------------------------------------------------------------------------------------------- ports


def check_rendezvous_port(checked: CheckedNode) -> CheckResult:
    """Only node rank 0 listens on this port."""
    port = checked.plan.config.cluster.rendezvous_port
    if checked.rank != 0:
        return passed("only node rank 0 listens")
    if port not in checked.facts.ports:
        return passed(f"port {port} is free")
    used = {*checked.used_ports, *(hccl_ports(checked.command.environment) if uses_hccl(checked) else ())}
    fix = offer(checked, {"cluster.rendezvous_port": free_port(used, port + 1)}) or "end the program that uses it"
    return failed(f"port {port} is in use there (sudo ss -ltnp 'sport = :{port}' shows the program)", fix)


def check_hccl_ports(checked: CheckedNode) -> CheckResult:
    ports, used = hccl_ports(checked.command.environment), sorted(checked.facts.ports)
    text = f"{ports[0]}-{ports[-1]}"
    in_use = [str(port) for port in used if port in ports]
    if not in_use:
        return passed(f"ports {text} are free")
    first = free_hccl_ports({*checked.used_ports, checked.plan.config.cluster.rendezvous_port})
    fix = offer(checked, {f"cluster.environment.{HCCL_PORT_VARIABLE}": str(first)}) or "end the programs that use them"
    return failed(f"HCCL uses ports {text}, and {list_some(in_use, SHOWN_PORTS)} are in use there (sudo ss -ltnp shows the programs)", fix)


def check_hccl_reserved(checked: CheckedNode) -> CheckResult:
    """Unless the ports are reserved, an outgoing connection of any program may take one of them."""
    ports, (first, last) = hccl_ports(checked.command.environment), checked.facts.ephemeral_ports
    low, high = ports[0], ports[-1]
    covered = any(start <= low and high <= end for start, end in checked.facts.reserved_ports)
    if covered or last < low or first > high:
        return passed(f"ports {low}-{high} are not used for other connections")
    reserved = ",".join(f"{start}-{end}" for start, end in (*checked.facts.reserved_ports, (low, high)))  # the setting replaces the old one
    fix = f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={reserved}"
    return warned(f"the kernel uses ports {first}-{last} for outgoing connections, HCCL's {low}-{high} among them", fix)


def uses_hccl(checked: CheckedNode) -> bool:
    return checked.plan.spec.device.backend == "hccl"


# -------------------------------------------------------------------------------------------------------------- numbers


def root_of(plan: Plan) -> str:
    """cluster.root on the nodes, absolute: the run's folder is runs/RUN below it."""
    return str(PurePosixPath(plan.spec.output).parents[1])


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 20.10.24+dfsg1 -> (20, 10, 24)."""
    return tuple(int(part) for part in (re.match(r"\d+(\.\d+)*", version) or [""])[0].split(".") if part)


def write_version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def size_bytes(text: str) -> float:
    """A size as docker takes it (16g, 512m, 64), in bytes; 0 for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    return float(found.group(1)) * UNITS[found.group(2)] if found else 0
