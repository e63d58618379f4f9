"""What a device holds while a model answers, beside its weights: pixels, the key-value cache, and what the layer at work needs.

Generation has three moments: the vision tower on all images of the batch, the decoder on the questions (prefill), and the last tokens of the
longest answers. All sizes are in bytes; the counts of tensors are those of transformers 5.23 without gradients, and of this project's own
modules. tests/benchmarks/fit_inference.py compares their sum with real answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.schema import Config
from launcher.memory.states import DTYPE_BYTES, is_hybrid, layer_counts, linear_shapes, vocabulary
from launcher.memory.tokens import Load

FLOAT32, INT64 = DTYPE_BYTES["float32"], 8
CHANNELS = 3
FRAMES = {"qwen2_5_vl": 2, "qwen2_5_omni": 2}  # an image is two equal frames there (temporal_patch_size)
ROTARY = 6  # tensors of q's size in float32, while positions are applied to q and k; 4 where they are in float32 already
SCALED = {"omnilmm_3b": 2}  # more copies of the hidden states: its embeddings and residuals are scaled (Granite)
CHUNK, CHUNK_SQUARES, CHUNK_KEYS, CHUNK_VALUES = 64, 3, 7, 6  # float32 tensors of a layer of linear attention, by shape (Qwen3.5)
AnswerMoment = Mapping[str, int]  # item -> bytes


@dataclass(frozen=True, kw_only=True)
class TowerWork:
    """Elements that a layer of a vision tower needs per patch in its forward pass: `wide` in units of its hidden size, `inner` of its
    intermediate size. `casts`: pixels stay in memory in float32 and in the dtype of the weights. `collects`: the outputs of all layers are kept
    (output_hidden_states). `rotary`: positions are applied in float32. `after_text`: the embeddings of the text exist already."""

    wide: int
    inner: int = 2
    casts: bool = True
    collects: bool = False
    rotary: bool = False
    after_text: bool = False


QWEN = TowerWork(wide=3, inner=3, rotary=True)
TOWERS = {
    "llava": TowerWork(wide=3, inner=3, casts=False, collects=True),  # quick_gelu
    "internvl": TowerWork(wide=5),
    "qwen2_5_vl": QWEN,
    "qwen2_5_omni": QWEN,
    "minicpm_v_2_6": TowerWork(wide=5, casts=False, after_text=True),
    "minicpm_o_2_6": TowerWork(wide=5, casts=False, after_text=True),
    "minicpm_v_4_6": TowerWork(wide=3),
    "omnilmm_3b": TowerWork(wide=4, after_text=True),
    "omnilmm": TowerWork(wide=3, after_text=True),
}
USUAL = TowerWork(wide=5)


def answer_load(config: Config) -> tuple[int, int]:
    """(questions answered at a time, most tokens of an answer)."""
    inference, serving, evaluation = config.stage.inference, config.stage.serving, config.run.evaluation
    if config.stage.kind == "infer" and inference:
        batch = inference.batch if inference.input else 1
        return batch * inference.sampling.beams, inference.sampling.max_new_tokens
    if config.stage.kind == "serve" and serving:
        return serving.max_batch * serving.sampling.beams, serving.sampling.max_new_tokens
    return evaluation.batch, evaluation.max_new_tokens


def answer_items(config: Config, load: Load) -> AnswerMoment:
    """The items of the moment with the largest sum."""
    pixels = pixel_bytes(config, load, FLOAT32)
    moments: tuple[AnswerMoment, ...] = (
        {"pixels of the images": pixels + cast_bytes(config, load), "layer at work": vision_work_bytes(config, load)},
        {
            "pixels of the images": pixels,
            "keys and values": cache_bytes(config, load, load.length - load.answer),
            "layer at work": prefill_bytes(config, load),
        },
        {
            "pixels of the images": pixels,
            "keys and values": cache_bytes(config, load, load.length),
            "layer at work": decode_bytes(config, load),
        },
    )
    return max(moments, key=lambda moment: sum(moment.values()))


def pixel_bytes(config: Config, load: Load, width: int) -> int:
    """Of all images of the batch. They stay on the device until the answers are complete."""
    patch = config.model.architecture.vision.patch_size
    return load.patches * CHANNELS * FRAMES.get(config.model.family, 1) * patch**2 * width


def cast_bytes(config: Config, load: Load) -> int:
    width = DTYPE_BYTES[config.precision.compute]
    return pixel_bytes(config, load, width) if width != FLOAT32 and find_tower(config).casts else 0


def find_tower(config: Config) -> TowerWork:
    return TOWERS.get(config.model.family, USUAL)


def vision_work_bytes(config: Config, load: Load) -> int:
    """Of the layer of the tower that needs most: its MLP, or its attention. Without a fused kernel attention has the square of scores of each
    image or tile, in float32 and in the compute dtype."""
    vision, tower, width = config.model.architecture.vision, find_tower(config), DTYPE_BYTES[config.precision.compute]
    hidden = vision.hidden_size
    mlp = width * (tower.inner * vision.intermediate_size + tower.wide * hidden)
    attention, always = width * 8 * hidden, 0
    if tower.rotary:
        copies = ROTARY if width != FLOAT32 else ROTARY - 2
        attention = copies * FLOAT32 * hidden + width * 5 * hidden
        always = 2 * FLOAT32 * hidden // max(1, vision.num_attention_heads)  # cosines and sines
    if is_eager(config):
        attention += (FLOAT32 + width) * vision.num_attention_heads * patches_together(config)
    if tower.collects:
        always += width * hidden * (vision.num_hidden_layers - 1)
    text = width * config.model.architecture.text.hidden_size * load.rows * (load.length - load.answer) if tower.after_text else 0
    return load.patches * (max(mlp, attention) + always) + text


def patches_together(config: Config) -> int:
    """Patches that attend to each other: of a tile; of an image where it is one grid, whose windows are smaller in most layers but not in all."""
    rule, patch = config.model.image_tokens, max(1, config.model.architecture.vision.patch_size)
    if rule.rule == "grid":
        return (config.data.max_pixels or rule.max_pixels) // patch**2
    return (rule.unit // patch) ** 2


def is_eager(config: Config) -> bool:
    return config.hardware.capability.attention[:1] == ("eager",)


def cache_bytes(config: Config, load: Load, length: int) -> int:
    """Keys and values of `length` tokens of every row, in the layers that have them."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    return 2 * linear_shapes(text)["k_proj"][1] * width * layer_counts(text)["k_proj"] * length * load.rows


