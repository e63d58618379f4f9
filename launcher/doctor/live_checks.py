"""What no fact tells and only trying does: whether a container starts with the run's options, whether every node reaches every other,
whether a folder is one. Each cleans up after itself, and each container ends by itself.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from launcher.doctor.findings import EVERY_NODE, Case, CheckResult, fine, unchecked, wrong
from launcher.doctor.host_checks import root_of
from launcher.doctor.network import NetworkChoice
from launcher.errors import NodeFailed
from launcher.memory.states import device_count
from launcher.plan.devices import attach, share_of
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import Result, Transport

START_TIMEOUT_S = 90.0
REACH_LIMIT_S = 20  # for the slowest node to start its container, and all to connect
FOLDER_TIMEOUT_S = 20.0
DOCKER_FAILED = (125, 126, 127)  # docker run itself, or a command that is not in the image
NO_IMAGE = "the image is not on the node yet"
DOCTOR_LABEL = "omnilaunch.doctor"

NO_ASCEND_RUNTIME = "install Ascend Docker Runtime and sudo systemctl restart docker, or cluster.ascend_runtime=false"
# What docker says when it cannot start a container -> what mends it. The first that fits.
START_FIXES = (
    ("could not select device driver", "install nvidia-container-toolkit, then: sudo systemctl restart docker"),
    ("unknown runtime specified", NO_ASCEND_RUNTIME),
    ("invalid runtime name", NO_ASCEND_RUNTIME),
    ("error gathering device information", "cluster.devices_per_node=N or cluster.nodes.N.devices for what is there, or reload the driver"),
    (
        "bind source path does not exist",
        "cluster.sync=[PATH] copies it there when a run is launched; of a driver, install it; else take the path out of cluster.mounts",
    ),
    ("rlimit", "cluster.ulimits: raise the engine's own limit (default-ulimits in /etc/docker/daemon.json), or leave it out"),
    ("operation not permitted", "leave out what the engine may not grant: cluster.ulimits"),
    ("no space left on device", "free room where docker keeps its data: docker system df"),
    ("invalid argument", "cluster.shm_size as docker takes it, such as 16g"),
)

# Listens on the rendezvous port and on any other, connects to all others on both, and prints what failed. Ends when it has reached all
# and all have reached it, or at the limit.
REACH = """
import json, socket, sys, threading, time
own, port, limit_s, *others = sys.argv[1:]
end = time.monotonic() + float(limit_s)
heard, lock = set(), threading.Lock()
def listen(at):
    server = socket.create_server((own, at), backlog=512)
    server.settimeout(0.2)
    return server
main, any_port = listen(int(port)), listen(0)
def serve(server, answer, counts):
    while time.monotonic() < end and not done.is_set():
        try:
            peer, (address, _) = server.accept()
        except TimeoutError:
            continue
        with peer:
            peer.sendall(answer)
        if counts:
            with lock:
                heard.add(address)
def ask(address, at):
    with socket.create_connection((address, at), timeout=2, source_address=(own, 0)) as peer:
        peer.settimeout(2)
        return peer.makefile('rb').readline()
def reach(address):
    at, what = int(port), 'port %s' % port
    while True:
        try:
            told = ask(address, at)
            if at != int(port):
                return failures.pop(address, None)
            at, what = int(told), 'a port other than %s' % port
        except (OSError, ValueError) as error:
            failures[address] = '%s: %s' % (what, getattr(error, 'strerror', None) or error)
            if time.monotonic() > end:
                return
            time.sleep(0.2)
done, failures = threading.Event(), {}
number = ('%d\\n' % any_port.getsockname()[1]).encode()
threads = [threading.Thread(target=serve, args=a, daemon=True) for a in ((main, number, False), (any_port, b'\\n', True))]
reaching = [threading.Thread(target=reach, args=(address,), daemon=True) for address in others]
for thread in threads + reaching:
    thread.start()
for thread in reaching:
    thread.join(max(0.1, end - time.monotonic() + 3))
while time.monotonic() < end and not heard >= set(others):
    time.sleep(0.05)
done.set()
print(json.dumps(failures))
"""


@dataclass(frozen=True, kw_only=True)
class AnsweredNode:
    """A node that answered, and the way to it."""

    case: Case
    transport: Transport


def on_each(sites: Sequence[AnsweredNode], work: Callable[[AnsweredNode], CheckResult]) -> dict[str, CheckResult]:
    """`work` on all nodes side by side; a node that is lost meanwhile is not checked."""
    answers = attempt_each(work, sites)
    return {
        site.case.node.host: unchecked(str(answer)) if isinstance(answer, NodeFailed) else answer
        for site, answer in zip(sites, answers, strict=True)
    }


def run_briefly(site: AnsweredNode, argv: tuple[str, ...], name: str) -> Result:
    """A container that is removed when its time is over, too: ending docker's client would leave it."""
    try:
        return site.transport.run((*argv[:2], "--name", name, *argv[2:]), timeout_s=START_TIMEOUT_S)
    except NodeFailed:
        with suppress(NodeFailed):
            site.transport.run(("docker", "rm", "--force", name), timeout_s=START_TIMEOUT_S)
        raise


# ------------------------------------------------------------------------------------------------- a container's options


def try_start(sites: Sequence[AnsweredNode], token: str) -> dict[str, CheckResult]:
    """`true` in the run's own image with its devices, limits and user."""

    def start(site: AnsweredNode) -> CheckResult:
        if not site.case.facts.image_id:
            return unchecked(NO_IMAGE)
        done = run_briefly(site, start_command(site.case, token), f"omnilaunch-doctor-{token}-start")
        if done.code == 0:
            return fine("a container with the run's options starts")
        said = last_line(done)
        return wrong(said, next((fix for sign, fix in START_FIXES if sign in said.lower()), "docker run says why, with the same options"))

    return on_each(sites, start)


