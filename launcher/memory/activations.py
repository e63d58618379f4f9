"""Activations that the forward pass keeps for the backward pass: the tensors that autograd saves in each layer of transformers 5.23.

All sizes are in bytes. `width`: bytes per element of the compute dtype; h: hidden size; i: intermediate size of the MLP. Saved tensors
that share storage count once. tests/trainer/memory_model/test_saved.py compares the formulas with autograd itself. Korthikanti et al.
(arXiv 2205.05198, section 4) count a GPT-2 layer in the same way.
"""

from dataclasses import dataclass
from fractions import Fraction

from launcher.config.schema import Config, Vision
from launcher.memory.states import (
    DTYPE_BYTES,
    REGEX,
    attention_layers,
    is_hybrid,
    layer_counts,
    linear_names,
    linear_shapes,
    matches,
    zero_stage,
)
from launcher.memory.tokens import Load

FLOAT32 = DTYPE_BYTES["float32"]
INPUT_OF = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


@dataclass(frozen=True, kw_only=True)
class TowerActivations:
    """Elements that a trained layer of a vision tower keeps per patch, in addition to attention's own: `float32` and `wide` in units of h,
    `inner` in units of i. LayerNorm keeps its input and output; RMSNorm a float32 copy, the normalised and the scaled tensor."""

    float32: int
    wide: int
    inner: int


# In `wide`: norms, then q, k, v and the output of attention.
TOWERS = {
    "llava": TowerActivations(float32=0, wide=4 + 4, inner=3),  # quick_gelu keeps its input and its sigmoid, then the product
    "internvl": TowerActivations(float32=0, wide=4 + 4 + 2, inner=2),  # the two outputs that are scaled layer by layer (lambda_1, lambda_2)
    "qwen2_5_vl": TowerActivations(float32=2, wide=4 + 2 + 3 + 2, inner=4),  # v is a view of the fused qkv; windows are gathered in a copy
    "qwen2_5_omni": TowerActivations(float32=2, wide=4 + 2 + 1 + 2, inner=4),
}
USUAL_TOWER = TowerActivations(float32=0, wide=4 + 4, inner=2)  # LayerNorm, attention, GELU: SigLIP and EVA

CHUNK = 64  # tokens of torch's own kernel of gated linear attention (transformers, torch_chunk_gated_delta_rule)
CHUNK_SQUARES = 5  # of CHUNK x CHUNK, saved for each chunk and head: decays, two products, two systems


@dataclass(frozen=True, kw_only=True)
class Kept:
    """`lm` and `vision`: bytes kept from the forward pass to the backward pass. `layer`: what the layer in its backward pass needs in
    addition, with or without gradient checkpointing. `exact`: all kernels save the same tensors on every device."""

    lm: int
    vision: int
    layer: int
    exact: bool


def count_kept(config: Config, load: Load) -> Kept:
    """For one micro-batch on one device. A part of the model with no trained parameter in or before it keeps nothing.

    NEFTune (trainer/kernels/noise.py) adds nothing to a peak: the noise and the sum are two more tensors like the embeddings, in their dtype,
    which exist before the first layer and leave one behind. `ends` alone is more than these three, and is counted from the loss on."""
    architecture, width = config.model.architecture, DTYPE_BYTES[config.precision.compute]
    trained = set(config.stage.trainable)
    vision_layer = tower_layer_bytes(config, architecture.vision, width) * load.patches if "vision" in trained else 0
    before_lm = bool(trained & {"vision", "projector", "lm"})  # lm holds the embeddings
    lm_layer = decoder_layer_bytes(config, load) * load.tokens if before_lm or config.stage.lora else 0
    lora = lora_bytes(config, width) * load.tokens
    layers = architecture.text.num_hidden_layers
    average = lm_layer + lora // max(1, layers)
    lm, lm_again = stack_bytes(config, "lm", layers, average, width * architecture.text.hidden_size * load.tokens)
    if lm_layer:
        lm_again = max(lm_again, max(kinds_of_layer(config, load).values()) * load.tokens if lm_again else 0)
    if lora and not before_lm and not config.strategy.gradient_checkpointing:
        lm -= unkept_bytes(config, load) * load.tokens
    tower = architecture.vision.num_hidden_layers
    vision, vision_again = stack_bytes(config, "vision", tower, vision_layer, width * architecture.vision.hidden_size * load.patches)
    projector = projector_bytes(config, width) * load.image_tokens if trained & {"vision", "projector"} else 0
    ends = (FLOAT32 + 2 * width) * architecture.text.hidden_size * load.tokens  # embeddings and the last norm
    working = (3 * architecture.text.intermediate_size + 2 * architecture.text.hidden_size) * width * load.tokens  # gradients of one MLP
    return Kept(
        lm=lm + ends + projector, vision=vision, layer=max(lm_again, vision_again) + working, exact=not is_hybrid(architecture.text)
    )


