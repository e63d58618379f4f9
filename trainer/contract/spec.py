"""`TrainSpec`: everything that the launcher passes to a run of the trainer, and the exceptions and exit codes of both.

A change of the meaning or shape of anything in this package raises `SCHEMA`; a file or an image with another number is refused.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

from trainer.contract.environment_facts import Expectation
from trainer.contract.options import (
    Augmentation,
    Conversion,
    EarlyStop,
    Evaluation,
    Inference,
    Merging,
    Profile,
    Quantization,
    Serving,
)

SCHEMA = 1

Dtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["train", "evaluate", "merge", "convert", "quantize", "infer", "serve"]
ChatTemplate = Literal["", "auto", "checkpoint", "conf"]
AcceptedChange = Literal["steps", "data"]
SINGLE_PROCESS_KINDS = ("merge", "convert", "quantize", "serve")  # run in one process, without torchrun


class Exit(IntEnum):
    """Exit codes of `omnilaunch` and of `python -m trainer`."""

    OK = 0
    BUG = 1
    USAGE = 2  # refused config or input
    IMAGE = 3
    NODE = 4
    RUN = 5
    HUNG = 6  # a step did not end; every rank has written its stacks to its log
    DIFFERENT = 7  # `omnilaunch compare`: the runs are not the same


class InputRefused(Exception):
    """The run cannot start from this input. The text says what, where, what is allowed, and what to do (exit code 2)."""


class RunFailed(Exception):
    """The run started and cannot continue. The text says what is lost, what is kept, and what to do (exit code 5)."""


class SpecError(Exception):
    """A file does not have the shape of its dataclass; says which key."""


class OtherSchema(SpecError):
    """A file was written with another schema number than SCHEMA."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template as segments: labels come from the segments, not from a search in the tokens.

    `user` holds `{content}`. The loss covers the answer and `end_mark`; everything else is masked. `system`: the text of a conversation without a
    system message; one that it has takes its place, in `system_frame`, which holds `{content}`. A `system` with `{content}` is such a frame, and
    then there is no text without a message. `tool`: the frame of the result of a tool; `reasoning`: of what an answer thinks before its content.
    A message without its frame is refused.
    """

    system: str = ""
    user: str
    assistant_open: str
    end_mark: str
    separator: str = ""
    system_frame: str = ""
    tool: str = ""
    reasoning: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights come from: `random` (architecture only), `hub` (id and revision) or `path` (a local folder)."""

    kind: Literal["random", "hub", "path"]
    id: str = ""
    revision: str = ""
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Lora:
    r: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]  # linear layers of the language model: their own names, or 're:REGEX' over full module names
    rank_stabilised: bool = False
    base: Literal["", "nf4"] = ""  # nf4: the frozen layers are in 4 bits (Dettmers et al., QLoRA, arXiv 2305.14314); CUDA only
    base_groups: tuple[Literal["lm", "vision"], ...] = ("lm",)  # groups whose linear layers `base` is for


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes. `optimizer`: of master weights and optimizer states; `compute`: of activations. `rounding`: how the optimizer's results are
    rounded to `optimizer`; stochastic for bfloat16 only."""

    name: str
    weights: Dtype
    compute: Dtype
    optimizer: Dtype
    gradients: Dtype
    loss_scaling: Literal["none", "dynamic"] = "none"
    rounding: Literal["nearest", "stochastic"] = "nearest"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW. `warmup` counts steps when >= 1 and is a share of all steps when < 1. Betas, eps and decay as in Loshchilov and Hutter,
    Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2. `group_lr`: peak learning rates of parameter groups that
    differ from `lr`, on the same schedule. `state_bits`: bits per element of either moment; 0 = dtype of `Precision.optimizer`,
    8 = quantized block by block (Dettmers et al., arXiv 2110.02861).

    A schedule ends at `final_ratio` of `lr`; `cycles` of cosine_restarts, `power` of polynomial; wsd (warm-up, stable, decay) decays over
    the last `decay`, counted as `warmup`. `ema_decay`: also keep a moving average of the trained weights, 0 = none; `ema_weights`: which of
    the two are evaluated and are the weights of a checkpoint."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd"] = "cosine"
    warmup: float = 0.03
    clip_norm: float = 1.0
    group_lr: dict[str, float] = field(default_factory=dict)
    state_bits: Literal[0, 8] = 0
    final_ratio: float = 0.0
    cycles: int = 1
    power: float = 1.0
    decay: float = 0.1
    ema_decay: float = 0.0
    ema_weights: Literal["average", "trained"] = "average"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """`groups`: name (vision, projector, lm, head) -> regex over parameter names in memory. `architecture`: for a random start only.
    `add_tokens`: new tokens, for which embeddings and head get rows. `chat_template`: which one conversations are written with: `checkpoint` = that
    in the folder of the model, `conf` = `template`, `auto` = that of the folder where it has one. '' is conf, as in specs of earlier versions."""

    name: str
    family: str
    source: Source
    architecture: dict[str, Any]
    groups: dict[str, str]
    image_token: str
    template: Template
    attention: str
    add_tokens: tuple[str, ...] = ()
    chat_template: ChatTemplate = ""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """`trainable`: groups whose parameters get gradients. `checkpoint`: weights to start from, or ''. `base`: the folder of the model that an
    adapter in `checkpoint` was trained on, '' = the one that it names. `reset`: groups that are drawn again
    from the run's seed. `needs`: groups that must be trained already (`projector`: by some earlier run). Of the options of the kinds
    that do not train, only those of `kind` are set. `label_smoothing`: as of torch's cross_entropy; `neftune_alpha`: noise on the embeddings
    of training (Jain et al., NEFTune, arXiv 2310.05914), 0 = none."""

    name: str
    kind: Kind
    trainable: tuple[str, ...]
    lora: Lora | None = None
    checkpoint: str = ""
    reset: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    merging: Merging | None = None
    conversion: Conversion | None = None
    quantization: Quantization | None = None
    inference: Inference | None = None
    serving: Serving | None = None
    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One of several sets of rows in data.train or data.evaluation; its `file` alone may be written as a text. `images`: the folder that its image
    paths start at, '' = data.images. `samples`: rows that are drawn from it, more than it has: some again; 0 = all. `repeat`: how often they are used
    in an epoch, below 1 the first part of them. `weight`: its part of an epoch with data.mixing=interleave."""

    SHORT: ClassVar[str] = "file"  # see trainer.contract.codec

    file: str
    images: str = ""
    samples: int = 0
    repeat: float = 1.0
    weight: float | None = None


