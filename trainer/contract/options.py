"""Options of evaluation and profiling, and of the stages that come after training. Standard library only."""

from dataclasses import dataclass
from typing import Literal

SHARD_BYTES = 5 * 10**9  # of a file of weights, the default of transformers
Metric = Literal["exact_match", "contains", "anls", "rouge_l", "token_accuracy", "perplexity", "iou_50", "point_in_box"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy generation on the held-out rows. `limit` 0 = all rows. `enabled`: after training; `every`: also every so many steps, 0 = never.
    `loss`: also the mean loss over the answers' tokens, at the cost of one more forward pass. `metrics`: of each answer and of all.
    `base`: a checkpoint whose answers the stage evaluate compares with."""

    enabled: bool = True
    batch: int = 64
    max_new_tokens: int = 16
    limit: int = 0
    every: int = 0
    loss: bool = False
    metrics: tuple[Metric, ...] = ("exact_match",)
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """End the run when `metric` has not improved by more than `min_delta` over the last `patience` evaluations; 0 = never."""

    patience: int = 0
    metric: Literal["exact_match", "loss"] = "exact_match"
    min_delta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of the images of training rows; 0 = none. `crop`: the least share of an image's area that is kept, and scaled to the
    whole size again; `flip`: probability of mirroring left and right; `colour`: brightness, contrast and saturation are multiplied by a
    factor from 1 - `colour` to 1 + `colour`; `jpeg`: the lowest quality of a JPEG that the image is written as and read again, up to 100."""

    crop: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    jpeg: int = 0

    @property
    def moves(self) -> bool:
        """Whether things in an image may change their place."""
        return bool(self.crop or self.flip)

    @property
    def any(self) -> bool:
        return bool(self.moves or self.colour or self.jpeg)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The profiler runs for steps `start` to `start` + `steps` - 1, on rank 0 or on all ranks; `steps` 0 = never."""

    start: int = 10
    steps: int = 0
    ranks: Literal["first", "all"] = "first"


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Merges an adapter into its base, file by file. `probes`: number of inputs whose logits are compared, in float32; 0 = none. The logits
    may differ by `tolerance`, relative to the largest of them."""

    probes: int = 4
    tolerance: float = 1e-5
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Converts every tensor to `dtype`, file by file. `unfit`: what to do with a tensor that overflows or underflows there: keep it in
    float32, or refuse the conversion. `probes`: as in Merging, but only reported."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    unfit: Literal["keep", "refuse"] = "keep"
    probes: int = 4
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Quantizes the weights of linear layers; groups in `keep` are not changed. `calibration`: number of training samples from which the
    scales are chosen; 0 = from the weights only. `compare`: evaluate before and after."""

    scheme: Literal["int8", "nf4"] = "int8"
    keep: tuple[Literal["vision", "projector", "lm", "head"], ...] = ("vision", "projector", "head")
    calibration: int = 0
    compare: bool = True
    probes: int = 4
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 = always the most likely token; `top_k` 0 and `top_p` 1 = from all tokens. `beams` > 1 needs
    temperature 0."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One question (`prompt` and optionally `image`), or those of `input`: a JSON-lines file of rows {"prompt", "image" or "images"} or
    {"messages", "images"}. `context`: tokens of a question with its answer, at most; 0 = data.max_length for the question, and any answer.
    `spread`: auto = one model over the node's cards by their free memory, one = each rank has the whole model."""

    prompt: str = ""
    image: str = ""
    input: str = ""
    batch: int = 8
    sampling: Sampling = Sampling()
    stream: bool = True  # one question: print the text as it is generated
    spread: Literal["one", "auto"] = "one"
    prefetch: int = 2  # batches that are prepared while one is answered
    cache_images: int = 64  # images whose pixels are kept for rows that show them again
    context: int = 0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """`address`: any other than 127.0.0.1 needs `token`, the name of a secret of cluster.secrets. `hosts`: from which images may be fetched
    by URL; () = none. Bytes and pixels are per image, `max_body_bytes` per request. `context`: as in Inference."""

    address: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    model_name: str = ""  # as clients call it; '' = the model's own name
    max_batch: int = 16
    wait_ms: int = 5  # for more requests to join a batch, once one waits
    max_waiting: int = 256  # requests; more are refused with 429
    max_images: int = 8
    context: int = 0
    max_body_bytes: int = 32 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 40 * 10**6
    hosts: tuple[str, ...] = ()
    fetch_timeout_s: float = 10.0
    request_timeout_s: float = 300.0
    drain_timeout_s: float = 60.0
    sampling: Sampling = Sampling()  # defaults of a request; max_new_tokens is also the upper limit
    spread: Literal["one", "auto"] = "one"
