"""The schema of a config: one frozen dataclass per axis. `compose` checks conf/*.yaml against it.

Sections that the trainer reads unchanged (template, precision, LoRA, optimizer, evaluation) are classes of trainer.contract.
Names have units: _gib, _s, tflops. Lengths are in tokens, batches in samples.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.config.cluster import Cluster as Cluster, Delivery as Delivery, Node as Node
from launcher.config.source import ModelSource, RecordedWeights
from trainer.contract import (
    Augmentation,
    ChatTemplate,
    Conversion,
    EarlyStop,
    Entries,
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
    Template,
)

Accelerator = Literal["cpu", "cuda", "npu"]
Confidence = Literal["published", "computed", "unverified"]
AXES = ("hardware", "model", "stage", "precision", "strategy", "data", "cluster")
GROUPS = ("vision", "projector", "lm", "head")


# ------------------------------------------------------------------------------------------------------------- hardware
@dataclass(frozen=True, kw_only=True)
class Capability:
    """What the chip supports in hardware. Emulated or storage-only support is not `native`; Hardware.notes says why."""

    bf16: Literal["native", "none"]
    fp16: Literal["native", "storage", "none"]  # storage: fp32 arithmetic is as fast or faster
    tf32: bool
    int8: Literal["tensor", "dp4a", "none"]  # tensor: matrix units; dp4a: dot products only, which torch cannot train with
    attention: tuple[Literal["sdpa", "flash2", "flash3", "npu_fusion", "eager"], ...]  # the first one is used
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
    """Allowed versions of the host driver, inclusive; '' = no limit. `kind`: NVIDIA driver branch, or Ascend HDK."""

    kind: Literal["nvidia", "hdk", "none"]
    minimum: str = ""
    maximum: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device. `chips`: its names in nvidia-smi or npu-smi. `device_multiple`: a job uses a multiple of this many devices."""

    name: str
    title: str
    chips: tuple[str, ...]
    accelerator: Accelerator
    devices_per_node: int
    device_multiple: int = 1
    memory_gib: float | None
    host_memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    architecture: str  # that a wheel or an operator package is compiled for: sm_61, ascend910b, x86_64
    host_architectures: tuple[Literal["x86_64", "aarch64"], ...]
    capability: Capability
    peaks: tuple[Peak, ...]
    stack: str
    driver: Driver
    collectives: Literal["nccl", "hccl", "gloo"]
    threads: int = 0  # CPU threads per rank; 0 = the default of torch
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    context_gib: float = 0.0  # device memory that driver and libraries take before the first tensor
    fragmentation: float = 0.0  # share of a step's temporary memory that the allocator reserves in addition


