"""The nouns of a config: one frozen dataclass per axis, held against conf/*.yaml by `compose`.

Sections that the trainer reads unchanged (template, precision, LoRA, optimizer, evaluation) are the contract's own classes.
Units are in the names: _gib, _s, tflops. Lengths and batches are in tokens and samples.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.contract import (
    Conversion,
    Evaluation,
    Inference,
    Kind,
    Lora,
    Merging,
    Optimizer,
    Precision,
    Profile,
    Quantization,
    Serving,
    Source,
    Template,
)

Accelerator = Literal["cpu", "cuda", "npu"]
Confidence = Literal["published", "computed", "unverified"]
AXES = ("hardware", "model", "stage", "precision", "strategy", "data", "cluster")
GROUPS = ("vision", "projector", "lm", "head")


# ------------------------------------------------------------------------------------------------------------- hardware


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What the chip does itself. Emulated or storage-only support is not `native`; the reason is said in `notes`."""

    bf16: Literal["native", "none"]
    fp16: Literal["native", "storage", "none"]  # storage: arithmetic in fp32 is as fast or faster
    tf32: bool
    int8: Literal["tensor", "dp4a", "none"]  # tensor: matrix units; dp4a: dot product only, no training route in torch
    attention: tuple[Literal["sdpa", "flash2", "flash3", "npu_fusion", "eager"], ...]  # the first is taken
    compile: bool


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense peak rate of one device, for MFU."""

    dtype: Literal["float32", "tf32", "float16", "bfloat16", "int8"]
    tflops: float
    source: str
    confidence: Confidence


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Inclusive range of the host driver; '' = no bound. `kind`: NVIDIA driver branch, or Ascend HDK."""

    kind: Literal["nvidia", "hdk", "none"]
    minimum: str = ""
    maximum: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device. `chips`: the names that nvidia-smi or npu-smi print. `device_multiple`: device counts a job may have."""

    name: str
    title: str
    chips: tuple[str, ...]
    accelerator: Accelerator
    devices_per_node: int
    device_multiple: int = 1
    memory_gib: float | None
    host_memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    architecture: str  # what a wheel or an operator package must be compiled for: sm_61, ascend910b, x86_64
    host_architectures: tuple[Literal["x86_64", "aarch64"], ...]
    capability: Capability
    peaks: tuple[Peak, ...]
    stack: str
    driver: Driver
    collectives: Literal["nccl", "hccl", "gloo"]
    threads: int = 0  # CPU threads of each rank; 0 = torch decides
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    context_gib: float = 0.0  # of the device's memory, taken by driver and libraries before the first tensor
    fragmentation: float = 0.0  # of what comes and goes within a step: the allocator's blocks that are reserved beside it


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class Vision:
    """A vision (or audio) tower. `options`: whatever else the family's transformers config takes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int | None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A decoder. `head_dim` null = hidden_size / num_attention_heads."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    head_dim: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    vision: Vision
    text: Text
    audio: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of the whole model: merge size, queries, feature layer


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts by group. `lm` includes embeddings; `head` is 0 where it is tied to them or counted in `lm`."""

    total: int
    vision: int
    projector: int
    lm: int
    head: int
    other: int = 0  # carried, never trained: audio and speech parts
    source: str
    exact: bool


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How many tokens an image becomes. fixed: `tokens`. grid: sides to multiples of `unit` px, area within [min, max] px, one
    token per unit². tiles and slices: `unit` px squares, at most `maximum`, `tokens` each, plus an overview."""

    rule: Literal["fixed", "grid", "tiles", "slices"]
    tokens: int = 0
    unit: int = 0
    min_pixels: int = 0
    max_pixels: int = 0
    maximum: int = 0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Licence:
    name: str
    source: str
    commercial: Literal["yes", "no", "conditions", "unverified"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """`ready` false: the trainer has no module for it yet; `pending` says which work brings it. Lengths in tokens."""

    name: str
    title: str
    family: str
    ready: bool
    pending: str = ""
    source: Source
    licence: Licence
    architecture: Architecture
    parameters: Parameters
    groups: dict[str, str]
    image_token: str
    image_tokens: ImageTokens
    template: Template
    context: int
    notes: tuple[str, ...] = ()
    packable: bool = True  # false: samples in one row would see each other, whatever their positions are


# ------------------------------------------------------------------------------------------------ stage, strategy, data


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`needs`: checkpoint = start weights other than random; adapter = a LoRA result; projector = one that some run has trained, which the
    trainer sees in the checkpoint. `reset`: groups that begin anew from run.seed. `global_batch` in samples."""

    name: str
    title: str
    kind: Kind
    trainable: tuple[Literal["vision", "projector", "lm", "head"], ...]
    lora: Lora | None = None
    needs: tuple[Literal["checkpoint", "adapter", "projector"], ...] = ()
    checkpoint: str = ""
    global_batch: int
    optimizer: Optimizer
    reset: tuple[Literal["vision", "projector", "lm", "head"], ...] = ()
    merging: Merging | None = None
    conversion: Conversion | None = None
    quantization: Quantization | None = None
    inference: Inference | None = None
    serving: Serving | None = None


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """`auto` takes the least sharded one that fits. `micro_batch` and `gradient_checkpointing` null = chosen with it. `loss_chunk`: the most
    trained tokens of a micro-batch whose logits exist at a time, 0 = all. With gradient_checkpointing every `checkpoint_every`th layer of
    `checkpoint_groups` is computed twice, () = of all groups that have layers. `kernels`: of norms, SwiGLU and rotary positions; auto =
    fused ones where the chip and the installed packages have them."""

    name: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"]
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_checkpointing: bool | None = False
    micro_batch: int | None = None
    loss_chunk: int = 0
    checkpoint_every: int = 1
    checkpoint_groups: tuple[Literal["vision", "lm"], ...] = ()
    kernels: Literal["auto", "plain", "fused"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Data:
    """`builtin` names a set that the trainer writes itself; else `train` and `evaluation` are JSON files, `images` their root."""

    name: str
    builtin: Literal["", "digits", "digits_even", "digits_large"]
    train: str
    evaluation: str
    images: str
    max_length: int
    workers: int = 0
    packing: bool = False  # several samples in one row of at most max_length tokens, which do not see each other
    length_aware: Literal["off", "step", "window"] = "off"  # samples of like length together: of a step, or of a window of steps
    max_pixels: int = 0  # of an image, for families that scale it (Qwen); 0 = as the model's processor says
    max_tiles: int = 0  # of an image, for families that cut it (InternVL tiles, MiniCPM slices); 0 = as the model's processor says
    padding_free: bool | None = None  # the samples of a micro-batch one after the other in place of padding; null = on a CPU


# -------------------------------------------------------------------------------------------------------------- cluster


@dataclass(frozen=True, kw_only=True)
class Node:
    """`address`: what the other nodes reach; `host`: what SSH reaches. `port` and `user` left out are what ~/.ssh/config says for the host,
    else 22 and who runs the launcher. `devices`: numbers of those to use, as nvidia-smi's index or /dev/davinciN count, in any order;
    empty = the first ones."""

    host: str
    user: str = ""
    port: int | None = None
    address: str = ""
    interface: str = ""
    architecture: Literal["x86_64", "aarch64"] = "x86_64"
    jump: str = ""
    spare: bool = False
    devices: tuple[int, ...] = ()

    @property
    def reachable_at(self) -> str:
        """Where the other nodes reach it."""
        return self.address or self.host

    @property
    def is_local(self) -> bool:
        """Whether the node is the machine of the launcher, which needs no SSH. With a port or a jump host it is another one behind it."""
        return self.host in ("localhost", "127.0.0.1", "::1") and self.port is None and not self.jump


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the image comes to the nodes. build: made on this machine and sent to the nodes that lack it; ship: the same, but never
    built; pull: by each node from `registry`/<tag>; build_on_nodes: made by each node that lacks it, from files sent there. `base`
    overrides the stack's base image. Paths are this machine's."""

    kind: Literal["build", "pull", "ship", "build_on_nodes"] = "build"
    registry: str = ""
    base: str = ""
    index: str = ""
    extra_index: str = ""
    find_links: str = ""
    ca_bundle: str = ""
    proxy: str = ""
    wheelhouse: str = ""
    accept_licence: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`root`: on the nodes, absolute or below the launcher's folder: runs and data live under it. `shm_size` as docker takes it."""

    name: str
    runtime: Literal["process", "docker"]
    nodes: tuple[Node, ...]
    devices_per_node: int | None = None
    root: str
    delivery: Delivery = field(default_factory=Delivery)
    rendezvous_port: int = 29500
    shm_size: str = "1g"
    ulimits: dict[str, str] = field(default_factory=dict)
    user: str = ""  # uid:gid in the container; '' = the launcher's own, or 1000:1000 when that is root
    shared: bool = False  # whether `root` is one folder that all nodes see
    connect_timeout_s: int = 8  # for one SSH connection, each jump host for itself
    silence_s: int = 30  # without a sign of life, a connection counts as dead and is made anew
    node_timeout_s: int = 45  # without an answer, a node counts as lost
    ascend_runtime: bool = False  # NPUs through Ascend Docker Runtime, which the nodes' engines must have; false: by their device files
    environment: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()  # names of variables of the launcher's environment that the ranks get; values are written nowhere
    mounts: tuple[str, ...] = ()  # host paths mounted read-only at the same place
    sync: tuple[str, ...] = ()  # files and folders of the launcher's machine, copied to the same place on the nodes that lack them

    @property
    def working(self) -> tuple[Node, ...]:
        """Nodes that take part from the start; spares wait."""
        return tuple(node for node in self.nodes if not node.spare)

    @property
    def is_local(self) -> bool:
        """Whether the run is on the launcher's own machine."""
        return all(node.is_local for node in self.working)


@dataclass(frozen=True, kw_only=True)
class Bands:
    """How far a run that repeats this one may lie from it, stated before either starts; null = not stated. `loss`: of the mean of each tenth
    of the steps, a share of it; `throughput`: how much slower, `memory`: how much more, shares; `evaluation`: of each score, absolute."""

    loss: float | None = None
    throughput: float | None = None
    memory: float | None = None
    evaluation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """`force`: a reason that overrides a refusal and is recorded. Zero steps are refused; `save_every` 0 = only at the end. `restarts`:
    how often a failed run is started again from its newest checkpoint, spare nodes taking the places of lost ones; `minimum_nodes`: with
    how many it may go on when no spare is left, 0 = never with fewer."""

    steps: int
    seed: int
    deterministic: bool
    save_every: int
    keep_checkpoints: int
    stop_timeout_s: int
    start_timeout_s: int
    collective_timeout_s: int
    hang_timeout_s: int  # a step without an end for so long is taken for hung; 0 = never
    restarts: int
    minimum_nodes: int
    force: str
    evaluation: Evaluation
    save_every_s: float = 0.0  # save at the first step that ends so long after the last checkpoint; 0 = by steps alone
    keep_best: Literal["", "exact_match", "loss"] = ""  # by the evaluation; kept besides the newest keep_checkpoints
    checkpoint_background: bool = False  # the steps go on while a copy in the first node's memory is written
    trackers: tuple[str, ...] = ("tensorboard",)  # also wandb, swanlab, mlflow: where they are installed
    profile: Profile = field(default_factory=Profile)
    bands: Bands = field(default_factory=Bands)
    repeats: int = 0  # of a benchmark cell (conf/experiment): how many runs it is made of; 0 = this is none


@dataclass(frozen=True, kw_only=True)
class Config:
    hardware: Hardware
    model: Model
    stage: Stage
    precision: Precision
    strategy: Strategy
    data: Data
    cluster: Cluster
    run: Run
