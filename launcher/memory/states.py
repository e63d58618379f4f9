"""What the model states of a run take on each device: weights, gradients, masters and Adam's moments. Arithmetic only.

launcher.memory.activations and launcher.memory.buffers count what comes and goes beside them, launcher.memory.estimate adds all of it up.
"""

import math
import re
from dataclasses import dataclass

from launcher.config.schema import Config, Model, Text
from launcher.memory.deepspeed import ZERO_STAGE, rendered_stage
from trainer.contract import SINGLE_PROCESS_KINDS

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

STATE_BLOCK = 256  # trainer.optim.blockwise.BLOCK: elements of a moment in 8 bits that share a float32 scale
MOST_LAYERS = 1000  # whose names are written out: a slip of the hand may say a million

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
REGEX = "re:"  # begins a LoRA target that is a regex over whole module names
# A 4-bit weight with its share of the scales, in blocks of 64 and those in blocks of 256 (Dettmers et al., arXiv 2305.14314, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True, kw_only=True)
class States:
    """`parameters` and `trainable` count elements of the whole model, LoRA included. `items_bytes` (weights, gradients, optimizer) is
    what stays on one device, `total_bytes` its sum; `host_bytes` is what offloading puts into the memory of one node."""

    parameters: int
    trainable: int
    items_bytes: dict[str, int]
    total_bytes: int
    host_bytes: int


def device_count(config: Config) -> int:
    """Devices used on each node."""
    return config.cluster.devices_per_node or config.hardware.devices_per_node


def ranks_per_node(config: Config) -> int:
    """One a device, but for a stage of one process and for a model that is spread over them."""
    return 1 if config.stage.kind in SINGLE_PROCESS_KINDS or spreads(config) else device_count(config)


def spreads(config: Config) -> bool:
    """Whether one rank holds a model over all devices of its node."""
    asked = config.stage.inference or config.stage.serving
    return asked is not None and asked.spread == "auto"


def streams(config: Config) -> bool:
    """Whether the stage rewrites weights file by file, and never holds the model."""
    quantization = config.stage.quantization
    return config.stage.kind in ("merge", "convert") or (quantization is not None and not quantization.compare)


def world_size(config: Config) -> int:
    """Ranks of the run: those of every node that is not a spare."""
    return ranks_per_node(config) * sum(not node.spare for node in config.cluster.nodes)


def model_states(config: Config) -> States:
    """Bytes on the fullest device. With P parameters, T of them trained, N ranks and element sizes w, g, o of weights, gradients and
    optimizer: w P + g T + (2 m + master) T, each term over N where ZeRO shards it; a moment's m is o, or in 8 bits 1 and its share of
    a scale (the small parameters that stay in float32 are not counted); the master is o where o is not w, or where ZeRO keeps
    its own copy of the slice, else 0 (arXiv 1910.02054, section 3.1: 2 P + 2 P + 12 P for mixed precision Adam); g is of both kinds of
    gradients where takes_bf16_optimizer.

    ZeRO-Offload (arXiv 2101.06840, section 3) moves gradients and optimizer to the host; parameter offload moves weights too.
    `auto` counts as unsharded: resolve it with `launcher.check.strategy.resolve` first.
    """
    strategy, precision, zero = config.strategy, config.precision, engine_stage(config)
    ranks = max(1, world_size(config))
    adapter, trainable = lora_parameters(config), trainable_parameters(config)
    parameters = config.model.parameters.total + adapter
    state_bytes = DTYPE_BYTES[precision.optimizer]
    master_bytes = state_bytes if zero or precision.optimizer != precision.weights else 0
    cards = device_count(config) if spreads(config) else 1
    items = {
        "weights": 0 if streams(config) else _share(weight_bytes(config, parameters), ranks if zero >= 3 else cards),
        "gradients": _share(trainable * gradient_width(config), ranks if zero >= 2 else 1),
        "optimizer": _share(2 * moment_bytes(config, trainable) + trainable * master_bytes, ranks if zero >= 1 else 1),
    }
    trains = config.stage.kind == "train"
    optimizer_moves = trains and strategy.offload_optimizer
    moved = {"weights": trains and strategy.offload_parameters, "gradients": optimizer_moves, "optimizer": optimizer_moves}
    on_device = {name: 0 if moved[name] else size for name, size in items.items()}
    return States(
        parameters=parameters,
        trainable=trainable,
        items_bytes=on_device,
        total_bytes=sum(on_device.values()),
        host_bytes=(sum(items.values()) - sum(on_device.values())) * device_count(config),
    )


def zero_stage(config: Config) -> int:
    """0 in an evaluation, where every rank holds the whole model (trainer.programs.evaluate)."""
    return ZERO_STAGE[config.strategy.name] if config.stage.kind == "train" else 0


