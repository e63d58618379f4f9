"""What a run is told besides training: how it evaluates and profiles, and what the stages that come after training do. Standard library
only: the contract, and by it the launcher, names these."""

from dataclasses import dataclass
from typing import Literal

SHARD_BYTES = 5 * 10**9  # of a file of weights, as transformers cuts them
Metric = Literal["exact_match", "contains", "anls", "rouge_l", "token_accuracy", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy generation on the held-out rows. `limit` 0 = all of them; `enabled` after training; `every`: also after each so many steps,
    0 = never. `loss`: the mean loss over the answers' tokens besides, one more forward pass. `metrics`: of each answer and of all;
    `base`: a checkpoint that the stage evaluate answers with too, to compare."""

    enabled: bool = True
    batch: int = 64
    max_new_tokens: int = 16
    limit: int = 0
    every: int = 0
    loss: bool = False
    metrics: tuple[Metric, ...] = ("exact_match",)
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The profiler's window: steps `start` to `start` + `steps` - 1, of rank 0 or of all; `steps` 0 = never."""

    start: int = 10
    steps: int = 0
    ranks: Literal["first", "all"] = "first"


@dataclass(frozen=True, kw_only=True)
class Merging:
    """An adapter into its base, file by file. `probes`: inputs whose logits are compared, in float32, 0 = none; they may differ by
    `tolerance`, relative to the largest of them."""

    probes: int = 4
    tolerance: float = 1e-5
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Every tensor in `dtype`, file by file. `unfit`: what becomes of one that overflows or whose values vanish there: it keeps float32, or
    all is refused. `probes`: as in Merging, told and not judged."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    unfit: Literal["keep", "refuse"] = "keep"
    probes: int = 4
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Weights of linear layers in fewer bits; groups of `keep` stay as they are. `calibration`: samples of the training data by which the
    scales are chosen, 0 = by the weights alone. `compare`: evaluate before and after."""

    scheme: Literal["int8", "nf4"] = "int8"
    keep: tuple[Literal["vision", "projector", "lm", "head"], ...] = ("vision", "projector", "head")
    calibration: int = 0
    compare: bool = True
    probes: int = 4
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is chosen. `temperature` 0 = the likeliest token each time; `top_k` 0 and `top_p` 1 = of all tokens. `beams` > 1 need
    temperature 0."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One question, `prompt` and perhaps `image`, or those of `input`, a JSON-lines file of rows {"prompt", "image" or "images"} or
    {"messages", "images"}. `spread`: over how the cards of this node share one model: auto = by their free memory, one = each rank has all."""

    prompt: str = ""
    image: str = ""
    input: str = ""
    batch: int = 8
    sampling: Sampling = Sampling()
    stream: bool = True  # of one question: words as they come
    spread: Literal["one", "auto"] = "one"
    prefetch: int = 2  # batches that are made ready while one is answered
    cache_images: int = 64  # whose pixels are kept, for rows that show them again


@dataclass(frozen=True, kw_only=True)
class Serving:
    """`address`: beside 127.0.0.1 any needs `token`, the name of a secret of cluster.secrets. `hosts`: of which images may be fetched by
    URL; () = none. Bytes and pixels are of one image, `max_body_bytes` of a whole request."""

    address: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    model_name: str = ""  # as clients call it; '' = the model's own name
    max_batch: int = 16
    wait_ms: int = 5  # for others to join a batch, once one waits
    max_waiting: int = 256  # requests; more are turned away with 429
    max_images: int = 8
    max_body_bytes: int = 32 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 40 * 10**6
    hosts: tuple[str, ...] = ()
    fetch_timeout_s: float = 10.0
    request_timeout_s: float = 300.0
    drain_timeout_s: float = 60.0
    sampling: Sampling = Sampling()  # what a request leaves out; max_new_tokens is also the most that one may ask for
    spread: Literal["one", "auto"] = "one"
