"""Everything before the ranks run: paths and the image on every node, the run's folder there, then the start of the ranks and of the data check."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import ImageFailed, NodeFailed
from launcher.image.build import build
from launcher.image.docker import find
from launcher.plan.plan import Plan, encode_spec
from launcher.record.lock import is_asked_to_stop
from launcher.record.reader import read_object
from launcher.record.record import IMAGES_FILE, keep_images
from launcher.run.delivery.node_image import images_on, is_everywhere
from launcher.run.delivery.peer_transfer import Peer
from launcher.run.delivery.pull import pull
from launcher.run.delivery.remote_build import build_on
from launcher.run.delivery.ship import ship
from launcher.run.delivery.sync import sync
from launcher.run.gang import StartContext, clear_and_report, remove_by_name, start_checks, start_trainers
from launcher.run.node_process import NodeProcess
from launcher.run.restart import copy_newest_checkpoint, restore_metrics
from launcher.run.run_folder import FolderRequest, WorkingNode, create_folders, reopen_folders
from launcher.run.session import Session
from launcher.run.signals import Stopped, StopRequest
from trainer.contract import SPEC_FILE

MISSING_MOUNT = re.compile(r"bind source path does not exist: (?P<path>/.*?)\.?$", re.MULTILINE)  # moby, volume/mounts/validate.go


@dataclass(frozen=True, kw_only=True)
class NodeProcesses:
    """What runs: the trainer (all ranks) of every node, and its data check; no checks for a run that a launcher attached to."""

    trainers: tuple[NodeProcess, ...]
    checks: tuple[NodeProcess, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgainRequest:
    """Another attempt: its folders exist. `checks_first`: the ranks wait for the data check, since the data may have changed meanwhile. `sources`:
    nodes of the last attempt that take no part in this one, and may have its checkpoint."""

    checks_first: bool = False
    sources: tuple[WorkingNode, ...] = ()


def prepare_and_start(plan: Plan, session: Session, stop: StopRequest, *, again: AgainRequest | None = None) -> NodeProcesses:
    """Prepare the nodes and start the ranks, for the first attempt of a run or for another one (`again`). The data is checked while the ranks load;
    they take their first step when the check has passed (trainer.programs.inputs). Raises Stopped, ImageFailed, NodeFailed."""
    with stop.interrupting():
        if plan.config.cluster.runtime == "docker":
            sync_paths(plan, session)
            deliver_image(plan, session)
            record_image_ids(plan, session)
            prepare_folders(plan, session, again=again)
        if is_asked_to_stop(Path(plan.folder)):
            raise Stopped
    return start_all(plan, session, stop)


def start_all(plan: Plan, session: Session, stop: StopRequest) -> NodeProcesses:
    """A start that is under way is not abandoned, since its container may come up after the launcher has ended. Raises Stopped when all containers
    were removed again, or those nodes were printed for which that is not certain; NodeFailed."""
    trainers: tuple[NodeProcess, ...] = ()
    try:
        trainers = start_ranks(plan, session, stop)
        processes = NodeProcesses(trainers=trainers, checks=start_checks(plan.commands, start_context(plan, session), stop))
    except BaseException as error:
        if not (stop.count and isinstance(error, NodeFailed)):
            clear_and_report(trainers, stop, session.say)
            raise
        processes = NodeProcesses(trainers=trainers)
    if stop.count:
        end_started(plan, session, processes, stop)
        raise Stopped
    return processes


def end_started(plan: Plan, session: Session, processes: NodeProcesses, stop: StopRequest) -> None:
    if plan.config.cluster.runtime == "process":
        clear_and_report((*processes.trainers, *processes.checks), stop, session.say)
        return
    for host, why in remove_by_name(plan.commands, start_context(plan, session), stop).items():
        session.say(f"not cleared: {host}: {why.splitlines()[0]}; when it responds: omnilaunch stop {plan.run_id}")


def start_ranks(plan: Plan, session: Session, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """Start every node or none. Raises NodeFailed; when a node lacks a path that is mounted, with the option that copies it there."""
    try:
        return start_trainers(plan.commands, start_context(plan, session), stop)
    except NodeFailed as error:
        missing = dict.fromkeys(match["path"] for match in MISSING_MOUNT.finditer(str(error)))
        if not missing:
            raise
        named = ",".join((*plan.config.cluster.sync, *missing))
        raise NodeFailed(f"{error}\n  Next: cluster.sync=[{named}] copies it there from this machine; or mount it on every node") from error


def sync_paths(plan: Plan, session: Session) -> None:
    """Copy the paths of cluster.sync to every other machine. This comes first, since it may be refused."""
    if not plan.is_local:
        sync(plan.config.cluster.sync, working_nodes(plan, session), session.here, session.say, token=plan.run_id)


def deliver_image(plan: Plan, session: Session) -> None:
    """Bring the plan's image to every node, in the way that cluster.delivery.kind names."""
    delivery, image, nodes = plan.config.cluster.delivery, plan.image, working_nodes(plan, session)
    if not plan.is_local and is_everywhere(image.tag, image.fingerprint, nodes):
        return
    if delivery.kind == "pull":
        pull(image.tag, delivery.registry, nodes, session.say, fingerprint=image.fingerprint)
        return
    if delivery.kind == "build_on_nodes" and not plan.is_local:
        root = str(PurePosixPath(plan.spec.output).parents[1])
        build_on(image, nodes, project=session.project, root=root, delivery=delivery, source=session.here, say=session.say)
        return
    image_id = find(image) if delivery.kind == "ship" else build(image, root=session.project, delivery=delivery, on_line=session.say)
    if image_id is None:
        raise ImageFailed(
            f"{image.tag} does not exist on this machine, and cluster.delivery.kind=ship does not build it. "
            "Build it: omnilaunch image build; or use cluster.delivery.kind=build"
        )
    if not plan.is_local:
        configured = plan.config.cluster.working
        peers = [Peer(node=node, address=entry.reachable_at) for node, entry in zip(nodes, configured, strict=True)]
        ship(image.tag, image_id, peers, session.here, session.say)


