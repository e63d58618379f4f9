"""Model states on each device: weights, gradients, master weights and Adam's moments. Arithmetic only, in bytes.

launcher.memory.activations and launcher.memory.buffers compute what is temporary within a step; launcher.memory.estimate adds it all up.
"""

import math
import re
from dataclasses import dataclass

from launcher.config.schema import Config, Model, Text
from launcher.memory.deepspeed import ZERO_STAGE, rendered_stage
from trainer.contract import SINGLE_PROCESS_KINDS

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

AVERAGE = "weight average"  # name of its item
STATE_BLOCK = 256  # trainer.optim.blockwise.BLOCK: elements of an 8-bit moment that share a float32 scale
VOCABULARY_MULTIPLE = 64  # trainer.models.added_token.MULTIPLE
MOST_LAYERS = 1000  # whose names are listed: a typing error may ask for a million

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
REGEX = "re:"  # prefix of a LoRA target that is a regular expression over whole module names
# Bits of an NF4 weight: 4, an 8-bit scale for 64 weights, and a float32 scale for 256 of those scales (Dettmers et al., arXiv 2305.14314, section 3).
NF4_BLOCK = 64  # weights that share a scale
NF4_BITS = 4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * 256)


@dataclass(frozen=True, kw_only=True)
class States:
    """`parameters` and `trainable`: elements of the whole model, including LoRA. `items_bytes`: weights, gradients and optimizer on one
    device; `total_bytes`: their sum; `host_bytes`: what offloading puts into the host memory of one node."""

    parameters: int
    trainable: int
    items_bytes: dict[str, int]
    total_bytes: int
    host_bytes: int


def device_count(config: Config) -> int:
    """Devices used on each node."""
    return config.cluster.devices_per_node or config.hardware.devices_per_node


def ranks_per_node(config: Config) -> int:
    """One rank per device; a single one for a stage of one process, and for a model that is spread over the devices."""
    return 1 if config.stage.kind in SINGLE_PROCESS_KINDS or spreads(config) else device_count(config)


def spreads(config: Config) -> bool:
    """Whether one rank spreads the model over all devices of its node."""
    options = config.stage.inference or config.stage.serving
    return options is not None and options.spread == "auto"


def streams(config: Config) -> bool:
    """Whether the stage rewrites weights file by file, without loading the model."""
    quantization = config.stage.quantization
    return config.stage.kind in ("merge", "convert") or (
        quantization is not None and quantization.scheme == "int8" and not quantization.compare
    )


def packs(config: Config) -> bool:
    """Whether the stage writes NF4: bitsandbytes quantizes each tensor on the device when it is loaded, and nothing is answered."""
    return config.stage.quantization is not None and config.stage.quantization.scheme == "nf4"


def world_size(config: Config) -> int:
    """Ranks of the run, on all nodes that are not spares."""
    return ranks_per_node(config) * sum(not node.spare for node in config.cluster.nodes)


def model_states(config: Config) -> States:
    """Bytes on the device that holds most, as a rank with P parameters, T of them trained, among N ranks:

        w P + g T + (2 m + master) T        (Rajbhandari et al., arXiv 1910.02054, section 3.1: 2 P + 2 P + 12 P for mixed precision Adam)

    w, g, o: bytes per element of weights, gradients and optimizer. ZeRO 1 divides the optimizer's term by N, ZeRO 2 also the gradients,
    ZeRO 3 also the weights. m is o, or for 8-bit moments 1 byte and a share of the scale (the small parameters that stay in float32 are
    ignored). master is o where o differs from w or where ZeRO keeps its own copy of the slice, else 0. A moving average of the weights
    (trainer.distributed.average) takes 4 T more, divided like the optimizer. Where takes_bf16_optimizer, g
    counts the gradients of both dtypes.

    ZeRO-Offload (arXiv 2101.06840, section 3) moves gradients and optimizer to the host; parameter offload also moves the weights.
    `auto` counts as unsharded: resolve it with `launcher.check.strategy.resolve` first.
    """
    strategy, precision, zero = config.strategy, config.precision, engine_stage(config)
    ranks = max(1, world_size(config))
    adapter, trainable = lora_parameters(config), trainable_parameters(config)
    parameters = config.model.parameters.total + added_parameters(config) + adapter
    state_bytes = DTYPE_BYTES[precision.optimizer]
    master_bytes = state_bytes if zero or precision.optimizer != precision.weights else 0
    devices = device_count(config) if spreads(config) else 1
    items = {
        "weights": 0 if streams(config) else _share(weight_bytes(config, parameters), ranks if zero >= 3 else devices),
        "gradients": _share(trainable * gradient_width(config), ranks if zero >= 2 else 1),
        "optimizer": _share(2 * moment_bytes(config, trainable) + trainable * master_bytes, ranks if zero >= 1 else 1),
    }
    trains = config.stage.kind == "train"
    if trains and config.stage.optimizer.ema_decay:
        items[AVERAGE] = _share(4 * trainable, ranks if zero >= 1 else 1)
    optimizer_moves = trains and strategy.offload_optimizer
    moved = dict.fromkeys(("gradients", "optimizer", AVERAGE), optimizer_moves) | {"weights": trains and strategy.offload_parameters}
    on_device = {name: 0 if moved[name] else size for name, size in items.items()}
    return States(
        parameters=parameters,
        trainable=trainable,
        items_bytes=on_device,
        total_bytes=sum(on_device.values()),
        host_bytes=(sum(items.values()) - sum(on_device.values())) * device_count(config),
    )


