"""What a device holds besides model states and kept activations: logits, buffers of communication, copies of an update, the runtime itself.

The sizes of DeepSpeed's buffers are the defaults of deepspeed/runtime/zero/config.py in 0.19.8, but for what launcher.memory.deepspeed renders.
"""

from typing import Literal

from launcher.config.schema import Config
from launcher.memory.deepspeed import LIVE_PARAMETERS, PREFETCH, REDUCE_BUCKET, SUB_GROUP
from launcher.memory.states import (
    DTYPE_BYTES,
    States,
    device_count,
    engine_stage,
    layer_counts,
    linear_shapes,
    lora_parameters,
    ranks_per_node,
    streams,
    takes_bf16_optimizer,
    world_size,
    zero_stage,
)
from launcher.memory.tokens import Load

Moment = Literal["loss", "last layer", "first layer", "reduction", "update"]
MOMENTS: tuple[Moment, ...] = ("loss", "last layer", "first layer", "reduction", "update")

FLOAT32, FLOAT64 = DTYPE_BYTES["float32"], 8

# Float32 copies of the logits that exist together at the worst moment, counted in trainer/kernels/cross_entropy.py. In chunks: a chunk's logits and their
# softmax. All at once: log-softmax, which is kept, its gradient and that of the logits.
CHUNKED, WHOLE = 2, 3
# Of DeepSpeed's own estimators (estimate_zero3_model_states_mem_needs, additional_buffer_factor): host buffers that are pinned beside
# the states, and the rounding of pinned blocks to powers of two.
HOST_FACTOR = 1.5

# GiB that the buffers of the collectives' channels take where there is more than one rank. HCCL: twice HCCL_BUFFSIZE, 200 MB by default
# (CANN environment variables), once for each of two communicators. NCCL: 10 MB a channel and peer connection, as seen on 8 cards; an assumption.
COLLECTIVE_GIB = {"hccl": 0.8, "nccl": 0.4, "gloo": 0.0}


def logits_bytes(config: Config, load: Load) -> int:
    """At the worst moment of the loss, for the trained tokens that have logits together. Every token is taken for a trained one."""
    vocabulary, chunk = config.model.architecture.text.vocab_size, config.strategy.loss_chunk
    tokens = max(1, load.tokens - load.image_tokens)  # an image is never trained on
    if chunk and tokens > chunk:
        return CHUNKED * FLOAT32 * vocabulary * chunk
    return WHOLE * FLOAT32 * vocabulary * tokens


def gradient_moments(config: Config, states: States) -> dict[Moment, dict[str, int]]:
    """Item -> bytes of gradients and of what they go through, at the moments of a step: when the loss is made; when the last layer is
    computed backward, and the first one; at the end of the backward pass; and while the weights are updated.

    Gradients stand from the start on where an earlier micro-batch has left them, in BF16_Optimizer (those in float32), and in ZeRO 3
    (zero/stage3.py, grad_partitions_flat_buffer). ZeRO 2 makes its slice when it reduces; others come layer by layer while activations go."""
    trained, zero = states.trainable, engine_stage(config)
    if not trained:
        return {moment: {} for moment in MOMENTS}
    whole, bucket = states.items_bytes["gradients"], bucket_bytes(config, trained)
    standing, first, last = whole, whole, whole
    if accumulation(config) == 1 and zero < 3:
        standing = lasting_gradient_bytes(config, states)
        moved = zero == 2 or config.strategy.offload_optimizer  # into the bucket, layer by layer
        last = standing if moved else standing + head_gradient_bytes(config)
        first = standing if moved else max(standing, whole - late_gradient_bytes(config))
    always = bucket if zero == 3 else 0  # the others make theirs with the first gradient, and drop it at the end of the pass
    return {
        "loss": {"gradients": standing, "gradient buckets": always},
        "last layer": {"gradients": last, "gradient buckets": bucket},
        "first layer": {"gradients": first, "gradient buckets": bucket},
        "reduction": {"gradients": whole, "gradient buckets": bucket + reduction_bytes(config, trained)},
        "update": {"gradients": whole, "gradient buckets": always, "copies of the update": update_bytes(config, trained)},
    }


