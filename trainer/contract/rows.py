"""What a run answers: rows, reports, results. Part of the contract, which has them all by name; standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One optimizer step over the global batch. `loss` is the mean over trained tokens; `peak_bytes` the highest of any rank
    (device memory on an accelerator, resident memory on the CPU). `skipped`: the loss scaler dropped the step."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    seconds: float
    peak_bytes: int
    loss_scale: float = 1.0
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class DataProblem:
    """`row` counts from 1 as a reader of the file does; 0 = the file as a whole."""

    file: str
    row: int
    field: str
    problem: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.file} row {self.row}" if self.row else self.file
        return f"{where}, key {self.field!r}: {self.problem}\n    {self.fix}" if self.field else f"{where}: {self.problem}\n    {self.fix}"


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Rows, training and held-out ones together, and what they hold. `smallest`, `largest`: an image's (width, height) in pixels, by area.
    `conversions`: how many images are turned upright or brought to RGB, by what they are. Lengths are in tokens of a whole sample, those of
    its images included; all 0 where `unmeasured` says why nobody counted them."""

    rows: int = 0
    rows_with_images: int = 0
    smallest: tuple[int, ...] = ()
    largest: tuple[int, ...] = ()
    conversions: dict[str, int] = field(default_factory=dict)
    length_p50: int = 0
    length_p95: int = 0
    length_max: int = 0
    tokens: int = 0
    image_tokens: int = 0
    unmeasured: str = ""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """`sha256`: over the annotation files and every image they name, in order. `problem_count`: of all, where `problems` has the first."""

    schema: int
    sha256: str
    train_rows: int
    evaluation_rows: int
    images: int
    problems: tuple[DataProblem, ...] = ()
    problem_count: int = 0
    summary: DataSummary = DataSummary()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """inputs.json: the SHA-256 of every file that a run reads. `data`: by path below the folder of images or of built-in data, else by the
    whole one. `weights`: by what they are (model, checkpoint, base), a slash and the name in that folder; none of a model of a hub, whose
    revision says it."""

    schema: int
    data: dict[str, str]
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightsLineage:
    """What a stage began with. `path`: the folder, '' for a random start; `run_id`, `step`, `stage` and `weights_sha256` are those of the
    checkpoint in it, empty where none of our runs has saved it. `trained`: the groups that runs have trained up to there, all of a published
    model. `base`: the folder of the model that an adapter stands on; `mark`: of the weights there, or of those a new adapter stands on."""

    path: str = ""
    run_id: str = ""
    step: int = 0
    stage: str = ""
    weights_sha256: str = ""
    trained: tuple[str, ...] = ()
    base: str = ""
    mark: str = ""
    revision: str = ""  # of a hub's repository: the commit that was loaded


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank's process says. `processors`: CPUs that it may run on."""

    hostname: str
    device: str
    driver: str
    firmware: str
    threads: int
    interop_threads: int
    processors: int


@dataclass(frozen=True, kw_only=True)
class EnvReport:
    """Facts asked of the running process, never copied from a config. `deepspeed`: the config that the engine really took. `kernels`: fused
    kernel -> in how many layers and whose, or "plain" -> why there are none; empty where none was looked for. `toolkit`: versions of what
    computes and communicates; `settings`: clocks and power caps by device; `determinism`: switch -> what it says when asked. What cannot be
    asked there is left out."""

    schema: int
    hostname: str
    platform: str
    python: str
    packages: dict[str, str]
    accelerator: str
    devices: tuple[str, ...]
    driver: str
    world_size: int
    threads: int
    environment: dict[str, str]
    parameters: dict[str, int]
    trainable: dict[str, int]
    deepspeed: dict[str, Any]
    origin: WeightsLineage = WeightsLineage()
    kernels: dict[str, str] = field(default_factory=dict)
    toolkit: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    determinism: dict[str, str] = field(default_factory=dict)
    ranks: tuple[RankFacts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One line of evaluations.jsonl: how well the weights after `step` steps answer. `loss`: mean over the answers' tokens, None where it
    was not asked for."""

    step: int
    exact_match: float
    count: int
    seconds: float
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """best.json: the whole checkpoint that evaluated best so far. `path` is relative to the run's folder."""

    step: int
    path: str
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """The most memory that any rank held in a phase of the run: on an accelerator what tensors took and what the allocator had reserved
    for them, on the CPU resident memory and 0. Of the attempt that ended the run."""

    phase: Literal["load", "first step", "steps", "evaluation", "saving"]
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """`evaluation`: metric -> value, with `count`. `checkpoint` is relative to the run's folder. `best`: None without spec.keep_best."""

    schema: int
    status: Literal["finished", "stopped"]
    steps: int
    seconds: float
    samples_per_s: float
    final_loss: float | None
    checkpoint: str
    weights_sha256: str
    evaluation: dict[str, float]
    best: Best | None = None
    peaks: tuple[PhasePeak, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Why a rank ended. `unix_s` orders the reports of several ranks; the first one is the cause."""

    schema: int
    rank: int
    hostname: str
    unix_s: float
    code: int
    kind: str
    message: str
    traceback: str


@dataclass(frozen=True, kw_only=True)
class TracePhase:
    """The highest moment of a part of a traced step: bytes on one rank's device, and what they are (`items_bytes`; their sum)."""

    phase: Literal["forward", "backward", "update"]
    peak_bytes: int
    items_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TraceReport:
    """One step of the real model on tensors without memory. `host_bytes`: what offloading puts into the memory of a node. `samples` rows of
    `length` tokens, `image_tokens` of which stand for `images` images of `image_size`, (width, height) in pixels, and `trained_tokens` of
    which have a loss. `cpu_seconds` and `resident_bytes` are what the trace itself took. `notes`: what was assumed."""

    schema: int
    torch: str
    peak_bytes: int
    peak_phase: str
    phases: tuple[TracePhase, ...]
    host_bytes: int
    parameters: int
    trainable: int
    samples: int
    length: int
    images: int
    image_size: tuple[int, ...]
    image_tokens: int
    trained_tokens: int
    cpu_seconds: float
    resident_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ServingReport:
    """Where a server listens. `token`: the variable that has the token, '' for none; `example`: a command that asks it something."""

    schema: int
    url: str
    model: str
    token: str
    example: str