def zero_stage(config: Config) -> int:
    """0 without training: in an evaluation every rank holds the whole model (trainer.programs.evaluate)."""
    return ZERO_STAGE[config.strategy.name] if config.stage.kind == "train" else 0


def engine_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed is started with (launcher.memory.deepspeed.rendered_stage); 0 without training."""
    return rendered_stage(config.strategy, config.precision) if config.stage.kind == "train" else 0


def takes_bf16_optimizer(config: Config) -> bool:
    """Stage 1 with bfloat16 weights and float32 gradients uses DeepSpeed's BF16_Optimizer (runtime/engine.py, _do_optimizer_sanity_check in
    0.19.8). Every rank holds all gradients in float32 from the start, and also the bfloat16 gradients that it accumulates into them, which
    it zeroes and keeps (bf16_optimizer.py, clear_lp_grads)."""
    dtypes = (config.precision.weights, config.precision.gradients) == ("bfloat16", "float32")
    return dtypes and engine_stage(config) == 1 and not config.strategy.offload_optimizer


def gradient_width(config: Config) -> int:
    """Bytes per trained element, for all of its gradients."""
    both = DTYPE_BYTES[config.precision.weights] if takes_bf16_optimizer(config) else 0
    return DTYPE_BYTES[config.precision.gradients] + both


def moment_bytes(config: Config, elements: int) -> int:
    """Bytes of one of Adam's two moments."""
    if config.stage.optimizer.state_bits == 8:
        return elements + 4 * math.ceil(elements / STATE_BLOCK)
    return elements * DTYPE_BYTES[config.precision.optimizer]


def weight_bytes(config: Config, parameters: int) -> int:
    """Bytes of all weights. Those of packed_parameters have NF4_BITS each. Weights in int8 are converted to the dtype of the others when they
    are read (trainer.models.architecture, loading_options), and take as much as these."""
    packed = min(parameters, packed_parameters(config))
    return (parameters - packed) * DTYPE_BYTES[config.precision.weights] + math.ceil(packed * NF4_BITS / 8)


def packed_groups(config: Config) -> tuple[str, ...]:
    """Groups whose linear layers are in NF4: of the base of a LoRA run, of a quantized checkpoint, or of the one that this stage quantizes."""
    lora, recorded, quantization = config.stage.lora, config.stage.recorded, config.stage.quantization
    if lora is not None and lora.base:
        return lora.base_groups
    if recorded is not None and recorded.quantized == "nf4":
        kept = recorded.kept
    elif quantization is not None and packs(config):
        kept = quantization.keep
    else:
        return ()
    return tuple(group for group in ("lm", "vision", "head") if group not in kept)


def packed_parameters(config: Config) -> int:
    """Elements of the linear layers of packed_groups."""
    text = config.model.architecture.text
    shapes, layers = linear_shapes(text), layer_counts(text)
    sizes = {
        "lm": sum(math.prod(shapes[name]) * layers[name] for name in shapes),
        "vision": tower_linears(config.model),
        "head": config.model.parameters.head,
    }
    return sum(sizes[group] for group in packed_groups(config))


def unpacked_bytes(config: Config) -> int:
    """A whole layer in the dtype of the weights, and its NF4 scales in float32: bitsandbytes multiplies with no weight in 4 bits, except for one
    token alone (0.49.2, autograd/_functions.py, MatMul4Bit, in both passes)."""
    vision = config.model.architecture.vision
    largest = {
        "lm": max(map(math.prod, linear_shapes(config.model.architecture.text).values())),
        "vision": vision.hidden_size * vision.intermediate_size,
        "head": config.model.parameters.head,
    }
    elements = max((largest[group] for group in packed_groups(config)), default=0)
    return elements * DTYPE_BYTES[config.precision.weights] + elements * DTYPE_BYTES["float32"] // NF4_BLOCK


def tower_linears(model: Model) -> int:
    """Elements of the linear layers of the vision tower: attention, and an MLP of two layers or, in Qwen2.5-VL's, of three."""
    vision = model.architecture.vision
    mlp = 3 if model.family.startswith("qwen2_5") else 2
    layer = 4 * vision.hidden_size**2 + mlp * vision.hidden_size * vision.intermediate_size
    return min(model.parameters.vision, vision.num_hidden_layers * layer)


