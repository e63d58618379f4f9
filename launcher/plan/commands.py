"""One start command per node, as argv tuples from birth. Pure: nothing here looks at this machine."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath

from launcher.check.strings import why_no_mount
from launcher.config.schema import Cluster, Config
from launcher.errors import ConfigRefused
from launcher.image.stack import Image
from launcher.plan.devices import Attachment, attach, share_of
from trainer.contract import SINGLE_PROCESS_KINDS, SPEC_FILE, TrainSpec

RUN_LABEL = "omnilaunch.run"  # containers of a run are found again by this
RUN_VARIABLE = "OMNILAUNCH_RUN_ID"
FOLDER_VARIABLE = "OMNILAUNCH_RUN_FOLDER"  # processes of a run are found again by this: two folders may hold runs of one id
WRITABLE_HOME = "/tmp"  # of the image's user: caches of torch and transformers end with the container
CANN_LOGS = "cann"  # in the run's folder: what CANN writes of its own, for each node
PINNED_VARIABLES = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
DETERMINISTIC_VARIABLES = {
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
    "npu": {
        "HCCL_DETERMINISTIC": "true",
        "LCCL_DETERMINISTIC": "1",
        "CLOSE_MATMUL_K_SHIFT": "1",
        "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
        "ATB_LLM_LCOC_ENABLE": "0",
    },
    "cpu": {},
}
# Library and the mark before a name that must match whole; torch's own store and checks go over gloo everywhere.
SOCKET_INTERFACE = {"hccl": (("HCCL", "="), ("GLOO", "")), "nccl": (("NCCL", "="), ("GLOO", "")), "gloo": (("GLOO", ""),)}


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """All that is ever said to one node. `environment` travels in a 0600 file, never in an argv.

    `prepare` checks the data, `start` starts the ranks, `probe` prints `<status> <exit code>`, `logs` follows the output,
    `stop` asks the ranks to save and end, `remove` ends them. For the process runtime the last four are empty: the launcher
    holds the process itself.
    """

    host: str
    node_rank: int
    runtime: str
    name: str
    folder: str
    environment: dict[str, str]
    prepare: tuple[str, ...]
    start: tuple[str, ...]
    probe: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


def node_commands(config: Config, image: Image, spec: TrainSpec, *, interpreter: str, user: str) -> tuple[NodeCommand, ...]:
    """One command per working node, node rank 0 first; `user` is the uid:gid that the container runs as."""
    build = {"process": process_command, "docker": docker_command}[config.cluster.runtime]
    return tuple(build(config, image, spec, rank, interpreter, user) for rank in range(len(config.cluster.working)))


def process_command(config: Config, image: Image, spec: TrainSpec, rank: int, interpreter: str, user: str) -> NodeCommand:
    return NodeCommand(
        host=config.cluster.working[rank].host,
        node_rank=rank,
        runtime="process",
        name=container_name(spec, rank),
        folder=spec.output,
        environment=run_environment(config, spec, rank),
        prepare=(interpreter, *data_command(spec)),
        start=(interpreter, *torchrun(config, spec, rank)),
    )


def docker_command(config: Config, image: Image, spec: TrainSpec, rank: int, interpreter: str, user: str) -> NodeCommand:
    cluster, name = config.cluster, container_name(spec, rank)
    devices = attachment_of(config, spec, rank).options
    shared = (
        "--network", "host", "--user", user,
        "--label", f"{RUN_LABEL}={spec.run_id}", "--label", f"omnilaunch.node={rank}",
        "--shm-size", cluster.shm_size,
        *(part for key, value in sorted(cluster.ulimits.items()) for part in ("--ulimit", f"{key}={value}")),
        *(part for mount in mounts(cluster, spec) for part in ("--mount", mount)),
    )  # fmt: skip
    check = ("docker", "run", "--rm", "--name", data_name(name), "--env-file", data_env_file(spec.output, rank), *shared)
    ranks = ("docker", "run", "--detach", "--name", name, "--env-file", env_file(spec.output, rank), *shared, *devices)
    return NodeCommand(
        host=cluster.working[rank].host,
        node_rank=rank,
        runtime="docker",
        name=name,
        folder=spec.output,
        environment={"HOME": WRITABLE_HOME, **run_environment(config, spec, rank)},
        prepare=(*check, image.tag, "python", *data_command(spec)),
        start=(*ranks, image.tag, "python", *torchrun(config, spec, rank)),
        probe=("docker", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name),
        logs=("docker", "logs", "--follow", name),
        stop=("docker", "kill", "--signal", "TERM", name),
        remove=("docker", "rm", "--force", name),
    )


def attachment_of(config: Config, spec: TrainSpec, rank: int) -> Attachment:
    """The devices of a working node."""
    share = share_of(config.cluster, config.cluster.working[rank], spec.device.devices_per_node * spec.device.cards)
    return attach(config.hardware.accelerator, share)


def container_name(spec: TrainSpec, rank: int) -> str:
    """One run's alone, even where another folder has a run of the same id."""
    return f"omnilaunch-{spec.run_id}-{sha256(spec.output.encode()).hexdigest()[:6]}-n{rank}"