def start_command(case: Case, token: str) -> tuple[str, ...]:
    cluster, config = case.plan.config.cluster, case.plan.config
    limits = (part for key, value in sorted(cluster.ulimits.items()) for part in ("--ulimit", f"{key}={value}"))
    mounts = (part for path in cluster.mounts for part in ("--mount", f"type=bind,source={path},target={path},readonly"))
    attachment = attach(config.hardware.accelerator, share_of(cluster, case.node, device_count(config)))
    variables = (part for key, value in sorted(attachment.environment.items()) for part in ("--env", f"{key}={value}"))
    return (
        "docker", "run", "--rm", "--network", "host", "--label", f"{DOCTOR_LABEL}={token}", "--shm-size", cluster.shm_size,
        *limits, *mounts, *attachment.options, *variables, "--entrypoint", "true", case.plan.image.tag,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ every node every other


def try_reach(sites: Sequence[AnsweredNode], choices: Sequence[NetworkChoice], token: str) -> dict[str, CheckResult]:
    """Every node connects to every other on the chosen addresses, from a container in the node's own network: on the port of the
    rendezvous, and on one that the kernel gives, as NCCL, HCCL and Gloo use."""
    if any(not site.case.facts.image_id for site in sites):
        return {EVERY_NODE: unchecked(f"whether the nodes reach each other: {NO_IMAGE}")}
    addresses = {choice.address: site.case.node.host for site, choice in zip(sites, choices, strict=True)}
    own = {host: address for address, host in addresses.items()}
    port = free_port(sites)

    def reach(site: AnsweredNode) -> CheckResult:
        mine = own[site.case.node.host]
        others = [address for address in addresses if address != mine]
        done = run_briefly(site, reach_command(site.case, port, mine, others, token), f"omnilaunch-doctor-{token}-reach")
        if done.code in DOCKER_FAILED:
            return unchecked(f"whether it reaches the others: {last_line(done)}")
        failures: dict[str, str] = {} if done.code else json.loads(done.output.strip().rpartition("\n")[2] or "{}")
        if done.code == 0 and not failures:
            return fine(f"{mine} reaches {len(others)} other(s)")
        texts = [f"{mine} cannot reach {address} ({addresses[address]}), {why}" for address, why in sorted(failures.items())]
        fix = f"a firewall: sudo ufw allow from {mine} on the other node; a wrong network: name the interface in the cluster file"
        return wrong("\n".join(texts) or f"{mine}: {last_line(done)}", fix)

    return on_each(sites, reach)


def free_port(sites: Sequence[AnsweredNode]) -> int:
    """The rendezvous port, or the next that no node uses: only node rank 0 needs that very one, and another check looks at it."""
    taken = {port for site in sites for port in site.case.facts.ports}
    first = sites[0].case.plan.config.cluster.rendezvous_port
    return next(port for port in range(first, first + 1000) if port not in taken)


def reach_command(case: Case, port: int, own: str, others: Sequence[str], token: str) -> tuple[str, ...]:
    return (
        "docker", "run", "--rm", "--network", "host", "--label", f"{DOCTOR_LABEL}={token}", "--entrypoint", "python",
        case.plan.image.tag, "-c", REACH, own, str(port), str(REACH_LIMIT_S), *others,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ one folder


def try_shared(sites: Sequence[AnsweredNode], token: str) -> dict[str, CheckResult]:
    """A mark written by the first node is seen by the others exactly when `cluster.shared` says so. Nothing is tried where the folder
    is still to be made."""
    first, *others = sites
    cluster, room = first.case.plan.config.cluster, first.case.facts.root
    root = root_of(first.case.plan)
    if room is None or room.path != root:
        text = f"{root} is not on {first.case.node.host} yet"
        return {EVERY_NODE: wrong(text, f"mount it on every node at {root}, or cluster.shared=false") if cluster.shared else fine(text)}
    mark = str(PurePosixPath(root) / f".omnilaunch-{token}")
    try:
        first.transport.put(token.encode(), mark)
        seen = on_each(others, lambda site: judge_shared(cluster.shared, root, site.transport.get(mark) == token.encode(), first))
    except NodeFailed as error:
        return {first.case.node.host: unchecked(f"whether {root} is shared: {error}")}
    finally:
        with suppress(NodeFailed):  # a node that is lost now is told by what comes next
            first.transport.run(("rm", "-f", "--", mark), timeout_s=FOLDER_TIMEOUT_S)
    return {host: found for host, found in seen.items() if found.level != "ok"} or {
        EVERY_NODE: fine(f"{root} is {'one folder' if cluster.shared else 'each node’s own'}")
    }


def judge_shared(said: bool, root: str, seen: bool, first: AnsweredNode) -> CheckResult:
    if said and not seen:
        return wrong(
            f"cluster.shared=true, but what {first.case.node.host} writes to {root} is not seen here", "cluster.shared=false, or mount it"
        )
    if seen and not said:
        return wrong(
            f"cluster.shared=false, but {root} is the folder of {first.case.node.host}: each would undo the other", "cluster.shared=true"
        )
    return fine("as the cluster file says")


def last_line(done: Result) -> str:
    lines = (done.errors.strip() or done.output.strip()).splitlines()
    spoken = [line for line in lines if line and not line.startswith("Run 'docker run --help'") and "See 'docker run" not in line]
    return spoken[-1] if spoken else f"exit code {done.code}"
