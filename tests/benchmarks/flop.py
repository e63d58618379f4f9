"""Model FLOPs of a training step from the numbers in conf/model, for computing MFU.

MFU = model FLOPs of a step / (seconds of the step x peak FLOP/s of the device's matrix units in the dtype of the activations), as in
Chowdhery et al., PaLM (arXiv 2204.02311), appendix B: a multiplication and an addition are 2 FLOPs; only matrix products count; attention is
counted completely, without halving for the causal mask, over the tokens that a token attends to: its own sample (in a windowed vision layer
its window), not the rest of a packed row. Recomputation (gradient checkpointing, chunked loss), padding, and logits at positions without a
label do not count.

    forward   2 x (weights of the matrices) per token, and for each attention layer 4 x heads x head_dim x (tokens attended to)
    backward  the same again for the gradient of the inputs, in every group that is trained or comes after a trained one;
              the same again for the gradient of the weights, in the groups that are trained; for attention twice, if gradients pass it

so that 6 N per token become 4 N if LoRA freezes the N weights, and 2 N for a frozen vision tower before everything that is trained.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.schema import Config, Model
from launcher.memory.states import layer_counts, linear_shapes

ORDER = ("vision", "projector", "lm", "head")  # in the order of the forward pass
MLP_MATRICES = {"qwen2_5_vl": 3, "internvl": 2}  # in a layer of the vision tower, by family: with or without a gate


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sample: `tokens` in the decoder, of which `image_tokens` are of images and `trained` have a label."""

    tokens: int
    trained: int
    image_tokens: int = 0


def count_sample(config: Config, shape: Shape) -> dict[str, float]:
    """FLOPs of one sample, forward and backward, by part: the matrices of vision, projector, lm, head and lora, and `attention`.

    Raises ValueError for a family whose vision tower is not in the table, or an unusual decoder."""
    model, text = config.model, config.model.architecture.text
    if model.family not in MLP_MATRICES or "full_attention_interval" in text.options:
        raise ValueError(f"no FLOP formula for {model.title}; supported families: {', '.join(sorted(MLP_MATRICES))}")
    shapes, layers = linear_shapes(text), layer_counts(text)
    decoder = sum(math.prod(shapes[name]) * layers[name] for name in shapes)
    heads = text.num_attention_heads * (text.head_dim or text.hidden_size // text.num_attention_heads)
    patches = patches_of(model, shape.image_tokens)
    linear = {
        "vision": 2.0 * tower_weights(model) * patches,
        "projector": 2.0 * model.parameters.projector * shape.image_tokens,
        "lm": 2.0 * decoder * shape.tokens,
        "head": 2.0 * text.vocab_size * text.hidden_size * shape.trained,
    }
    attention = {
        "vision": 4.0 * model.architecture.vision.hidden_size * patches * sum(seen_patches(model, patches)),
        "lm": 4.0 * heads * text.num_hidden_layers * shape.tokens**2,
    }
    passes = count_passes(config)
    return {
        **{part: linear[part] * passes[part] for part in ORDER},
        "lora": 3 * 2.0 * adapter_weights(config, shapes, layers) * shape.tokens,
        "attention": sum(once * (3 if passes[part] > 1 else 1) for part, once in attention.items()),
    }


def count_passes(config: Config) -> dict[str, int]:
    """How often the matrices of each group are multiplied: 1 forward, 2 with the gradient of the inputs, 3 with that of the weights."""
    reached, passes = False, {}
    for part in ORDER:
        trained = part in config.stage.trainable
        reached = reached or trained or (part == "lm" and config.stage.lora is not None)
        passes[part] = 1 + reached + trained
    return passes


def adapter_weights(config: Config, shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, int]) -> int:
    """r (in + out) for each target in each layer (Hu et al., arXiv 2106.09685, section 4.1). Raises ValueError for a target given as a regex."""
    lora = config.stage.lora
    if lora is None:
        return 0
    if unknown := set(lora.targets) - set(shapes):
        raise ValueError(f"no FLOP formula for stage.lora.targets {sorted(unknown)}; supported layers: {', '.join(shapes)}")
    return sum(lora.r * sum(shapes[name]) * layers[name] for name in lora.targets)


def tower_weights(model: Model) -> int:
    """Of the matrices that are applied to every patch: four of attention, those of the MLP, and the patch embedding."""
    vision = model.architecture.vision
    width, pixels = vision.hidden_size, 3 * vision.patch_size**2 * vision.options.get("temporal_patch_size", 1)
    layer = 4 * width**2 + MLP_MATRICES[model.family] * width * vision.intermediate_size
    return vision.num_hidden_layers * layer + width * pixels


def patches_of(model: Model, image_tokens: int) -> int:
    """The patches of one image: Qwen merges squares of patches into a token; an InternVL tile also has a class token."""
    if model.family == "qwen2_5_vl":
        return image_tokens * int(model.architecture.vision.options["spatial_merge_size"]) ** 2
    vision = model.architecture.vision
    if image_tokens not in (0, model.image_tokens.tokens) or vision.image_size is None:
        raise ValueError(f"{image_tokens} image tokens are not one tile of {model.title}, {model.image_tokens.tokens}")
    return (vision.image_size // vision.patch_size) ** 2 + 1 if image_tokens else 0


def seen_patches(model: Model, patches: int) -> list[int]:
    """For each layer of the tower, the number of patches that a patch attends to. Exact if the image consists of complete windows."""
    vision = model.architecture.vision
    if "window_size" not in vision.options:
        return [patches] * vision.num_hidden_layers
    window = (vision.options["window_size"] // vision.patch_size) ** 2
    whole = vision.options["fullatt_block_indexes"]
    return [patches if layer in whole else min(window, patches) for layer in range(vision.num_hidden_layers)]