def env_file(folder: str, rank: int) -> str:
    """Beside the run's folder, which may be the container's user's, where who logs in cannot write."""
    return f"{folder}-node{rank}.env"


def data_name(name: str) -> str:
    """Of the container that checks the data."""
    return f"{name}-data"


def data_env_file(folder: str, rank: int) -> str:
    return f"{folder}-data{rank}.env"


def data_command(spec: TrainSpec) -> tuple[str, ...]:
    return ("-m", "trainer", "data", str(PurePosixPath(spec.output) / SPEC_FILE))


def torchrun(config: Config, spec: TrainSpec, rank: int) -> tuple[str, ...]:
    """Static rendezvous on node 0; one node alone takes any free port, so that two runs on a laptop do not meet. A stage of one process
    does without torchrun, which ends what it started 30 s after a signal: a server may have answers to finish."""
    if spec.stage.kind in SINGLE_PROCESS_KINDS:
        return ("-m", "trainer", "run", str(PurePosixPath(spec.output) / SPEC_FILE))
    nodes = config.cluster.working
    first = nodes[0].address or nodes[0].host
    where = (
        ("--standalone",)
        if len(nodes) == 1
        else (
            "--nnodes",
            str(len(nodes)),
            "--node-rank",
            str(rank),
            "--master-addr",
            first,
            "--master-port",
            str(config.cluster.rendezvous_port),
        )
    )
    ranks = ("--nproc-per-node", str(spec.device.devices_per_node))
    return ("-m", "torch.distributed.run", *where, *ranks, "-m", "trainer", "run", str(PurePosixPath(spec.output) / SPEC_FILE))


def mounts(cluster: Cluster, spec: TrainSpec) -> tuple[str, ...]:
    """Bind mounts at the same place inside, so that an error names a path that the reader knows. Only the run's folder and
    the folder of built-in data are writable."""
    writable = (spec.output, *((spec.data.root,) if spec.data.builtin else ()))
    named = (spec.data.train, spec.data.evaluation, spec.data.images) if not spec.data.builtin else ()
    asked = spec.stage.inference
    shown = (asked.image, asked.input) if asked else ()
    readable = (*named, spec.stage.checkpoint, spec.evaluation.base, spec.model.source.path, *shown, *cluster.mounts)
    wanted = [*((path, "") for path in writable), *((path, ",readonly") for path in dict.fromkeys(readable) if path)]
    for path, _ in wanted:  # the user's own have passed the check by their keys; these have the launcher's folder in front
        if why := why_no_mount(path):
            raise ConfigRefused(why)
    return tuple(f"type=bind,source={path},target={path}{mode}" for path, mode in wanted)


def network_environment(config: Config, rank: int) -> dict[str, str]:
    """Which interface and address the collectives use, where several nodes meet and the cluster names them."""
    nodes = config.cluster.working
    node = nodes[rank]
    if len(nodes) == 1:
        return {}
    interface = {
        f"{name}_SOCKET_IFNAME": exact + node.interface for name, exact in SOCKET_INTERFACE[config.hardware.collectives] if node.interface
    }
    return interface | ({"HCCL_IF_IP": node.address} if config.hardware.collectives == "hccl" and node.address else {})


def toolkit_environment(config: Config, spec: TrainSpec, rank: int) -> dict[str, str]:
    """CANN's own log lies below the container's home unless it is told otherwise, and would end with the container. images/entrypoint.sh
    makes the folder, as the container's user."""
    if config.hardware.accelerator != "npu" or config.cluster.runtime != "docker":
        return {}
    return {"ASCEND_PROCESS_LOG_PATH": str(PurePosixPath(spec.output) / CANN_LOGS / f"node{rank}")}


def run_environment(config: Config, spec: TrainSpec, rank: int) -> dict[str, str]:
    """Every variable that we set, later ones win: pinned, device, hardware table, network, this run, and last what the cluster says."""
    hardware, cluster = config.hardware, config.cluster
    environment = {
        **PINNED_VARIABLES,
        **(OFFLINE_VARIABLES if spec.model.source.kind != "hub" else {}),
        **(DETERMINISTIC_VARIABLES[hardware.accelerator] if spec.deterministic else {}),
        **attachment_of(config, spec, rank).environment,
        **hardware.environment,
        **toolkit_environment(config, spec, rank),
        **network_environment(config, rank),
        **({"OMP_NUM_THREADS": str(spec.device.threads)} if spec.device.threads else {}),
        RUN_VARIABLE: spec.run_id,
        FOLDER_VARIABLE: spec.output,
        **cluster.environment,
    }
    return dict(sorted(environment.items()))