def lasting_gradient_bytes(config: Config, states: States) -> int:
    """Of gradients, between two steps: BF16_Optimizer's and ZeRO 3's places stay, all others go."""
    if takes_bf16_optimizer(config):
        return states.trainable * FLOAT32
    return states.items_bytes["gradients"] if engine_stage(config) == 3 else 0


def accumulation(config: Config) -> int:
    """Micro-batches of a step on each device, as launcher.plan.plan divides them."""
    return max(1, config.stage.global_batch // (max(1, config.strategy.micro_batch or 1) * max(1, world_size(config))))


def head_gradient_bytes(config: Config) -> int:
    """The first gradient that is made, of the head or of the embeddings that stand for it."""
    text = config.model.architecture.text
    trains = "head" in config.stage.trainable or (text.tie_word_embeddings and "lm" in config.stage.trainable)
    return embedding_elements(config) * DTYPE_BYTES[config.precision.weights] if trains else 0


def late_gradient_bytes(config: Config) -> int:
    """Gradients that are not yet there while the decoder's first layer is computed backward: its own, and the embeddings'."""
    text = config.model.architecture.text
    if "lm" not in config.stage.trainable:
        return 0
    layer = sum(a * b for a, b in linear_shapes(text).values())
    early = embedding_elements(config) if text.tie_word_embeddings else 0
    return (layer + embedding_elements(config) - early) * DTYPE_BYTES[config.precision.weights]


def embedding_elements(config: Config) -> int:
    return config.model.architecture.text.vocab_size * config.model.architecture.text.hidden_size


def bucket_bytes(config: Config, trained: int) -> int:
    """Gradients that are put together to be summed over ranks: as many elements as launcher.memory.deepspeed says, on one rank too. Stage 1 has
    them in the type that they are added up in (zero/stage_1_and_2.py, _gradient_reduction_buffer_dtype), 2 and 3 in that of the weights."""
    zero = engine_stage(config)
    if takes_bf16_optimizer(config) or zero == 0:
        return 0
    dtype = config.precision.gradients if zero == 1 else config.precision.weights
    return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[dtype]


def reduction_bytes(config: Config, trained: int) -> int:
    """Copies at the end of the backward pass. Without ZeRO gradients are flattened to be sent (runtime/engine.py, allreduce_bucket), as many as
    a bucket takes; BF16_Optimizer's, which lie in one piece, all at once, and once more in bfloat16. ZeRO 2 and 3 flatten the bucket, and 2
    makes one gradient after the other float32 where it adds them up so (_add_to_grad_partition_buffer)."""
    zero, precision = engine_stage(config), config.precision
    ranks = max(1, world_size(config))
    if takes_bf16_optimizer(config):
        return trained * (FLOAT32 + DTYPE_BYTES["bfloat16"]) if ranks > 1 else 0
    if zero == 0:
        return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[precision.gradients] if ranks > 1 else 0
    if zero == 1:
        return 0  # as gradients go into the bucket they leave their own place
    widened = largest_trained(config, trained) * FLOAT32 // ranks if zero == 2 and adds_flat(config) else 0
    return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[precision.weights] + widened


def adds_flat(config: Config) -> bool:
    """Whether ZeRO 1 or 2 adds gradients up in the flat float32 tensor that it updates from (_use_compact_grad_partition_buffer)."""
    return config.precision.gradients == "float32" != config.precision.weights


def largest_trained(config: Config, trained: int) -> int:
    """Elements of the largest tensor that trains: the embeddings', else one of an adapter's, else at most all of the projector."""
    lora = config.stage.lora
    if {"lm", "head"} & set(config.stage.trainable):
        return min(trained, embedding_elements(config))
    if lora is not None and not config.stage.trainable:
        return min(trained, lora.r * max(max(shape) for shape in linear_shapes(config.model.architecture.text).values()))
    return trained


def gather_bytes(config: Config) -> int:
    """Weights that ZeRO 3 holds whole at a time: up to max_live_parameters and what is fetched ahead, or its largest tensor."""
    if zero_stage(config) < 3:
        return 0
    width, total = DTYPE_BYTES[config.precision.weights], config.model.parameters.total + lora_parameters(config)
    return max(min(total, LIVE_PARAMETERS + PREFETCH), largest_tensor(config)) * width


def largest_tensor(config: Config) -> int:
    """Elements of the largest weight: the embeddings', or one of the MLP's."""
    text = config.model.architecture.text
    return max(text.vocab_size * text.hidden_size, *(a * b for a, b in linear_shapes(text).values()))


def update_bytes(config: Config, trained: int) -> int:
    """Copies that exist during an update alone: the norm's float64 copy of a gradient (zero/utils.py, get_norm_dtype); then ZeRO's slice of the
    gradients once more, flat and in the masters' type (3: a sub-group of it), but where they are added up so already; and where torch's
    AdamW works tensor list by tensor list, on an NPU, one tensor more of the slice's size."""
    zero, precision = engine_stage(config), config.precision
    if config.strategy.offload_optimizer:
        return 0
    slice_elements = -(-trained // (max(1, world_size(config)) if zero else 1))
    copied = min(slice_elements, SUB_GROUP) if zero == 3 else slice_elements
    width = DTYPE_BYTES[precision.optimizer]
    none = zero == 0 or takes_bf16_optimizer(config)
    flat = 0 if none or (zero < 3 and adds_flat(config)) else copied * width
    norm = 0 if none else FLOAT64 * min(slice_elements, largest_trained(config, trained))
    return max(norm, flat + (copied * width if config.hardware.accelerator == "npu" else 0))


def answer_load(config: Config) -> tuple[int, int]:
    """Questions that are answered at a time, and the most tokens of an answer."""
    inference, serving, evaluation = config.stage.inference, config.stage.serving, config.run.evaluation
    if config.stage.kind == "infer" and inference:
        return inference.batch * inference.sampling.beams, inference.sampling.max_new_tokens
    if config.stage.kind == "serve" and serving:
        return serving.max_batch, serving.sampling.max_new_tokens
    return evaluation.batch, evaluation.max_new_tokens


def cache_bytes(config: Config, load: Load) -> int:
    """Keys and values of a batch that is being answered, and a layer's working set for its questions."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    layers = layer_counts(text)["k_proj"]
    length = load.length + answer_load(config)[1]
    keys = 2 * linear_shapes(text)["k_proj"][1] * width * layers * length * load.rows
    working = (4 * text.hidden_size + 3 * text.intermediate_size) * width * load.tokens
    return keys + working + text.vocab_size * (width + FLOAT32) * load.rows


def runtime_bytes(config: Config, gib: int) -> int:
    """What the driver, the libraries' workspaces and the channels of the collectives take before the first tensor."""
    many = COLLECTIVE_GIB[config.hardware.collectives] if world_size(config) > 1 else 0.0
    return int((config.hardware.context_gib + many) * gib)


def loading_bytes(config: Config) -> tuple[int, int]:
    """(device, host a node) while the model is loaded. Each rank makes or reads the whole model in its own memory (trainer.checkpoint.build), and
    DeepSpeed moves it to the device whole (runtime/engine.py, _configure_distributed_model); but under ZeRO 3, where the model is built
    without memory and each tensor divided as it is read, a rank holds its share and the largest tensor whole, here and there. A stage that
    works file by file loads no model, and a model that is spread over the cards of a node is loaded once."""
    if streams(config):
        return 0, 0
    width = DTYPE_BYTES[config.precision.weights]
    whole = config.model.parameters.total * width
    if zero_stage(config) < 3:
        return whole, whole * ranks_per_node(config)
    tensor = largest_tensor(config) * width
    share = 0 if config.strategy.offload_parameters else -(-whole // max(1, world_size(config)))  # which goes to the host as it is cut
    return share + tensor, tensor * device_count(config)
