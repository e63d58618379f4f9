"""The start command of each node, and the variables of its container or process. Pure: nothing here looks at this machine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import PurePosixPath

from launcher.check.strings import why_no_mount
from launcher.config.schema import Cluster, Config, Node
from launcher.errors import ConfigRefused
from launcher.image.stack import Image
from launcher.memory.states import model_states
from launcher.plan.devices import DEVICE_OPTIONS, DeviceOptions, share_of
from launcher.plan.docker_run import ContainerOptions, Mount, docker_run
from launcher.plan.stop_limit import stop_limit_s
from trainer.contract import SINGLE_PROCESS_KINDS, SPEC_FILE, TrainSpec
from trainer.contract.determinism import deterministic_variables

RUN_LABEL = "omnilaunch.run"  # the containers of a run are found by this label
RUN_VARIABLE = "OMNILAUNCH_RUN_ID"
FOLDER_VARIABLE = "OMNILAUNCH_RUN_FOLDER"  # the processes of a run are found by this variable: two folders may hold runs of one id
PART_VARIABLE = "OMNILAUNCH_RUN_PART"  # "<part> <folder>": the ranks of a run end while its data check goes on
TORCHRUN = "torch.distributed.run"  # the module
WRITABLE_HOME = "/tmp"  # HOME in the container: caches of torch and transformers are removed with it
RDMA_LIMITS = {"memlock": "-1"}  # it registers memory, which the kernel then may not move
CANN_LOGS = "cann"  # folder of CANN's own logs in the run's folder, with one folder per node
PINNED_VARIABLES = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
HCCL_PORT_VARIABLE, HCCL_FIRST_PORT, HCCL_PORT_COUNT = "HCCL_IF_BASE_PORT", 60000, 32  # hccl_env documentation
# Library, and the prefix that makes it match the whole name of an interface. torch's own store and checks use gloo everywhere.
SOCKET_INTERFACE = {"hccl": (("HCCL", "="), ("GLOO", "")), "nccl": (("NCCL", "="), ("GLOO", "")), "gloo": (("GLOO", ""),)}


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """All commands for one node. `environment` travels in a file of mode 0600, never in an argv.

    `prepare` checks the data, `start` starts the ranks, `probe` prints `<status> <exit code>`, `logs` follows the output,
    `stop` asks the ranks to save and end, `remove` ends them. For the process runtime the last four are empty: the launcher
    holds the process itself. `container`: the options of the ranks' container; None for the process runtime, and in plans that were
    written by versions before this field.
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
    container: ContainerOptions | None = None


def node_commands(config: Config, image: Image, spec: TrainSpec, *, interpreter: str, user: str) -> tuple[NodeCommand, ...]:
    """One command per working node, node rank 0 first; `user` is the uid:gid that the container runs as."""
    if config.cluster.runtime == "docker":
        return tuple(docker_command(config, image, spec, node, rank, user) for rank, node in enumerate(config.cluster.working))
    return tuple(process_command(config, spec, node, rank, interpreter) for rank, node in enumerate(config.cluster.working))


def process_command(config: Config, spec: TrainSpec, node: Node, rank: int, interpreter: str) -> NodeCommand:
    return NodeCommand(
        host=node.host,
        node_rank=rank,
        runtime="process",
        name=container_name(spec, rank),
        folder=spec.output,
        environment=run_environment(config, spec, node, rank),
        prepare=(interpreter, *data_command(spec)),
        start=(interpreter, *torchrun(config, spec, rank)),
    )