# ---------------------------------------------------------------------------------------------------------------- model
@dataclass(frozen=True, kw_only=True)
class Vision:
    """A vision tower. `options`: further keys of the family's transformers config."""

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
    """Number of parameters by group. `lm` includes the embeddings; `head` is 0 where it is tied to them or counted in `lm`."""

    total: int
    vision: int
    projector: int
    lm: int
    head: int
    other: int = 0  # never trained: audio and speech parts
    source: str
    exact: bool


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How many tokens an image has. fixed: `tokens`. grid: sides are rounded to multiples of `unit` px, the area is kept within [min, max]
    px, one token per unit². tiles and slices: at most `maximum` squares of `unit` px with `tokens` each, plus an overview."""

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
    """`ready` false: the trainer does not support it yet; `pending` says what is missing. `context` in tokens."""

    name: str
    title: str
    family: str
    ready: bool
    pending: str = ""
    source: ModelSource
    licence: Licence
    architecture: Architecture
    parameters: Parameters
    groups: dict[str, str]
    image_token: str
    image_tokens: ImageTokens
    template: Template
    context: int
    notes: tuple[str, ...] = ()
    packable: bool = True  # false: samples packed into one row would attend to each other
    add_tokens: tuple[str, ...] = ()  # new tokens: embeddings and head get a row for each
    chat_template: ChatTemplate = ""  # auto = that of the checkpoint's files where there is one; checkpoint; conf = model.template


# ------------------------------------------------------------------------------------------------ stage, strategy, data
@dataclass(frozen=True, kw_only=True)
class Stage:
    """`needs`: checkpoint = weights to start from; adapter = the result of a LoRA stage; projector = a trained projector, which the trainer
    checks in the checkpoint. `reset`: groups that are initialized again from run.seed. `global_batch` in samples."""

    name: str
    title: str
    kind: Kind
    trainable: tuple[Literal["vision", "projector", "lm", "head"], ...]
    lora: Lora | None = None
    needs: tuple[Literal["checkpoint", "adapter", "projector"], ...] = ()
    checkpoint: str = ""
    base: str = ""  # the model that an adapter in `checkpoint` was trained on, where it names a folder that is not there
    global_batch: int
    optimizer: Optimizer
    reset: tuple[Literal["vision", "projector", "lm", "head"], ...] = ()
    merging: Merging | None = None
    conversion: Conversion | None = None
    quantization: Quantization | None = None
    inference: Inference | None = None
    serving: Serving | None = None
    label_smoothing: float = 0.0  # share of the target that is spread evenly over the vocabulary
    neftune_alpha: float = 0.0  # noise on the embeddings of training, 5 in the paper (arXiv 2310.05914); 0 = none
    recorded: RecordedWeights | None = None


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """`auto` uses the least sharded strategy that fits. `micro_batch` and `gradient_checkpointing` null = chosen by `auto`. `loss_chunk`: for
    how many trained tokens logits exist at a time, 0 = all of the micro-batch. With gradient_checkpointing every `checkpoint_every`th layer
    of `checkpoint_groups` is recomputed in the backward pass, () = of all groups with layers. `kernels`: of norms, SwiGLU and rotary
    positions; auto = fused where the chip and the installed packages support them."""

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
    """`builtin`: a data set that the trainer creates; otherwise `train` and `evaluation` are files of rows, globs, folders, names of data sets, or a list
    of these, and `images` the folder of images. `evaluation` may be a number: the rows that are held out of `train`, or their share of them."""

    name: str
    builtin: Literal["", "digits", "digits_even", "digits_large"]
    train: Entries
    evaluation: Entries
    images: str
    max_length: int
    workers: int = 0
    packing: bool = False  # several samples in one row of at most max_length tokens; they do not attend to each other
    length_aware: Literal["off", "step", "window"] = "off"  # group samples of similar length within a step, or within a window of steps
    max_pixels: int = 0  # per image, for families that scale it (Qwen); 0 = the default of the model's processor
    max_tiles: int = 0  # per image, for families that cut it (InternVL tiles, MiniCPM slices); 0 = as max_pixels
    augmentation: Augmentation = field(default_factory=Augmentation)  # of the images of training rows
    padding_free: bool | None = None  # concatenate the samples of a micro-batch instead of padding them; null = only on a CPU
    rows: int = 0  # of `train`, in which run.epochs counts; 0 = they are counted, where the file is on this machine
    split_seed: int | None = None  # chooses the rows that are held out of `train`, and the `samples` of an entry; null = run.seed
    max_samples: int = 0  # of each set of `train`, the first ones; 0 = all
    mixing: Literal["concat", "interleave"] = "concat"  # all rows of all sets, or of each set as many as its weight says
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"  # where an epoch of mixing=interleave ends
    info: str = ""  # a dataset_info.json, or its folder, that has the names in `train` and `evaluation`
    mirror: str = ""  # a folder with copies of data sets of a hub, OWNER/NAME
    bad_rows: Literal["refuse", "skip"] = "refuse"  # a row with a problem of its own: the run is refused, or goes on without the row
    too_long: Literal["refuse", "skip", "cut"] = "refuse"  # a row of more than max_length tokens; cut = at its end, if an answer is left
    unmarked: Literal["refuse", "first", "last"] = "refuse"  # several images without marks: put before or after the first question
    turns: Literal["strict", "trim", "join"] = (
        "strict"  # trim answers before the first question and questions after the last answer; join also joins two messages of one role
    )
    learn: Literal["all", "last"] = "all"  # answers that are in the loss: all, or the last one of each conversation
    truncated_images: Literal["refuse", "read"] = "refuse"  # a PNG or JPEG whose end is missing; read = as far as it goes
    # what boxes in texts are: pixels of the file, 0 to 1, thousandths; they are converted to the form of the model. as_written = left alone
    boxes: Literal["as_written", "original", "norm1", "norm1000"] = "as_written"
    reasoning: Literal["keep", "strip"] = "keep"  # of answers, under a key or in a block of its own
    question: str = ""  # of rows that have an image and its caption, and no question
    system: str = "row"  # system message: row = its own, else the template's; default = the template's; none; or a text for every row
    image_place: Literal["row", "front", "bare"] = "row"  # of a question: as in the row, first (LLaVA), without white space (Qwen-VL)


@dataclass(frozen=True, kw_only=True)
class Bands:
    """How far a run that repeats this one may differ, stated before either starts; null = not stated. `loss`: relative, of the mean of each
    tenth of the steps; `throughput`: relative, how much slower; `memory`: relative, how much more; `evaluation`: absolute, of each score."""

    loss: float | None = None
    throughput: float | None = None
    memory: float | None = None
    evaluation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """`force`: a reason, which overrides a refusal and is recorded. `save_every`: in steps, 0 = only at the end. `restarts`: how often a failed
    run is started again from its newest checkpoint, with spare nodes in place of lost ones; `minimum_nodes`: with how many nodes it may
    continue when no spare is left, 0 = only with all."""

    steps: int
    seed: int
    deterministic: bool
    save_every: int
    keep_checkpoints: int
    stop_timeout_s: int | None  # null: launcher.plan.stop_limit, by the size of the states
    start_timeout_s: int
    collective_timeout_s: int
    hang_timeout_s: int  # a step that takes longer counts as hung; 0 = never
    restarts: int
    minimum_nodes: int
    force: str
    evaluation: Evaluation
    save_every_s: float = 0.0  # save at the first step that ends so long after the last checkpoint; 0 = only by steps
    keep_best: Literal["", "exact_match", "loss"] = ""  # by the evaluation; kept in addition to the newest keep_checkpoints
    checkpoint_background: bool = False  # training continues while a copy in the memory of the first node is written
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    trackers: tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow"], ...] = ("tensorboard",)  # those that are installed
    profile: Profile = field(default_factory=Profile)
    bands: Bands = field(default_factory=Bands)
    epochs: float | None = None  # instead of steps: how often each row is used; the plan turns it into steps, rounded up
    repeats: int = 0  # runs of a benchmark (conf/experiment); 0 = not a benchmark


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
