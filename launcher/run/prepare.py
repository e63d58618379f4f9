"""Everything before the ranks of a run load: the image on every node, the run's folder there; and then they and the data check start."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import ConfigRefused, ImageFailed, NodeFailed
from launcher.image.build import build
from launcher.image.docker import find
from launcher.plan.commands import CANN_LOGS
from launcher.plan.plan import Plan, encode_spec
from launcher.record.lock import is_asked_to_stop
from launcher.record.record import RECORDED_INPUTS_FILE, Failure, keep_images, read_if_there
from launcher.run.delivery.peer_transfer import Peer
from launcher.run.delivery.remote_build import build_on
from launcher.run.delivery.ship import image_on, is_everywhere, pull, ship
from launcher.run.delivery.sync import sync
from launcher.run.gang import StartContext, abandon, clear_all, start_checks, start_members
from launcher.run.node_process import NodeProcess
from launcher.run.restart import restore_rows, spread_checkpoint
from launcher.run.run_folder import FETCH_S, WorkingNode, fetch_file, fetch_folder, fetch_results, place_run, reopen_run
from launcher.run.signals import Stopped, StopRequest
from launcher.ssh.parallel import after, attempt_each, each
from launcher.ssh.transport import Transport
from trainer.contract import DATA_FILE, DATA_PROBLEMS_FILE, INPUTS_FILE, SPEC_FILE, DataReport, Inputs

SHOWN_PROBLEMS = 20
MISSING_MOUNT = re.compile(r"bind source path does not exist: (?P<path>/.*?)\.?$", re.MULTILINE)  # moby, volume/mounts/validate.go


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a launch uses of the outside: where the project lies, how the working nodes are reached (in their order) and this machine,
    secret variables for the ranks, where to say things. `move`: the plan and the desk for another attempt without these hosts."""

    project: Path
    transports: tuple[Transport, ...]
    here: Transport
    secrets: Mapping[str, str]
    say: Callable[[str], None]
    terminal: bool
    move: Callable[[Plan, frozenset[str]], tuple[Plan, "Session"]]


@dataclass(frozen=True, kw_only=True)
class NodeProcesses:
    """What runs: the ranks of every node, and beside them the data check of every node; none where a run is taken up again."""

    members: tuple[NodeProcess, ...]
    checks: tuple[NodeProcess, ...] = ()


def bring_up(plan: Plan, desk: Session, stop: StopRequest, *, again: bool = False) -> NodeProcesses:
    """Everything before the ranks are on their way, of a run's first attempt or `again`. The data is checked while they load: the check of
    a small set ends before the first step, that of a large one holds nothing up. Raises Stopped, ImageFailed, NodeFailed."""
    with stop.interrupting():
        if plan.config.cluster.runtime == "docker":
            bring_paths(plan, desk)
            bring_image(plan, desk)
            settle_image(plan, desk)
            place(plan, desk, again=again)
        if is_asked_to_stop(Path(plan.folder)):
            raise Stopped
    return start_crew(plan, desk, stop)


def start_crew(plan: Plan, desk: Session, stop: StopRequest) -> NodeProcesses:
    """What is being started is not left half-way: a container may come up after its launcher has gone. Raises Stopped when all of it has
    been ended again, or when the nodes are named where that is not sure; NodeFailed."""
    members: tuple[NodeProcess, ...] = ()
    try:
        members = start_ranks(plan, desk, stop)
        crew = NodeProcesses(members=members, checks=start_checks(plan.commands, crewed(plan, desk), stop))
    except BaseException as error:
        if not (stop.count and isinstance(error, NodeFailed)):
            clear_all(members)
            raise
        crew = NodeProcesses(members=members)
    if stop.count:
        end_start(plan, desk, crew, stop)
        raise Stopped
    return crew


def end_start(plan: Plan, desk: Session, crew: NodeProcesses, stop: StopRequest) -> None:
    if plan.config.cluster.runtime == "process":
        clear_all((*crew.members, *crew.checks))
        return
    for host, why in abandon(plan.commands, crewed(plan, desk), stop).items():
        desk.say(f"not cleared: {host}: {why}; when it answers: omnilaunch stop {plan.run_id}")