Entries = str | tuple[DataEntry, ...]  # of data.train and data.evaluation; '' = none


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Conversations with images. `builtin`: a data set that the trainer writes itself into `root` before the first step.

    `max_length`: tokens of a sample, image tokens included; with `packing`, tokens of a row that holds several samples, which do not
    attend to each other. `length_aware`: samples of similar length share a micro-batch, chosen from one step or a window of steps.
    `padding_free`: the samples of a micro-batch are concatenated, as in a packed row, instead of padded.
    `rows`: of `train`, where the steps were planned for that number; another one is refused. 0 = any.
    `max_pixels` (families that scale an image) and `max_tiles` (families that cut it) limit an image's tokens; 0 = the processor's limit.
    `split`: what is held out of `train`: a share below 1, or a number of rows; 0 = nothing. `split_seed` chooses these rows, and the `samples` of an
    entry. `max_samples`: the first rows of each set of `train`; 0 = all. `mixing`: of the sets of `train`; `interleave` takes of each so many rows
    that they have the proportions of their weights, until the first set, or all of them, are used up (`mixing_stop`). `info`: a dataset_info.json
    that has the names in `train` and `evaluation`. `mirror`: a folder with copies of the data sets of a hub.
    `bad_rows`, `too_long`: what happens to a row with a problem, and to one of more than `max_length` tokens (trainer.data.left_out); `unmarked`,
    `turns`, `learn`, `reasoning`, `question`, `image_place`: how rows are read (trainer.data.rows.row_rules).
    `system`: whose system message a conversation has: `row` = its own, or else the default of the chat template; `default` = always that of the
    template; `none`; or a text, for every row.
    """

    name: str
    builtin: str
    root: str
    train: Entries
    evaluation: Entries
    images: str
    max_length: int
    workers: int
    packing: bool = False
    length_aware: Literal["off", "step", "window"] = "off"
    max_pixels: int = 0
    max_tiles: int = 0
    padding_free: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    rows: int = 0
    split: float = 0.0
    split_seed: int = 0
    max_samples: int = 0
    mixing: Literal["concat", "interleave"] = "concat"
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    info: str = ""
    mirror: str = ""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    unmarked: Literal["refuse", "first", "last"] = "refuse"
    turns: Literal["strict", "trim", "join"] = "strict"
    learn: Literal["all", "last"] = "all"
    truncated_images: Literal["refuse", "read"] = "refuse"  # an image file whose end is missing
    boxes: Literal["as_written", "original", "norm1", "norm1000"] = "as_written"  # what the numbers of boxes in texts are
    reasoning: Literal["keep", "strip"] = "keep"  # of answers, under a key or in a block of its own
    question: str = ""  # of rows with an image and its caption; '' = they are refused
    system: str = "row"
    image_place: Literal["row", "front", "bare"] = "row"

    @property
    def leaves_rows_out(self) -> bool:
        """Whether a run may use fewer rows than its files have. Then the data check decides which, and every rank waits for it."""
        return self.bad_rows == "skip" or self.too_long != "refuse"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """global_batch = micro_batch x accumulation x world_size, in samples. With `data.packing` micro_batch counts packed rows, which hold
    more than one sample each, and accumulation is the most that a step may need."""

    global_batch: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """`threads`: CPU threads of each rank, 0 = torch's default."""

    accelerator: Literal["cpu", "cuda", "npu"]
    backend: Literal["gloo", "nccl", "hccl"]
    world_size: int
    devices_per_node: int
    threads: int
    timeout_s: int
    cards: int = 1  # per rank; more than one where a model is spread over them


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything that one run of the trainer is given. `output`: the run's folder as the trainer sees it. `hang_timeout_s`: a step that
    takes longer prints the stacks of every rank, and the run ends soon after; 0 = never."""

    schema: int
    run_id: str
    output: str
    seed: int
    deterministic: bool
    steps: int
    save_every: int
    keep_checkpoints: int
    gradient_checkpointing: bool
    model: ModelSpec
    stage: StageSpec
    precision: Precision
    optimizer: Optimizer
    batch: Batch
    data: DataSpec
    device: DeviceSpec
    evaluation: Evaluation
    deepspeed: dict[str, Any]
    hang_timeout_s: float = 0.0
    save_every_s: float = 0.0  # save at the first step that ends this long after the last checkpoint; 0 = by steps only
    keep_best: Literal["", "exact_match", "loss"] = ""  # keep the checkpoint with the best evaluation beside the newest ones
    checkpoint_background: bool = False  # training continues while a copy in host memory is written
    trackers: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    loss_chunk: int = 0  # the most trained tokens of a micro-batch whose logits exist at a time; 0 = all of them
    checkpoint_every: int = 1  # with gradient_checkpointing: every how many layers
    checkpoint_groups: tuple[str, ...] = ()  # and in which groups of the model; () = all that have layers
    trackers_named: bool = True  # by the user: refused if its package is missing; False = the default, skipped if missing
    kernels: Literal["auto", "plain", "fused"] = "plain"  # of layers; auto = fused where accelerator and packages have them
    expects: Expectation | None = None  # of a rerun, or of a run that is resumed
    accepted_changes: tuple[AcceptedChange, ...] = ()  # what differs from the checkpoints of this run because the user accepted it
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    earlier_steps: tuple[int, ...] = ()  # the last steps of earlier attempts that were given fewer: windows of samples end there too

    @property
    def window_ends(self) -> tuple[int, ...]:
        """The steps after which windows of samples end, beside those at regular distances. A run that was given fewer steps keeps the windows that
        it has begun."""
        return self.earlier_steps if self.steps <= max(self.earlier_steps, default=0) else (*self.earlier_steps, self.steps)

    @property
    def waits_for_check(self) -> bool:
        """Whether the ranks wait for the data check: to train on checked rows, or to know which rows are left out."""
        return self.stage.kind == "train" or self.data.leaves_rows_out

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's section for ZeRO; {} without ZeRO."""
        section: dict[str, Any] = self.deepspeed.get("zero_optimization", {})
        return section

    @property
    def partitioned(self) -> bool:
        """Whether each rank holds only a part of the weights (ZeRO 3)."""
        return bool(self.zero.get("stage", 0) == 3)