def engine_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed is started with (launcher.memory.deepspeed.rendered_stage); 0 without training."""
    return rendered_stage(config.strategy, config.precision) if config.stage.kind == "train" else 0


def takes_bf16_optimizer(config: Config) -> bool:
    """Stage 1 with bfloat16 weights and float32 gradients is DeepSpeed's BF16_Optimizer (runtime/engine.py, _do_optimizer_sanity_check in
    0.19.8): every rank holds all gradients in float32 from the start on, and beside them those in bfloat16 that it adds them up from, which
    it sets to zero and keeps (bf16_optimizer.py, clear_lp_grads)."""
    types = (config.precision.weights, config.precision.gradients) == ("bfloat16", "float32")
    return types and engine_stage(config) == 1 and not config.strategy.offload_optimizer


def gradient_width(config: Config) -> int:
    """Bytes of a trained element's gradient, or gradients."""
    both = DTYPE_BYTES[config.precision.weights] if takes_bf16_optimizer(config) else 0
    return DTYPE_BYTES[config.precision.gradients] + both


def moment_bytes(config: Config, elements: int) -> int:
    """Of one of Adam's two moments."""
    if config.stage.optimizer.state_bits == 8:
        return elements + 4 * math.ceil(elements / STATE_BLOCK)
    return elements * DTYPE_BYTES[config.precision.optimizer]


def weight_bytes(config: Config, parameters: int) -> int:
    """Of all weights, those that a LoRA run keeps in 4 bits counted so: the decoder's linear layers."""
    width = DTYPE_BYTES[config.precision.weights]
    if config.stage.lora is None or not config.stage.lora.base:
        return parameters * width
    text = config.model.architecture.text
    shapes = linear_shapes(text)
    layers = layer_counts(text)
    packed = sum(math.prod(shapes[name]) * layers[name] for name in shapes)
    return (parameters - packed) * width + math.ceil(packed * NF4_BITS / 8)


def trainable_parameters(config: Config) -> int:
    """Elements that get gradients: the stage's groups, and LoRA. None where nothing is trained."""
    if config.stage.kind != "train":
        return 0
    whole: int = sum(getattr(config.model.parameters, group) for group in config.stage.trainable)
    return whole + lora_parameters(config)


def lora_parameters(config: Config) -> int:
    """r (in + out) for every target in every layer of the decoder (Hu et al., arXiv 2106.09685, section 4.1)."""
    lora, text = config.stage.lora, config.model.architecture.text
    if lora is None or config.stage.kind != "train":
        return 0
    shapes = linear_shapes(text)
    layers = layer_counts(text)
    named = sum(lora.r * sum(shapes[name]) * layers[name] for name in lora.targets if name in shapes)
    regexes = tuple(target.removeprefix(REGEX) for target in lora.targets if target.startswith(REGEX))
    others = (name for name in linear_names(config.model) if name.rpartition(".")[2] not in lora.targets) if regexes else ()
    return named + sum(lora.r * sum(shapes[name.rpartition(".")[2]]) for name in others if matches(name, regexes))


def matches(name: str, regexes: tuple[str, ...]) -> bool:
    try:
        return any(re.fullmatch(regex, name) for regex in regexes)
    except (re.error, RecursionError, OverflowError):  # which `check` refuses
        return False


def attention_layers(text: Text) -> frozenset[int]:
    """Numbers of the decoder's layers that have attention under the names q_proj to o_proj: all, but in a hybrid one those alone that
    `layer_types` calls so, or the last of each `full_attention_interval`. Of MOST_LAYERS at most."""
    depth = int(min(text.num_hidden_layers, MOST_LAYERS))
    types = text.options.get("layer_types")
    if types:
        return frozenset(layer for layer, kind in enumerate(types[:depth]) if kind == "full_attention")
    interval: int = max(1, text.options.get("full_attention_interval", 1))
    return frozenset(layer for layer in range(depth) if (layer + 1) % interval == 0)


def layer_counts(text: Text) -> dict[str, int]:
    """Name of a linear layer -> how many layers of the decoder have one."""
    attention = len(attention_layers(text)) if is_hybrid(text) else text.num_hidden_layers
    return {name: attention if name in ATTENTION_LINEARS else text.num_hidden_layers for name in linear_shapes(text)}


def is_hybrid(text: Text) -> bool:
    """Whether some layers have linear attention."""
    return bool(text.options.get("layer_types")) or text.options.get("full_attention_interval", 1) > 1


def linear_names(model: Model) -> tuple[str, ...]:
    """The decoder's linear layers, by their names in memory, of MOST_LAYERS at most."""
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
    """(in, out) of every linear layer of a Llama-shaped decoder block, by the name that LoRA targets."""
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
