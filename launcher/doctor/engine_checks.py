"""Checks of how a node's Docker engine is set up: as an engine of a user, as a snap, with other ids, behind a proxy, on what disk. Pure.

Such an engine answers, and a run in it fails later. Sources: docs.docker.com/engine/security/rootless and /userns-remap, the snap's README
(canonical/docker-snap), moby's release notes.
"""

from pathlib import PurePosixPath

from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.host_checks import NO_ENGINE, root_of
from launcher.doctor.node_facts import Docker
from launcher.doctor.offers import offer

SNAP = PurePosixPath("/var/snap")
# What a strictly confined snap may read: home folders, and removable media where its interface is connected.
SNAP_FOLDERS = ("/home", "/media", "/mnt", "/run/media", "/var/snap")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb2", "smb3", "fuseblk", "ceph", "lustre", "glusterfs", "9p", "afs")
ROOT_INSIDE = "0:0"


def engine_of(checked: CheckedNode) -> Docker | None:
    docker = checked.facts.docker
    return docker if docker and docker.engine else None


def check_rootless(checked: CheckedNode) -> CheckResult:
    """A rootless engine has a network of its own, which other nodes cannot reach, and root in it is the user outside."""
    docker, cluster = engine_of(checked), checked.plan.config.cluster
    if docker is None:
        return unchecked(NO_ENGINE)
    if not docker.rootless:
        return passed("the engine runs as root")
    if len(cluster.working) > 1:
        fix = "use the node's own engine: unset DOCKER_HOST, docker context use default; sudo systemctl enable --now docker"
        return failed("the engine is rootless: its containers have a network of their own, which the other nodes cannot reach", fix)
    if checked.plan.container_user == ROOT_INSIDE:
        return passed("the engine is rootless, and root in a container is the user outside")
    fix = offer(checked, {"cluster.user": ROOT_INSIDE}) or f"cluster.user={ROOT_INSIDE}"
    return failed(f"the engine is rootless: user {checked.plan.container_user} of the container may not write to the run's folder", fix)


def check_user_namespace(checked: CheckedNode) -> CheckResult:
    docker = engine_of(checked)
    if docker is None:
        return unchecked(NO_ENGINE)
    if not docker.remapped:
        return passed("users of a container are those of the host")
    fix = 'remove "userns-remap" from /etc/docker/daemon.json, then: sudo systemctl restart docker'
    return failed(
        "the engine maps users (userns-remap): a container cannot have the network of the host, nor write to the run's folder", fix
    )


def check_snap(checked: CheckedNode) -> CheckResult:
    docker, root = engine_of(checked), root_of(checked.plan)
    if docker is None or docker.space is None:
        return unchecked(NO_ENGINE)
    if not PurePosixPath(docker.space.path).is_relative_to(SNAP):
        return passed("the engine is no snap")
    if any(PurePosixPath(root).is_relative_to(folder) for folder in SNAP_FOLDERS):
        return passed(f"the engine is a snap, which may use {root}")
    fix = "cluster.root=FOLDER below /home, and data and models there too; or the engine of docs.docker.com/engine/install in place of the snap"
    return failed(f"the engine is a snap, which sees no files at {root}: its containers would find an empty folder", fix)


def check_docker_disk(checked: CheckedNode) -> CheckResult:
    docker = engine_of(checked)
    if docker is None or docker.space is None or not docker.file_system:
        return unchecked("the engine does not report where it keeps images")
    text = f"{docker.space.path} is on {docker.file_system}"
    if docker.file_system not in NETWORK_FILE_SYSTEMS:
        return passed(text)
    fix = '{"data-root": "/a/folder/of/a/local/disk"} in /etc/docker/daemon.json, then: sudo systemctl restart docker'
    return warned(f"{text}, a network file system: layers of images cannot be stacked there, or only slowly", fix)


def check_docker_proxy(checked: CheckedNode) -> CheckResult:
    """The proxy of the engine is used to pull images, and never in a build."""
    docker, delivery = engine_of(checked), checked.plan.config.cluster.delivery
    if docker is None:
        return unchecked(NO_ENGINE)
    if not docker.proxy or delivery.kind != "build_on_nodes" or checked.facts.image_id:
        return passed("the engine pulls through a proxy" if docker.proxy else "the engine has no proxy")
    if delivery.proxy or delivery.wheelhouse or delivery.find_links:
        return passed("the build has a proxy or wheels of its own")
    fix = "cluster.delivery.proxy=URL with the proxy of this node (systemctl show docker --property Environment prints it)"
    return warned("the engine pulls through a proxy, and the build of the image would not use it", fix)
