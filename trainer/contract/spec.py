"""The vocabulary that the launcher and the trainer share: what a run is told, what it answers, and where both lie.

Standard library only. The launcher imports this module and nothing else of the trainer; the trainer never imports the
launcher. A change of meaning or shape of anything here raises `SCHEMA`; an image that carries another number is refused.
"""

import json
import os
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trainer.contract.environment_facts import Expectation
from trainer.contract.options import Conversion, Evaluation, Inference, Merging, Profile, Quantization, Serving

SCHEMA = 1

Dtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["train", "evaluate", "merge", "convert", "quantize", "infer", "serve"]
SINGLE_PROCESS_KINDS = ("merge", "convert", "quantize", "serve")  # kinds that one process carries out, started without torchrun

# Inside `runs/<run_id>/`. The launcher writes the first, the trainer the others.
SPEC_FILE = "spec.json"
DATA_FILE = "data.json"
DATA_PROBLEMS_FILE = "data_problems.jsonl"  # all of them, where data.json has the first ones
INPUTS_FILE = "inputs.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
ANSWERS_FILE = "answers.jsonl"  # of stage infer
STREAM_FILE = "answer.txt"  # of one question: the words as they come
SERVING_FILE = "serving.json"  # of stage serve, once the model answers
RESULT_FILE = "train_result.json"
FAILURE_FILES = "failure-rank{rank}.json"
CHECKPOINTS = "checkpoints"
EVALUATIONS_FILE = "evaluations.jsonl"  # a row for each evaluation, the last of them that of the last step
SAMPLES_FOLDER = "samples"  # and its answers: step-<n>.jsonl
BEST_FILE = "best.json"
TRACKER_FOLDER = "tracker"  # below it one folder for each of spec.trackers
PROFILE_FOLDER = "profile"

# In front of every line of a rank where there are several, and what a rank says of its start: what it does next, in this order.
RANK_PREFIX = "[rank {rank}] "
PHASE_LINE = "omnilaunch: starting: {phase}"
START_PHASES = ("loading its libraries", "meeting the other ranks", "reading the data", "loading the model", "preparing the engine")


class Exit(IntEnum):
    """Exit codes of `omnilaunch` and of `python -m trainer`."""

    OK = 0
    BUG = 1
    USAGE = 2  # refused config or input
    IMAGE = 3
    NODE = 4
    RUN = 5
    HUNG = 6  # a step without an end; every rank has written its stacks into its log
    DIFFERENT = 7  # `omnilaunch compare`: the runs are not the same


class InputRefused(Exception):
    """The run cannot start from this input. The text says what, where, what is allowed, and what to do (exit code 2)."""


class RunFailed(Exception):
    """The run started and cannot go on. The text says what is lost, what is kept, and what to do (exit code 5)."""


class SpecError(Exception):
    """A file does not have the shape of its dataclass; says which key."""


class OtherSchema(SpecError):
    """A file was written with another schema number than SCHEMA."""


