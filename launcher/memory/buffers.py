"""What a device holds in addition to model states and activations: logits, communication buffers, copies during the update, the runtime.

All sizes are in bytes. Those of DeepSpeed's buffers are in launcher.memory.deepspeed; source files named here are DeepSpeed 0.19.8's.
"""

from typing import Literal

from launcher.config.schema import Config
from launcher.memory.deepspeed import LIVE_PARAMETERS, PREFETCH, REDUCE_BUCKET, SUB_GROUP
from launcher.memory.states import (
    DTYPE_BYTES,
    States,
    device_count,
    engine_stage,
    linear_shapes,
    lora_parameters,
    packs,
    ranks_per_node,
    streams,
    takes_bf16_optimizer,
    vocabulary,
    weight_bytes,
    world_size,
    zero_stage,
)
from launcher.memory.tokens import Load

Moment = Literal["loss", "last layer", "first layer", "reduction", "update"]
MOMENTS: tuple[Moment, ...] = ("loss", "last layer", "first layer", "reduction", "update")

FLOAT32, FLOAT64 = DTYPE_BYTES["float32"], 8

# Float32 copies of the logits that exist at the same time, at most (trainer/kernels/cross_entropy.py). In chunks: the logits of a chunk and
# their softmax. All at once: the saved log-softmax, its gradient, and the gradient of the logits.
CHUNKED, WHOLE = 2, 3
# From DeepSpeed's own estimators (estimate_zero3_model_states_mem_needs, additional_buffer_factor): pinned host buffers for the states,
# and the rounding of pinned blocks to powers of two.
HOST_FACTOR = 1.5

# GiB of the collectives' channel buffers, with more than one rank. HCCL: twice HCCL_BUFFSIZE, 200 MB by default
# (CANN environment variables), once for each of two communicators. NCCL: 10 MB a channel and peer connection, as seen on 8 cards; an assumption.
COLLECTIVE_GIB = {"hccl": 0.8, "nccl": 0.4, "gloo": 0.0}


def logits_bytes(config: Config, load: Load) -> int:
    """At the peak of the loss, for the tokens whose logits exist at the same time. Every text token is assumed to be trained on."""
    words, chunk = vocabulary(config), config.strategy.loss_chunk
    tokens = max(1, load.tokens - load.image_tokens)  # image tokens have no labels
    if chunk and tokens > chunk:
        return CHUNKED * FLOAT32 * words * chunk
    return WHOLE * FLOAT32 * words * tokens


def gradient_moments(config: Config, states: States) -> dict[Moment, dict[str, int]]:
    """Moment of a step -> item -> bytes, of gradients and their buffers. The moments: the loss; the backward pass of the last layer and of the
    first layer; the end of the backward pass (reduction); the update of the weights.

    Gradients exist from the start of a step after an earlier micro-batch, in BF16_Optimizer (in float32), and in ZeRO 3 (zero/stage3.py,
    grad_partitions_flat_buffer). ZeRO 2 allocates its slice during the reduction. Otherwise gradients are allocated layer by layer, while
    activations are freed."""
    trained, zero = states.trainable, engine_stage(config)
    if not trained:
        return {moment: {} for moment in MOMENTS}
    whole, bucket = states.items_bytes["gradients"], bucket_bytes(config, trained)
    kept, first, last = whole, whole, whole
    if accumulation(config) == 1 and zero < 3:
        kept = lasting_gradient_bytes(config, states)
        moved = zero == 2 or config.strategy.offload_optimizer  # moved into the bucket layer by layer
        last = kept if moved else kept + head_gradient_bytes(config)
        first = kept if moved else max(kept, whole - late_gradient_bytes(config))
    always = bucket if zero == 3 else 0  # other stages allocate it with the first gradient, and free it at the end of the pass
    return {
        "loss": {"gradients": kept, "gradient buckets": always},
        "last layer": {"gradients": last, "gradient buckets": bucket},
        "first layer": {"gradients": first, "gradient buckets": bucket},
        "reduction": {"gradients": whole, "gradient buckets": bucket + reduction_bytes(config, trained)},
        "update": {"gradients": whole, "gradient buckets": always, "copies of the update": update_bytes(config, trained)},
    }


def lasting_gradient_bytes(config: Config, states: States) -> int:
    """Gradients that stay allocated between two steps: those of BF16_Optimizer and of ZeRO 3."""
    if takes_bf16_optimizer(config):
        return states.trainable * FLOAT32
    return states.items_bytes["gradients"] if engine_stage(config) == 3 else 0