def start_ranks(plan: Plan, desk: Session, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """Every node or none. Raises NodeFailed; of a path that a node lacks, with what brings it there."""
    try:
        return start_members(plan.commands, crewed(plan, desk), stop)
    except NodeFailed as error:
        lacking = dict.fromkeys(match["path"] for match in MISSING_MOUNT.finditer(str(error)))
        if not lacking:
            raise
        named = ",".join((*plan.config.cluster.sync, *lacking))
        raise NodeFailed(f"{error}\n  Next: cluster.sync=[{named}] copies it there from this machine; or mount it on every node") from error


def bring_paths(plan: Plan, desk: Session) -> None:
    """What cluster.sync names on every node that is not this machine; first of all, since it may be refused."""
    if not plan.is_local:
        sync(plan.config.cluster.sync, sites_of(plan, desk), desk.here, desk.say, token=plan.run_id)


def bring_image(plan: Plan, desk: Session) -> None:
    """The plan's image on every node, by the way that the cluster's config says."""
    delivery, sites = plan.config.cluster.delivery, sites_of(plan, desk)
    if not plan.is_local and is_everywhere(plan.image.tag, plan.image.fingerprint, sites):
        return
    if delivery.kind == "pull":
        pull(plan.image.tag, delivery.registry, sites, desk.say, fingerprint=plan.image.fingerprint)
        return
    if delivery.kind == "build_on_nodes" and not plan.is_local:
        root = str(PurePosixPath(plan.spec.output).parents[1])
        build_on(plan.image, sites, project=desk.project, root=root, delivery=delivery, source=desk.here, say=desk.say)
        return
    image_id = find(plan.image) if delivery.kind == "ship" else build(plan.image, root=desk.project, delivery=delivery, on_line=desk.say)
    if image_id is None:
        raise ImageFailed(
            f"{plan.image.tag} is not on this machine, and cluster.delivery.kind=ship builds none: build it with "
            "omnilaunch image build, or use cluster.delivery.kind=build"
        )
    if not plan.is_local:
        nodes = plan.config.cluster.working
        peers = [Peer(site=site, address=node.reachable_at) for site, node in zip(sites, nodes, strict=True)]
        ship(plan.image.tag, image_id, peers, desk.here, desk.say)


def settle_image(plan: Plan, desk: Session) -> None:
    """Keep which image each node really has, by the id of its engine. Raises ImageFailed where a rerun would take another than its record:
    the same files built anew make another one, as system packages come in the versions of the day."""
    sites = sites_of(plan, desk)
    asked = each(lambda site: image_on(site, plan.image.tag), sites)
    found = {site.command.host: image.id for site, image in zip(sites, asked, strict=True) if image}
    keep_images(found, Path(plan.folder))
    other = {host: image_id for host, image_id in found.items() if plan.image_id and image_id not in plan.image_id}
    if other:
        lines = "\n".join(f"  image on {host}: {image_id}" for host, image_id in other.items())
        raise ImageFailed(
            f"{plan.image.tag} is not the image that run {plan.rerun_of} had, {plan.image_id}:\n{lines}\n"
            "Bring that one back (docker load); or say that it may differ: --accept image"
        )


# --------------------------------------------------------------------------------------------------------------- parts


def crewed(plan: Plan, desk: Session) -> StartContext:
    return StartContext(
        transports=desk.transports,
        logs=Path(plan.folder) / "logs",
        project=desk.project,
        secrets=desk.secrets,
        node_timeout_s=plan.config.cluster.node_timeout_s,
    )


def sites_of(plan: Plan, desk: Session) -> tuple[WorkingNode, ...]:
    return tuple(WorkingNode(command=command, transport=transport) for command, transport in zip(plan.commands, desk.transports, strict=True))


def place(plan: Plan, desk: Session, *, again: bool) -> None:
    """The run's folder on every node, for the container's user."""
    cluster, sites = plan.config.cluster, sites_of(plan, desk)
    user, local = plan.container_user, plan.is_local
    if not again:
        place_run(sites, plan.spec, spec_text(plan), image=plan.image.tag, user=user, shared=cluster.shared, local=local)
        return

    def spread(sites: Sequence[WorkingNode]) -> None:
        if spread_checkpoint(sites, desk.say):
            restore_rows(sites[0], Path(plan.folder))
        else:
            desk.say("no node that is left has a checkpoint: it starts from the first step")

    reopen_run(sites, plan.spec, spec_text(plan), image=plan.image.tag, user=user, shared=cluster.shared, local=local, spread=spread)


def spec_text(plan: Plan) -> bytes:
    """As the trainer of the run reads it, which may be an older one: with the keys that the run's first spec has."""
    written = Path(plan.folder) / SPEC_FILE
    return encode_spec(plan.spec, like=written if written.is_file() else None).encode()


def fetch(plan: Plan, folder: Path, desk: Session) -> None:
    if not plan.is_local:
        fetch_results(sites_of(plan, desk), folder, ranks_per_node=plan.spec.device.devices_per_node)
        if plan.config.hardware.accelerator == "npu":
            keep_cann_logs(sites_of(plan, desk), folder)


def keep_cann_logs(sites: Sequence[WorkingNode], folder: Path) -> None:
    """Beside the node's log, as logs/node<n>-cann.tgz. They stay on the node as well: what cannot be fetched is there."""

    def keep(site: WorkingNode) -> None:
        fetch_folder(site, CANN_LOGS, folder / "logs" / f"node{site.command.node_rank}-{CANN_LOGS}.tgz")

    attempt_each(keep, sites, until=after(FETCH_S))


def refuse_data(folder: Path, check: NodeProcess) -> None:
    """Raise the problems that a check has found as ConfigRefused: the first ones, and where all of them are."""
    report: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if report is None or not report.problems:
        log = check_log(folder, check)
        named = "".join(f"\n  data {line}" for line in changed_data(folder))
        raise ConfigRefused(
            f"the data check on {check.command.host} refused what it found; the ranks were ended:\n{tail_of(log)}{named}\n  log: {log}\n"
            f"  record: {folder}"
        )
    shown, count = report.problems[:SHOWN_PROBLEMS], max(report.problem_count, len(report.problems))
    lines = [f"  {problem}" for problem in shown]
    lines += [f"  ... and {count - len(shown):,} more"] if count > len(shown) else []
    lines += [f"  all of them, a JSON object a line: {place_of_problems(folder, check)}"]
    where = f" on {check.command.host}" if check.command.runtime == "docker" else ""
    told = "\n".join(lines)
    raise ConfigRefused(f"the data{where} cannot be trained on ({count:,} problem(s)); the ranks were ended:\n{told}")


def changed_data(folder: Path) -> list[str]:
    """In a rerun, the files that are others than the run that it repeats has read; [] where neither can be told."""
    before, now = (read_if_there(Inputs, folder / name) for name in (RECORDED_INPUTS_FILE, INPUTS_FILE))
    if before is None or now is None:
        return []
    names = sorted(name for name in {*before.data, *now.data} if before.data.get(name) != now.data.get(name))
    lines = [f"{name}: {'missing' if name not in now.data else 'new' if name not in before.data else 'another file'}" for name in names]
    return lines[:SHOWN_PROBLEMS] + ([f"and {len(lines) - SHOWN_PROBLEMS:,} more"] if len(lines) > SHOWN_PROBLEMS else [])


def fetch_problems(folder: Path, desk: Session, check: NodeProcess) -> None:
    """The report and the list of all problems, of the node whose check it was. What does not come stays there: the refusal says where."""
    site = WorkingNode(command=check.command, transport=desk.transports[check.command.node_rank])
    if folder == Path(check.command.folder):
        return
    for name in (DATA_FILE, INPUTS_FILE, DATA_PROBLEMS_FILE):
        with suppress(NodeFailed):
            fetch_file(site, name, folder / name)


def place_of_problems(folder: Path, check: NodeProcess) -> str:
    here = folder / DATA_PROBLEMS_FILE
    return str(here) if here.is_file() else f"{check.command.host}:{PurePosixPath(check.command.folder) / DATA_PROBLEMS_FILE}"


def broken_check(folder: Path, check: NodeProcess) -> Failure:
    """A check that ended without an answer, as the failure of an attempt."""
    log = check_log(folder, check)
    message = f"the data check ended with exit code {check.poll()} and without a report"
    if check.lost:
        message = "the node did not answer any more while its data was checked"
    tail = tuple(tail_of(log).splitlines())
    return Failure(host=check.command.host, rank=-1, code=check.poll() or 0, message=message, log=str(log), tail=tail)


def check_log(folder: Path, check: NodeProcess) -> Path:
    return folder / "logs" / f"data{check.command.node_rank}.log"


def tail_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-15:])