def trainable_parameters(config: Config) -> int:
    """Elements that get gradients: those of the stage's groups and of LoRA; 0 without training."""
    if config.stage.kind != "train":
        return 0
    whole: int = sum(getattr(config.model.parameters, group) for group in config.stage.trainable)
    return whole + (added_parameters(config) if "lm" in config.stage.trainable else 0) + lora_parameters(config)


def vocabulary(config: Config) -> int:
    """Rows of the embeddings, at most: a checkpoint may have unused ones for the tokens of model.add_tokens, which only its tokenizer tells
    (trainer.models.added_token)."""
    rows, added = config.model.architecture.text.vocab_size, len(config.model.add_tokens)
    return -(-(rows + added) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if added else rows


def row_parameters(config: Config, rows: int) -> int:
    """Elements of so many rows of the embeddings, and of the head if it is not tied."""
    text = config.model.architecture.text
    return rows * text.hidden_size * (1 if text.tie_word_embeddings else 2)


def added_parameters(config: Config) -> int:
    """Elements that model.add_tokens adds to the model."""
    return row_parameters(config, vocabulary(config) - config.model.architecture.text.vocab_size)


def lora_parameters(config: Config) -> int:
    """Elements of LoRA: r (in + out) for every target in every layer of the decoder (Hu et al., arXiv 2106.09685, section 4.1), and the rows of
    new tokens."""
    lora, text = config.stage.lora, config.model.architecture.text
    if lora is None or config.stage.kind != "train":
        return 0
    shapes = linear_shapes(text)
    layers = layer_counts(text)
    named = sum(lora.r * sum(shapes[name]) * layers[name] for name in lora.targets if name in shapes)
    regexes = tuple(target.removeprefix(REGEX) for target in lora.targets if target.startswith(REGEX))
    others = (name for name in linear_names(config.model) if name.rpartition(".")[2] not in lora.targets) if regexes else ()
    rows = row_parameters(config, len(config.model.add_tokens))
    return rows + named + sum(lora.r * sum(shapes[name.rpartition(".")[2]]) for name in others if matches(name, regexes))


def matches(name: str, regexes: tuple[str, ...]) -> bool:
    try:
        return any(re.fullmatch(regex, name) for regex in regexes)
    except (re.error, RecursionError, OverflowError):  # `check` refuses it
        return False


def attention_layers(text: Text) -> frozenset[int]:
    """Indices of the decoder's layers with softmax attention (q_proj to o_proj), below MOST_LAYERS. In a hybrid decoder these are the layers
    that `layer_types` marks as full_attention, or the last of each `full_attention_interval`; otherwise all."""
    depth = int(min(text.num_hidden_layers, MOST_LAYERS))
    types = text.options.get("layer_types")
    if types:
        return frozenset(layer for layer, kind in enumerate(types[:depth]) if kind == "full_attention")
    interval: int = max(1, text.options.get("full_attention_interval", 1))
    return frozenset(layer for layer in range(depth) if (layer + 1) % interval == 0)


def layer_counts(text: Text) -> dict[str, int]:
    """Name of a linear layer -> number of decoder layers that have it."""
    attention = len(attention_layers(text)) if is_hybrid(text) else text.num_hidden_layers
    return {name: attention if name in ATTENTION_LINEARS else text.num_hidden_layers for name in linear_shapes(text)}


def is_hybrid(text: Text) -> bool:
    """Whether some layers have linear attention."""
    return bool(text.options.get("layer_types")) or text.options.get("full_attention_interval", 1) > 1


def linear_names(model: Model) -> tuple[str, ...]:
    """Module names of the decoder's linear layers, below MOST_LAYERS."""
    text = model.architecture.text
    decoder = "llm.model" if model.groups.get("lm", "").startswith(r"^llm\.") else "model.language_model"
    attention = attention_layers(text)
    return tuple(
        f"{decoder}.layers.{layer}.{'self_attn' if name in ATTENTION_LINEARS else 'mlp'}.{name}"
        for layer in range(int(min(text.num_hidden_layers, MOST_LAYERS)))
        for name in linear_shapes(text)
        if name not in ATTENTION_LINEARS or layer in attention
    )


def linear_shapes(text: Text) -> dict[str, tuple[int, int]]:
    """Name that LoRA targets -> (in, out) features, for every linear layer of a Llama-style decoder layer."""
    head_dim = text.head_dim or text.hidden_size // max(1, text.num_attention_heads)
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    return {
        "q_proj": (text.hidden_size, queries),
        "k_proj": (text.hidden_size, keys),
        "v_proj": (text.hidden_size, keys),
        "o_proj": (queries, text.hidden_size),
        "gate_proj": (text.hidden_size, text.intermediate_size),
        "up_proj": (text.hidden_size, text.intermediate_size),
        "down_proj": (text.intermediate_size, text.hidden_size),
    }


def _share(size_bytes: int, ranks: int) -> int:
    """The largest of `ranks` equal slices, rounded up to a whole byte."""
    return -(-size_bytes // ranks)