def prefill_bytes(config: Config, load: Load) -> int:
    """Of one decoder layer on all questions: the MLP's three tensors with embeddings, residual and norm, or attention with heads that are
    repeated; the features of the images; the mask of rows of different lengths, which attention copies in the dtype of q."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    length, queries = load.length - load.answer, linear_shapes(text)["q_proj"][1]
    hidden = width * (3 + SCALED.get(config.model.family, 0)) * text.hidden_size
    mlp = hidden + width * (3 * text.intermediate_size + text.hidden_size)
    attention = hidden + width * (4 * queries + (length if load.masked else 0))
    if is_eager(config):
        attention += (FLOAT32 + width) * text.num_attention_heads * length
    if is_hybrid(text):
        attention = max(attention, hidden + linear_attention_work(config))
    mask = length if load.masked else 0
    features = width * 2 * text.hidden_size * load.image_tokens
    tower = 2 * width * config.model.architecture.vision.hidden_size * load.patches if find_tower(config).collects else 0
    positions = 2 * width * queries // max(1, text.num_attention_heads)
    return load.rows * length * (max(mlp, attention) + mask + positions) + features + tower


def linear_attention_work(config: Config) -> int:
    """Per token, of a layer of gated linear attention with torch's own kernel: float32 chunks of CHUNK tokens, and what the convolution read."""
    options, width = config.model.architecture.text.options, DTYPE_BYTES[config.precision.compute]
    heads, query_heads = options.get("linear_num_value_heads", 0), options.get("linear_num_key_heads", 0)
    key_dim, value_dim = options.get("linear_key_head_dim", 0), options.get("linear_value_head_dim", 0)
    chunks: int = heads * (CHUNK_SQUARES * CHUNK + CHUNK_KEYS * key_dim + CHUNK_VALUES * value_dim)
    convolved: int = 2 * query_heads * key_dim + heads * value_dim
    return FLOAT32 * chunks + width * convolved


def decode_bytes(config: Config, load: Load) -> int:
    """For one more token: a layer's keys, copied with the new ones, and the logits with their copies in float32."""
    text, width = config.model.architecture.text, DTYPE_BYTES[config.precision.compute]
    copied = linear_shapes(text)["k_proj"][1] * width * load.length * load.rows
    return copied + vocabulary(config) * (width + 2 * FLOAT32) * load.rows + INT64 * 4 * load.length * load.rows