def accumulation(config: Config) -> int:
    """Micro-batches per step of each rank, as launcher.plan.plan divides the global batch."""
    return max(1, config.stage.global_batch // (max(1, config.strategy.micro_batch or 1) * max(1, world_size(config))))


def head_gradient_bytes(config: Config) -> int:
    """The first gradient of a backward pass: of the head, or of the embeddings that are tied to it."""
    text = config.model.architecture.text
    trains = "head" in config.stage.trainable or (text.tie_word_embeddings and "lm" in config.stage.trainable)
    return embedding_elements(config) * DTYPE_BYTES[config.precision.weights] if trains else 0


def late_gradient_bytes(config: Config) -> int:
    """Gradients that do not exist yet during the backward pass of the decoder's first layer: its own, and those of the embeddings."""
    text = config.model.architecture.text
    if "lm" not in config.stage.trainable:
        return 0
    layer = sum(a * b for a, b in linear_shapes(text).values())
    early = embedding_elements(config) if text.tie_word_embeddings else 0
    return (layer + embedding_elements(config) - early) * DTYPE_BYTES[config.precision.weights]


def embedding_elements(config: Config) -> int:
    return vocabulary(config) * config.model.architecture.text.hidden_size


def bucket_bytes(config: Config, trained: int) -> int:
    """The bucket in which gradients are reduced over ranks, allocated on a single rank too. Stage 1 has it in the dtype of accumulation
    (zero/stage_1_and_2.py, _gradient_reduction_buffer_dtype), stages 2 and 3 in the dtype of the weights."""
    zero = engine_stage(config)
    if takes_bf16_optimizer(config) or zero == 0:
        return 0
    dtype = config.precision.gradients if zero == 1 else config.precision.weights
    return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[dtype]


def reduction_bytes(config: Config, trained: int) -> int:
    """Copies at the end of the backward pass. Without ZeRO, one bucket of gradients is flattened to be sent (runtime/engine.py,
    allreduce_bucket). BF16_Optimizer copies all of its gradients, which are one tensor, and once more in bfloat16. ZeRO 2 and 3 flatten the
    bucket; ZeRO 2 also casts one gradient at a time to float32 where it accumulates in float32 (_add_to_grad_partition_buffer)."""
    zero, precision = engine_stage(config), config.precision
    ranks = max(1, world_size(config))
    if takes_bf16_optimizer(config):
        return trained * (FLOAT32 + DTYPE_BYTES["bfloat16"]) if ranks > 1 else 0
    if zero == 0:
        return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[precision.gradients] if ranks > 1 else 0
    if zero == 1:
        return 0  # a gradient is freed when it is copied into the bucket
    widened = largest_trained(config, trained) * FLOAT32 // ranks if zero == 2 and accumulates_flat(config) else 0
    return min(trained, REDUCE_BUCKET) * DTYPE_BYTES[precision.weights] + widened


def accumulates_flat(config: Config) -> bool:
    """Whether ZeRO 1 or 2 accumulates gradients in the flat float32 tensor of the update (_use_compact_grad_partition_buffer)."""
    return config.precision.gradients == "float32" != config.precision.weights


def largest_trained(config: Config, trained: int) -> int:
    """Elements of the largest trained tensor: the embeddings, else one of an adapter, else at most the whole projector."""
    lora = config.stage.lora
    if {"lm", "head"} & set(config.stage.trainable):
        return min(trained, embedding_elements(config))
    if lora is not None and not config.stage.trainable:
        return min(trained, lora.r * max(max(shape) for shape in linear_shapes(config.model.architecture.text).values()))
    return trained


def gather_bytes(config: Config) -> int:
    """Weights that ZeRO 3 gathers at a time: up to max_live_parameters and the prefetched ones, or the largest tensor."""
    if zero_stage(config) < 3:
        return 0
    width, total = DTYPE_BYTES[config.precision.weights], config.model.parameters.total + lora_parameters(config)
    return max(min(total, LIVE_PARAMETERS + PREFETCH), largest_tensor(config)) * width


def largest_tensor(config: Config) -> int:
    """Elements of the largest weight tensor: the embeddings, or one of the MLP."""
    text = config.model.architecture.text
    return max(vocabulary(config) * text.hidden_size, *(a * b for a, b in linear_shapes(text).values()))


def update_bytes(config: Config, trained: int) -> int:
    """Copies during the update, the larger of two: the float64 copy of a gradient for the norm (zero/utils.py, get_norm_dtype); or ZeRO's slice of
    the gradients, flat and in the dtype of the masters (stage 3: one sub-group of it), unless they are accumulated in that tensor already.
    On an NPU, torch's AdamW uses its foreach implementation, which needs another tensor of the slice's size."""
    zero, precision = engine_stage(config), config.precision
    if config.strategy.offload_optimizer:
        return 0
    slice_elements = -(-trained // (max(1, world_size(config)) if zero else 1))
    copied = min(slice_elements, SUB_GROUP) if zero == 3 else slice_elements
    width = DTYPE_BYTES[precision.optimizer]
    no_copy = zero == 0 or takes_bf16_optimizer(config)
    flat = 0 if no_copy or (zero < 3 and accumulates_flat(config)) else copied * width
    norm = 0 if no_copy else FLOAT64 * min(slice_elements, largest_trained(config, trained))
    return max(norm, flat + (copied * width if config.hardware.accelerator == "npu" else 0))


def runtime_bytes(config: Config, gib: int) -> int:
    """What the driver, the workspaces of libraries and the channels of the collectives take before the first tensor."""
    many = COLLECTIVE_GIB[config.hardware.collectives] if world_size(config) > 1 else 0.0
    return int((config.hardware.context_gib + many) * gib)


def loading_bytes(config: Config) -> tuple[int, int]:
    """(device, host per node) while the model is loaded. Each rank creates or reads the whole model in host memory (trainer.train.model),
    and DeepSpeed moves it to the device (runtime/engine.py, _configure_distributed_model). Under ZeRO 3 the model is created on the meta
    device and each tensor is sharded when it is read, so a rank holds its shard and the largest tensor, on the device and on the host. A
    stage that works file by file loads no model. A model that is spread over the devices of a node is loaded once."""
    if streams(config):
        return 0, 0
    width = DTYPE_BYTES[config.precision.weights]
    if packs(config):
        return largest_tensor(config) * width, largest_tensor(config) * width
    saved = config.stage.recorded is not None and config.stage.recorded.quantized == "nf4"
    whole = weight_bytes(config, config.model.parameters.total) if saved else config.model.parameters.total * width
    if zero_stage(config) < 3:
        return whole, whole * ranks_per_node(config)
    tensor = largest_tensor(config) * width
    share = 0 if config.strategy.offload_parameters else -(-whole // max(1, world_size(config)))  # each shard goes to the host
    return share + tensor, tensor * device_count(config)