def record_image_ids(plan: Plan, session: Session) -> None:
    """Record which image each node has, by the id of its engine. Raises ImageFailed when a rerun would use another image than its record names: the
    same files built again give another one, since system packages are installed in their current versions."""
    nodes = working_nodes(plan, session)
    found = {node.command.host: image.id for node, image in zip(nodes, images_on(nodes, plan.image.tag), strict=True) if image}
    for host, image_id in found.items():
        if (earlier := read_object(Path(plan.folder) / IMAGES_FILE, []).get(host, image_id)) != image_id:
            session.say(
                f"{host}: image {plan.image.tag} was built again since this run began: {earlier[:19]} → {image_id[:19]}, of the same files"
            )
    keep_images(found, Path(plan.folder))
    other = {host: image_id for host, image_id in found.items() if plan.image_id and image_id not in plan.image_id}
    if other:
        lines = "\n".join(f"  image on {host}: {image_id}" for host, image_id in other.items())
        raise ImageFailed(
            f"{plan.image.tag} is not the image that run {plan.rerun_of} had, {plan.image_id}:\n{lines}\n"
            "Load that image again (docker load), or accept the difference: --accept image"
        )


def prepare_folders(plan: Plan, session: Session, *, again: AgainRequest | None) -> None:
    """The run's folder on every node, owned by the container's user."""
    nodes, shared = working_nodes(plan, session), plan.config.cluster.shared
    written = Path(plan.folder) / SPEC_FILE  # its keys are used, since the run's trainer may be an older one
    text = encode_spec(plan.spec, like=written if written.is_file() else None).encode()
    request = FolderRequest(
        spec=plan.spec,
        text=text,
        image=plan.image.tag,
        user=plan.container_user,
        shared=shared,
        local=plan.is_local,
        checks_first=again is not None and again.checks_first,
    )
    if again is None:
        create_folders(nodes, request)
        return

    def copy_checkpoint(nodes: Sequence[WorkingNode]) -> None:
        if copy_newest_checkpoint(nodes, session.say, steps=plan.spec.steps, sources=again.sources):
            restore_metrics(nodes[0], Path(plan.folder))
        else:
            session.say("none of the remaining nodes has a checkpoint: the run starts from the first step")

    reopen_folders(nodes, request, copy_checkpoint=copy_checkpoint)


def start_context(plan: Plan, session: Session) -> StartContext:
    logs, timeout_s = Path(plan.folder) / "logs", plan.config.cluster.node_timeout_s
    return StartContext(
        transports=session.transports, logs=logs, project=session.project, secrets=session.secrets, node_timeout_s=timeout_s
    )


def working_nodes(plan: Plan, session: Session) -> tuple[WorkingNode, ...]:
    return tuple(
        WorkingNode(command=command, transport=transport) for command, transport in zip(plan.commands, session.transports, strict=True)
    )