def stack_bytes(config: Config, group: str, layers: int, layer: int, residual: int) -> tuple[int, int]:
    """(kept by all layers, recomputed for one layer). A checkpointed layer keeps only its input, until it is recomputed in the backward pass."""
    strategy = config.strategy
    if not layer:
        return 0, 0
    if not strategy.gradient_checkpointing or (strategy.checkpoint_groups and group not in strategy.checkpoint_groups):
        return layers * layer, 0
    checkpointed = -(-layers // max(1, strategy.checkpoint_every))
    return (layers - checkpointed) * layer + checkpointed * residual, layer


def decoder_layer_bytes(config: Config, load: Load) -> int:
    """Per token, of an average decoder layer, without adapters."""
    text = config.model.architecture.text
    full = Fraction(layer_counts(text)["q_proj"], max(1, text.num_hidden_layers)) if is_hybrid(text) else Fraction(1)
    sizes = kinds_of_layer(config, load)
    return int(full * sizes[True] + (1 - full) * sizes[False])


def kinds_of_layer(config: Config, load: Load) -> dict[bool, int]:
    """Per token, of a layer with softmax attention (True) and of one with linear attention (False)."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    mlp = (4 if keeps_inputs(config) else 3) * width * text.intermediate_size  # gate, its SiLU, up, and their product
    same = 2 * norm_bytes(config) + mlp
    linear = linear_attention_bytes(config) if is_hybrid(text) else 0
    return {True: same + attention_bytes(config, load), False: same + linear}


def trains_whole(config: Config) -> bool:
    return "lm" in config.stage.trainable and config.stage.lora is None


def keeps_inputs(config: Config) -> bool:
    """Whether linear layers save their inputs: where they train, and under ZeRO 3 also where they are frozen, because DeepSpeed replaces
    torch's linear by its own (deepspeed 0.19.8, zero/linear.py)."""
    return trains_whole(config) or zero_stage(config) == 3


def norm_bytes(config: Config) -> int:
    """Per token, of one RMSNorm: a float32 copy; the normalised tensor where its weight trains; the scaled tensor where linears save inputs."""
    width = DTYPE_BYTES[config.precision.compute]
    return (FLOAT32 + width * (trains_whole(config) + keeps_inputs(config))) * config.model.architecture.text.hidden_size


def unkept_bytes(config: Config, load: Load) -> int:
    """Per token, what the first layer does not keep where nothing is trained before its first adapter: its inputs need no gradient."""
    text = config.model.architecture.text
    linear = is_hybrid(text) and 0 not in attention_layers(text)
    return norm_bytes(config) + (linear_attention_bytes(config) if linear else 0)


def attention_bytes(config: Config, load: Load) -> int:
    """Per token: q, k, v and the output, and a float32 log-sum-exp for each head. Without a fused kernel, also the square of probabilities, in
    float32 and in the compute dtype. With a mask (padded rows) and in the eager kernel, key heads are repeated (use_gqa_in_sdpa)."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    shapes, heads = linear_shapes(text), text.num_attention_heads
    queries, keys = shapes["q_proj"][1], shapes["k_proj"][1]
    eager = config.hardware.capability.attention[:1] == ("eager",)
    keys = queries if eager or load.masked else keys
    kept = width * (2 * queries + 2 * keys)
    if eager:
        kept -= 0 if keeps_inputs(config) else width * queries  # only a fused kernel needs its own output
        kept += heads * load.length * (FLOAT32 + (width if width != FLOAT32 else 0))
    else:
        kept += FLOAT32 * heads
    if text.options.get("model_type") == "qwen3":  # RMSNorm of every head
        kept += (FLOAT32 + (width if trains_whole(config) else 0)) * (queries + shapes["k_proj"][1])
    return kept


def linear_attention_bytes(config: Config) -> int:
    """Per token, of a layer of gated linear attention (Qwen3.5) with torch's own kernel, used where flash-linear-attention is not installed: in
    float32, over chunks of 64 tokens, with query and key heads repeated to the number of value heads. The factors are the numbers of
    tensors of each shape that autograd saves in transformers 5.23's Qwen3_5GatedDeltaNet."""
    options, width = config.model.architecture.text.options, DTYPE_BYTES[config.precision.compute]
    heads, query_heads = options.get("linear_num_value_heads", 0), options.get("linear_num_key_heads", 0)
    key_dim, value_dim = options.get("linear_key_head_dim", 0), options.get("linear_value_head_dim", 0)
    per_head = CHUNK_SQUARES * CHUNK + 10 + Fraction(key_dim * value_dim, CHUNK)  # squares, decays and norms, the state after each chunk
    keys = (12 if width == FLOAT32 else 8) * heads * key_dim  # as counted; four fewer where inputs are cast to float32
    convolved = 2 * (2 * query_heads * key_dim + heads * value_dim)  # before and after its activation
    gated = (2 + keeps_inputs(config)) * heads * value_dim  # the normalised tensor, the gate, and the input of the last linear
    return int(FLOAT32 * (heads * per_head + keys + 6 * heads * value_dim) + width * (convolved + gated))


def lora_bytes(config: Config, width: int) -> int:
    """Per token, of all adapters of the decoder: the input after dropout, the dropout mask (one byte per element; on the CPU, one element), and
    the r elements between the two factors. Without dropout, linears with the same input share it."""
    lora, text = config.stage.lora, config.model.architecture.text
    if lora is None or config.stage.kind != "train":
        return 0
    mask = (width if config.hardware.accelerator == "cpu" else 1) if lora.dropout else 0
    shapes, layers = linear_shapes(text), target_layers(config)
    kept, shared = 0, {}
    for name, count in layers.items():
        kept += count * (lora.r * width + mask * shapes[name][0])
        if lora.dropout:
            kept += count * width * shapes[name][0]
        elif name != "o_proj" and not keeps_inputs(config):  # whose input attention keeps anyway
            shared[INPUT_OF.get(name, name)] = count * width * shapes[name][0]
    return kept + sum(shared.values())


def target_layers(config: Config) -> dict[str, int]:
    """Name of a linear with an adapter -> number of layers that have it."""
    lora, text = config.stage.lora, config.model.architecture.text
    if lora is None:
        return {}
    layers = layer_counts(text)
    regexes = tuple(target.removeprefix(REGEX) for target in lora.targets if target.startswith(REGEX))
    found = {name: count for name, count in layers.items() if name in lora.targets}
    for name in linear_names(config.model) if regexes else ():
        own = name.rpartition(".")[2]
        if own not in lora.targets and matches(name, regexes):
            found[own] = found.get(own, 0) + 1
    return found


def tower_layer_bytes(config: Config, vision: Vision, width: int) -> int:
    """Per patch, of a trained layer of the tower. Each head has 4 bytes, for the log-sum-exp of attention."""
    tower = TOWERS.get(config.model.family, USUAL_TOWER)
    wide = (FLOAT32 * tower.float32 + width * tower.wide) * vision.hidden_size
    return wide + width * tower.inner * vision.intermediate_size + FLOAT32 * vision.num_attention_heads


def projector_bytes(config: Config, width: int) -> int:
    """Per image token: the input, the hidden layer before and after its activation, and the output. The input is as wide as all patches that
    are merged into a token."""
    vision, text = config.model.architecture.vision, config.model.architecture.text
    rule = config.model.image_tokens
    merged = max(Fraction(1), Fraction(rule.unit, max(1, vision.patch_size)) ** 2) if rule.rule == "grid" else Fraction(1)
    return int(width * (merged * vision.hidden_size * 3 + text.hidden_size))
