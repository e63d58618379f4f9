"""What a device holds besides model states and kept activations: logits, buffers of communication, copies of an update, the runtime itself.

The sizes of DeepSpeed's buffers are the defaults of deepspeed/runtime/zero/config.py in 0.19.8, which launcher.deepspeed leaves as they are.
"""

from launcher.fit import DTYPE_BYTES, device_count, linear_shapes, trainable_parameters, world_size, zero_stage
from launcher.image_token import Load
from launcher.schema import Config

FLOAT32 = DTYPE_BYTES["float32"]
REDUCE_BUCKET = 5 * 10**8  # elements: reduce_bucket_size and allgather_bucket_size
SUB_GROUP = 10**9  # elements that ZeRO 3 updates at a time: sub_group_size
LIVE_PARAMETERS = 10**9  # elements that ZeRO 3 holds whole at a time, at most: max_live_parameters
PREFETCH = 5 * 10**7  # elements: prefetch_bucket_size

# Float32 copies of the logits that exist together at the worst moment, counted in trainer/loss.py. In chunks: a chunk's logits and their
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


def bucket_bytes(config: Config) -> int:
    """Gradients that are put together to be summed over ranks, in their own type. ZeRO 3 makes its bucket at the start whatever the model's
    size (zero/stage3.py), stages 1 and 2 one that holds a bucket's worth; BF16_Optimizer, which stage 1 with bfloat16 is, none."""
    zero, width = rendered_stage(config), DTYPE_BYTES[config.precision.weights]
    trained = trainable_parameters(config)
    if config.stage.kind == "evaluate" or not trained:
        return 0
    if zero == 3:
        return REDUCE_BUCKET * width
    if world_size(config) <= 1 and not config.strategy.offload_optimizer:
        return 0
    return min(trained, REDUCE_BUCKET) * (DTYPE_BYTES[config.precision.gradients] if zero == 0 else width)


def gather_bytes(config: Config) -> int:
    """Weights that ZeRO 3 holds whole at a time: up to max_live_parameters and what is fetched ahead, or its largest tensor."""
    if zero_stage(config) < 3:
        return 0
    width, total = DTYPE_BYTES[config.precision.weights], config.model.parameters.total
    return max(min(total, LIVE_PARAMETERS + PREFETCH), largest_tensor(config)) * width


def largest_tensor(config: Config) -> int:
    """Elements of the largest weight: the embeddings', or one of the MLP's."""
    text = config.model.architecture.text
    return max(text.vocab_size * text.hidden_size, *(a * b for a, b in linear_shapes(text).values()))


def update_bytes(config: Config) -> int:
    """Copies that exist during an update alone: float32 gradients of a slice (ZeRO 2: the rank's whole slice; 3: a sub-group of it), and
    where torch's AdamW works tensor list by tensor list, on an NPU, one more of the same size."""
    zero, trained = rendered_stage(config), trainable_parameters(config)
    if config.stage.kind == "evaluate" or not trained or config.strategy.offload_optimizer:
        return 0
    slice_elements = -(-trained // (max(1, world_size(config)) if zero else 1))
    copied = min(slice_elements, SUB_GROUP) if zero == 3 else slice_elements
    width = DTYPE_BYTES[config.precision.optimizer]
    gradients = copied * width if zero >= 2 or (zero == 1 and config.precision.name != "bf16") else 0
    return gradients + (copied * width if config.hardware.accelerator == "npu" else 0)


def rendered_stage(config: Config) -> int:
    """What launcher.deepspeed renders: 16-bit weights have their masters in a ZeRO optimizer, on one device too."""
    return max(zero_stage(config), 0 if config.precision.weights == "float32" else 1)


def cache_bytes(config: Config, load: Load) -> int:
    """Keys and values of a batch that is being answered, and a layer's working set for its questions."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    interval = max(1, int(text.options.get("full_attention_interval", 1)))
    layers = -(-text.num_hidden_layers // interval)
    length = load.length + config.run.evaluation.max_new_tokens
    keys = 2 * linear_shapes(text)["k_proj"][1] * width * layers * length * load.rows
    working = (4 * text.hidden_size + 3 * text.intermediate_size) * width * load.tokens
    return keys + working + text.vocab_size * (width + FLOAT32) * load.rows


def runtime_bytes(config: Config, gib: int) -> int:
    """What the driver, the libraries' workspaces and the channels of the collectives take before the first tensor."""
    many = COLLECTIVE_GIB[config.hardware.collectives] if world_size(config) > 1 else 0.0
    return int((config.hardware.context_gib + many) * gib)


def loading_bytes(config: Config) -> tuple[int, int]:
    """(device, host a node) before anything is divided: each rank makes or reads the whole model in its own memory (trainer.build), and
    DeepSpeed moves it to the device whole (runtime/engine.py, _configure_distributed_model) before ZeRO 3 cuts it up."""
    whole = config.model.parameters.total * DTYPE_BYTES[config.precision.weights]
    return whole, whole * device_count(config)
