"""What a run writes: metrics rows, reports and results. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """metrics.jsonl: one optimizer step over the global batch. `loss`: the mean over trained tokens. `peak_bytes`: the highest of any rank
    (device memory on an accelerator, resident memory on the CPU). `skipped`: the loss scaler skipped the step."""

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
    """`row` counts from 1; 0 = the whole file."""

    file: str
    row: int
    field: str
    problem: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.file} row {self.row}" if self.row else self.file
        return f"{where}, key {self.field!r}: {self.problem}\n    {self.fix}" if self.field else f"{where}: {self.problem}\n    {self.fix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOutRow:
    """One line of data_left_out.jsonl: a row that is not used, or not as it is written. `use`: of the training rows or of the held-out ones.
    `done`: left out; cut; trimmed, joined or marked, as data.turns and data.unmarked say. `key`: as `DataProblem.field`."""

    use: Literal["train", "evaluation"]
    file: str
    row: int
    key: str
    reason: str
    done: Literal["left out", "cut", "trimmed", "joined", "marked"]


@dataclass(frozen=True, kw_only=True)
class CommonAnswer:
    """`text`: its beginning, on one line."""

    text: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """How images are joined to the text of a question: on which side of it, and what is written between images and text, and `between` two
    images. `questions`: of the `counted` training questions with images, those that have this form; both 0 where none were counted."""

    place: Literal["before", "after"] = "before"
    separator: str = "\n"
    between: str = ""
    questions: int = 0
    counted: int = 0


LINE_FEED = ImageForm()  # where no rows were counted: as in most data


@dataclass(frozen=True, kw_only=True)
class LearningFacts:
    """Of training rows: `answers` in the loss, how many of them are `distinct`, the most `common` ones, their lengths in characters, rows that
    are exact copies of an earlier one, and rows that speak of left or right. `shared_rows`, `shared_images`: held-out rows that are training
    rows too, and images that are in both. `image_forms`: where images stand in a question -> number of questions, the most frequent first."""

    answers: int = 0
    distinct: int = 0
    common: tuple[CommonAnswer, ...] = ()
    characters_p50: int = 0
    characters_p95: int = 0
    characters_max: int = 0
    repeated_rows: int = 0
    shared_rows: int = 0
    shared_images: int = 0
    sided_rows: int = 0
    image_forms: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Training and held-out rows together. `smallest`, `largest`: (width, height) of an image in pixels, by area. `conversions`: kind ->
    number of images that are rotated upright or converted to RGB. Lengths are tokens of a whole sample, image tokens included; all 0 where
    `unmeasured` says why they were not counted. `trained_tokens`: those in the loss, about. `adjustments`: what was read otherwise than it
    is written -> number of rows. `ignored_keys`: keys of rows, messages and blocks that are not read -> number of rows.
    `warnings`: what texts hold that may not be meant as text -> number of rows. `estimated_lengths`: rows of a large set whose tokens were
    estimated from their characters."""

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
    trained_tokens: int = 0
    estimated_lengths: int = 0
    adjustments: dict[str, int] = field(default_factory=dict)
    ignored_keys: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowUse:
    """`step`: the first one that trains on the row. With `earliest`, it may be up to 15 steps later."""

    file: str
    row: int
    step: int
    earliest: bool = False


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """`sha256`: over the annotation files and every image they name, in order. `problem_count`: all problems; `problems`: the first ones. `uses`:
    the first step that trains on a row with a problem. `left_out`: use and what was done -> number of rows ("train left out": 3), for those that
    data_left_out.jsonl lists; they are in `sha256` too."""

    schema: int
    sha256: str
    train_rows: int
    evaluation_rows: int
    images: int
    problems: tuple[DataProblem, ...] = ()
    problem_count: int = 0
    summary: DataSummary = DataSummary()
    learning: LearningFacts = LearningFacts()
    uses: tuple[RowUse, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """inputs.json: the SHA-256 of every file that a run reads. `data`: by path below the folder of images or of built-in data, else by full
    path. `weights`: keyed by role (model, checkpoint, base), a slash and the name in that folder; none for a model of a hub, which its
    revision identifies."""

    schema: int
    data: dict[str, str]
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightsLineage:
    """What a stage starts from. `path`: the folder, '' for a random start. `run_id`, `step`, `stage`, `weights_sha256`: of the checkpoint in
    it, empty if none of our runs saved it. `trained`: groups trained so far; all groups of a published model. `base`: the folder of an
    adapter's base model. `mark`: fingerprint of the base's weights, or of those that a new adapter starts from. `images`: how the questions
    that they were trained on show images."""

    path: str = ""
    run_id: str = ""
    step: int = 0
    stage: str = ""
    weights_sha256: str = ""
    trained: tuple[str, ...] = ()
    base: str = ""
    mark: str = ""
    revision: str = ""  # of a hub's repository: the commit that was loaded
    images: ImageForm = LINE_FEED


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank's process reports. `processors`: CPUs that it may run on."""

    hostname: str
    device: str
    driver: str
    firmware: str
    threads: int
    interop_threads: int
    processors: int


@dataclass(frozen=True, kw_only=True)
class EnvReport:
    """Facts read from the running process, never copied from a config. `deepspeed`: the config given and the config in effect. `kernels`:
    fused kernel -> number of layers and package, or "plain" -> why there are none; empty if none was looked for. `toolkit`: versions of the
    compute and communication libraries. `settings`: clocks and power caps per device. `determinism`: switch -> current value. `chat_template`:
    which one conversations are written with, as lines. Values that cannot be read are left out."""

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
    chat_template: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One line of evaluations.jsonl: the evaluation of the weights after `step` steps. `loss`: mean over the answers' tokens, None if it was
    not requested."""

    step: int
    exact_match: float
    count: int
    seconds: float
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """best.json: the complete checkpoint with the best evaluation so far. `path` is relative to the run's folder."""

    step: int
    path: str
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """The most memory that any rank held in a phase of the run: on an accelerator, bytes of tensors and bytes reserved by the allocator; on
    the CPU, resident memory and 0. Only of the attempt that ended the run."""

    phase: Literal["load", "first step", "steps", "evaluation", "saving"]
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """`evaluation`: metric -> value, with `count`. `checkpoint` is relative to the run's folder. `best`: None without spec.keep_best.
    `ended`: why a finished run has not done all steps of its spec."""

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
    ended: str = ""
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
    """The peak of one part of a traced step: bytes on one rank's device, and their sum by kind (`items_bytes`)."""

    phase: Literal["forward", "backward", "update"]
    peak_bytes: int
    items_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TraceReport:
    """One step of the real model on tensors without memory. `host_bytes`: what offloading keeps in a node's memory. The traced micro-batch:
    `samples` rows of `length` tokens; `image_tokens` of them stand for `images` images of `image_size`, (width, height) in pixels;
    `trained_tokens` have a loss. `cpu_seconds` and `resident_bytes`: cost of the trace itself. `notes`: assumptions."""

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
    """Where a server listens. `token`: the variable that holds the token, '' for none. `example`: a command that sends a request. `images`: one
    sentence about how they are put into a question."""

    schema: int
    url: str
    model: str
    token: str
    example: str
    images: str = ""