def docker_command(config: Config, image: Image, spec: TrainSpec, node: Node, rank: int, user: str) -> NodeCommand:
    container = container_options(config, image, spec, node, rank, user)
    without_devices = replace(container, devices=(), gpus=(), runtime="", groups=(), stop_timeout_s=0, mounts=mounts(config.cluster, spec))
    check = replace(without_devices, name=data_name(container.name), env_file=data_env_file(spec.output, rank))
    return NodeCommand(
        host=node.host,
        node_rank=rank,
        runtime="docker",
        name=container.name,
        folder=spec.output,
        environment={"HOME": WRITABLE_HOME, **run_environment(config, spec, node, rank)},
        prepare=docker_run(check, ("python", *data_command(spec))),
        start=docker_run(container, ("python", *torchrun(config, spec, rank)), detach=True),
        probe=("docker", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", container.name),
        logs=("docker", "logs", "--follow", container.name),
        stop=("docker", "kill", "--signal", "TERM", container.name),
        remove=("docker", "rm", "--force", container.name),
        container=container,
    )


def container_options(config: Config, image: Image, spec: TrainSpec, node: Node, rank: int, user: str) -> ContainerOptions:
    """The options of the container that runs the ranks of a node."""
    cluster, devices = config.cluster, device_options(config, spec, node)
    return ContainerOptions(
        image=image.tag,
        name=container_name(spec, rank),
        env_file=env_file(spec.output, rank),
        user=user,
        labels={RUN_LABEL: spec.run_id, "omnilaunch.node": str(rank)},
        shm_size=cluster.shm_size,
        ulimits=dict(sorted({**(RDMA_LIMITS if node.rdma else {}), **cluster.ulimits}.items())),
        mounts=(*mounts(cluster, spec), *devices.mounts),
        devices=devices.devices,
        gpus=devices.gpus,
        runtime=devices.runtime,
        stop_timeout_s=math.ceil(stop_limit_s(config, model_states(config))),
        groups=node.groups,
    )


def device_options(config: Config, spec: TrainSpec, node: Node) -> DeviceOptions:
    share = share_of(config.cluster, node, spec.device.devices_per_node * spec.device.cards)
    return DEVICE_OPTIONS[config.hardware.accelerator](share)


def container_name(spec: TrainSpec, rank: int) -> str:
    """Unique even where another folder has a run of the same id."""
    return f"omnilaunch-{spec.run_id}-{sha256(spec.output.encode()).hexdigest()[:6]}-n{rank}"


def env_file(folder: str, rank: int) -> str:
    """Next to the run's folder: the folder itself may belong to the container's user, and the login may not be allowed to write there."""
    return f"{folder}-node{rank}.env"


def data_name(name: str) -> str:
    """The name of the container that checks the data."""
    return f"{name}-data"


def data_env_file(folder: str, rank: int) -> str:
    return f"{folder}-data{rank}.env"


def data_command(spec: TrainSpec) -> tuple[str, ...]:
    return ("-m", "trainer", "data", str(PurePosixPath(spec.output) / SPEC_FILE))


def torchrun(config: Config, spec: TrainSpec, rank: int) -> tuple[str, ...]:
    """Static rendezvous on node 0. A single node takes any free port, so that two runs on one machine do not collide. A stage of one
    process is started without torchrun, which kills its children 30 s after a signal: a server may need longer to answer its requests."""
    run = ("-m", "trainer", "run", str(PurePosixPath(spec.output) / SPEC_FILE))
    if spec.stage.kind in SINGLE_PROCESS_KINDS:
        return run
    nodes, port = config.cluster.working, str(config.cluster.rendezvous_port)
    rendezvous: tuple[str, ...] = ("--standalone",)
    if len(nodes) > 1:
        counts = ("--nnodes", str(len(nodes)), "--node-rank", str(rank))
        rendezvous = (*counts, "--master-addr", nodes[0].reachable_at, "--master-port", port)
    return ("-m", TORCHRUN, *rendezvous, "--nproc-per-node", str(spec.device.devices_per_node), *run)


def mounts(cluster: Cluster, spec: TrainSpec) -> tuple[Mount, ...]:
    """Bind mounts at the same path inside, so that an error names a path that the user knows. Only the run's folder and the folder of
    built-in data are writable."""
    data, inference = spec.data, spec.stage.inference
    writable = (spec.output, *((data.root,) if data.builtin else ()))
    questions = image_folder(inference.input, data.images) if inference else ""
    inputs = (inference.image, questions) if inference else ()
    readable = (
        *map(beside(spec), data_paths(spec)),
        spec.stage.checkpoint,
        spec.evaluation.base,
        spec.model.source.path,
        *inputs,
        *cluster.mounts,
    )
    wanted = (*(Mount(path=path, read_only=False) for path in writable), *(Mount(path=path) for path in dict.fromkeys(readable) if path))
    for mount in wanted:  # the paths of the config were checked by key; these have the current folder in front
        if why := why_no_mount(mount.path):
            raise ConfigRefused(why)
    return wanted


def data_paths(spec: TrainSpec) -> tuple[str, ...]:
    """What a run reads of the user's own data: the annotation files and the folder of images; without data.images the folders of the files,
    where image paths start then."""
    data = spec.data
    files = () if data.builtin else (data.train, data.evaluation)
    named = (*(image_folder(file, data.images) for file in files), *(() if data.builtin else (data.images,)))
    return tuple(dict.fromkeys(path for path in named if path))


def beside(spec: TrainSpec) -> Callable[[str], str]:
    """The folder in place of an annotation file: what it names (dataset_info.json, the files that a meta file lists) is read from there."""
    files = (spec.data.train, spec.data.evaluation)

    def widen(path: str) -> str:
        parent = PurePosixPath(path).parent
        return str(parent) if path in files and parent != parent.parent else path

    return widen


def image_folder(file: str, images: str) -> str:
    """The file alone where its images are in a folder of their own, else the folder of the file."""
    return file if images or not file else str(PurePosixPath(file).parent)


def network_environment(config: Config, node: Node) -> dict[str, str]:
    """The interface and address that the collectives use: set for several nodes, where the cluster file names them."""
    if len(config.cluster.working) == 1:
        return {}
    libraries = SOCKET_INTERFACE[config.hardware.collectives] if node.interface else ()
    address = {"HCCL_IF_IP": node.address} if config.hardware.collectives == "hccl" and node.address else {}
    return {f"{name}_SOCKET_IFNAME": exact + node.interface for name, exact in libraries} | address


def toolkit_environment(config: Config, spec: TrainSpec, rank: int) -> dict[str, str]:
    """CANN writes its own log below the container's home by default, and it would be removed with the container. images/entrypoint.sh
    creates the folder as the container's user."""
    if config.hardware.accelerator != "npu" or config.cluster.runtime != "docker":
        return {}
    return {"ASCEND_PROCESS_LOG_PATH": str(PurePosixPath(spec.output) / CANN_LOGS / f"node{rank}")}


def run_environment(config: Config, spec: TrainSpec, node: Node, rank: int) -> dict[str, str]:
    """Every variable that we set. Later ones override earlier ones: pinned, device, hardware table, network, this run, cluster file."""
    hardware, cluster = config.hardware, config.cluster
    environment = {
        **PINNED_VARIABLES,
        **(OFFLINE_VARIABLES if spec.model.source.kind != "hub" else {}),
        **({"HF_ENDPOINT": config.model.source.endpoint} if config.model.source.endpoint else {}),
        **({name: values[0] for name, values in deterministic_variables(hardware.accelerator).items()} if spec.deterministic else {}),
        **device_options(config, spec, node).environment,
        **hardware.environment,
        **toolkit_environment(config, spec, rank),
        **network_environment(config, node),
        **({"OMP_NUM_THREADS": str(spec.device.threads)} if spec.device.threads else {}),
        RUN_VARIABLE: spec.run_id,
        FOLDER_VARIABLE: spec.output,
        **cluster.environment,
    }
    return dict(sorted(environment.items()))


def env_lines(environment: Mapping[str, str]) -> str:
    """Lines as `docker run --env-file` reads them: no quotes, the rest of the line is the value."""
    return "".join(f"{key}={value}\n" for key, value in sorted(environment.items()))


def hccl_ports(environment: Mapping[str, str]) -> range:
    """The TCP ports that HCCL listens on, by the variables of a node."""
    text = environment.get(HCCL_PORT_VARIABLE, "")
    first = int(text) if text.isdecimal() else HCCL_FIRST_PORT
    return range(first, first + HCCL_PORT_COUNT)