# ----------------------------------------------------------------------------------------------------- what a run is told


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template as segments, so that labels come from the segments and never from a search in the token stream.

    `user` holds `{content}`. Trained on: the answer and `end_mark`. Everything else is masked.
    """

    system: str = ""
    user: str
    assistant_open: str
    end_mark: str
    separator: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights come from: `random` (architecture numbers only), `hub` (id and revision) or `path` (a local folder)."""

    kind: Literal["random", "hub", "path"]
    id: str = ""
    revision: str = ""
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Lora:
    r: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]  # linear layers inside the language model: their own names, or 're:REGEX' over whole module names
    rank_stabilised: bool = False
    base: Literal["", "nf4"] = ""  # nf4: the adapted layers are frozen in 4 bits (Dettmers et al., QLoRA, arXiv 2305.14314); CUDA only


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Element types. `optimizer` is the type of master weights and states; `compute` that of activations. `rounding`: how the optimizer's
    results come into `optimizer`, stochastic for bfloat16 alone."""

    name: str
    weights: Dtype
    compute: Dtype
    optimizer: Dtype
    gradients: Dtype
    loss_scaling: Literal["none", "dynamic"] = "none"
    rounding: Literal["nearest", "stochastic"] = "nearest"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW. `warmup` counts steps when >= 1 and is a share of all steps when < 1. Betas, eps and decay as in
    Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2. `group_lr`: peak rates of groups of
    the model that learn at another one than `lr`, on the same schedule. `state_bits`: of an element of either moment, 0 = as
    `Precision.optimizer` says, 8 = quantized block by block (Dettmers et al., arXiv 2110.02861)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.03
    clip_norm: float = 1.0
    group_lr: dict[str, float] = field(default_factory=dict)
    state_bits: Literal[0, 8] = 0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """`groups`: name (vision, projector, lm, head) -> regex over in-memory parameter names. `architecture`: random start only."""

    name: str
    family: str
    source: Source
    architecture: dict[str, Any]
    groups: dict[str, str]
    image_token: str
    template: Template
    attention: str


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """`trainable`: groups whose parameters get gradients. `checkpoint`: weights to start from, or ''. `reset`: groups that begin anew from
    the run's seed. `needs`: what the weights must have behind them, `projector` that some run has trained it. Of the options of kinds that
    do not train, that of `kind` is there."""

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


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Conversations with images. `builtin` names a set that the trainer writes itself into `root` before the first step.

    `max_length` is in tokens, image tokens included: of a sample, and of a row where `packing` puts several samples into one, which do
    not see each other. `length_aware`: samples of like length share a micro-batch, out of a step or out of a window of steps.
    `padding_free`: the samples of a micro-batch one after the other, as in a packed row, in place of padding.
    `max_pixels` (families that scale an image) and `max_tiles` (those that cut it) bound an image's tokens; 0 = as the processor says.
    """

    name: str
    builtin: str
    root: str
    train: str
    evaluation: str
    images: str
    max_length: int
    workers: int
    packing: bool = False
    length_aware: Literal["off", "step", "window"] = "off"
    max_pixels: int = 0
    max_tiles: int = 0
    padding_free: bool = False


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
    cards: int = 1  # that each rank takes; more than one where a model is spread over them


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything one run of the trainer is told. `output` is the run's folder as the trainer sees it. `hang_timeout_s`: a step that
    takes longer is told with the stacks of every rank, and ends the run soon after; 0 = never."""

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
    save_every_s: float = 0.0  # save at the first step that ends so long after the last checkpoint; 0 = by steps alone
    keep_best: Literal["", "exact_match", "loss"] = ""  # the checkpoint that evaluates best is kept besides the newest ones
    checkpoint_background: bool = False  # the steps go on while a copy in the host's memory is written
    trackers: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    loss_chunk: int = 0  # the most trained tokens of a micro-batch whose logits exist at a time; 0 = all of them
    checkpoint_every: int = 1  # with gradient_checkpointing: every which layer is computed twice
    checkpoint_groups: tuple[str, ...] = ()  # and of which groups of the model; () = of all that have layers
    trackers_named: bool = True  # by somebody: one whose package is missing is refused; False = the default, which is left out there
    kernels: Literal["auto", "plain", "fused"] = "plain"  # of layers: auto = fused ones where the accelerator and the packages have them
    expects: Expectation | None = None  # of a rerun

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's section about ZeRO, {} without."""
        section: dict[str, Any] = self.deepspeed.get("zero_optimization", {})
        return section

    @property
    def partitioned(self) -> bool:
        """Whether each rank holds a part of the weights alone (ZeRO 3)."""
        return bool(self.zero.get("stage", 0) == 3)


# ------------------------------------------------------------------------------------------------------ to and from the disk


def encode(value: Any) -> str:
    """A dataclass as JSON text, keys in the order of the class, one trailing newline."""
    return json.dumps(asdict(value), indent=2, ensure_ascii=False, allow_nan=True) + "\n"


def decode(cls: Any, data: Any, where: str = "") -> Any:
    """Build `cls` from plain JSON data. Raises SpecError that names the key for a missing, unknown or wrongly typed value."""
    if type(data) is cls:  # most of all there is: a text, a number
        return data
    if is_dataclass(cls) and isinstance(cls, type):
        if not isinstance(data, dict):
            raise SpecError(f"{where or cls.__name__}: expected an object, got {type(data).__name__}")
        hints = types_of(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise SpecError(f"{where or cls.__name__}: unknown keys {unknown}; valid are {sorted(hints)}")
        values = {key: decode(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in data.items()}
        missing = sorted(required_of(cls) - set(values))
        if missing:
            raise SpecError(f"{where or cls.__name__}: missing keys {missing}")
        return cls(**values)
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if cls is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        return decode(next(a for a in args if a is not type(None)), data, where)
    if origin is Literal:
        if data in args:
            return data
        raise SpecError(f"{where}: {data!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple and isinstance(data, (list, tuple)):
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(cls, type) and isinstance(data, cls) and not (cls is int and isinstance(data, bool)):
        return data
    raise SpecError(f"{where}: expected {getattr(cls, '__name__', cls)}, got {data!r}")


@cache
def required_of(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Field -> its type. Asked for once: of a thousand records it would be most of the time of reading them."""
    return typing.get_type_hints(cls)


def read(cls: Any, path: Path) -> Any:
    """Read a dataclass from a JSON file. Raises SpecError naming the file for a bad shape or another schema number."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of more than 4,300 digits
        raise SpecError(f"{path}: cannot be read: {error}") from error
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        raise OtherSchema(
            f"{path}: written with schema {data['schema']}, this version reads {SCHEMA}; rebuild the image with: omnilaunch image build"
        )
    try:
        return decode(cls, data)
    except (SpecError, OverflowError) as error:
        raise SpecError(f"{path}: {error}") from error


def write(value: Any, path: Path) -> None:
    """Write a dataclass to `path` whole or not at all: aside, synced, renamed."""
    write_text(encode(value), path)


def write_text(text: str, path: Path) -> None:
    """Write text whole or not at all: aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
