"""The size of a micro-batch in tokens and patches: image tokens by the rule of the model's family, and the length of a row.

The launcher opens no image, so the upper bound of the rule is used (all tiles, all slices, the largest area); trainer.models.span has the
rules for an image of a known size. The built-in sets have images of 8 x 8 pixels, for which the lower bound is used.
"""

from dataclasses import dataclass

from launcher.config.schema import Config, ImageTokens

TEXT_TOKENS = 64  # question, answer and template of the built-in sets: 30 with the tokenizer of a real model, rounded up
PATCHES_A_TOKEN = 4  # for rules without pixels: most towers merge 2 x 2 patches into one token


@dataclass(frozen=True, kw_only=True)
class Load:
    """One micro-batch of one device: `rows` of `length` tokens each, including images. `image_tokens` and `patches` (of the vision tower)
    count all rows. `masked`: rows are padded to the longest one, so attention needs a mask. `assumption`: what was assumed about the data."""

    rows: int
    length: int
    image_tokens: int
    patches: int
    masked: bool
    assumption: str

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def read_load(config: Config, *, rows: int) -> Load:
    """`rows` samples, or packed rows, of this config's data. A row has at most data.max_length tokens: the data check refuses longer ones."""
    data = config.data
    tokens, patches = largest_image(config)
    length = data.max_length
    assumption = f"the data is not read; every row has data.max_length={length} tokens, {describe_image(tokens, patches, length)}"
    if data.builtin and not data.packing:
        tokens, patches = smallest_image(config)
        length = min(length, tokens + TEXT_TOKENS)
        assumption = f"images of 8 x 8 pixels and {TEXT_TOKENS} tokens of text, as in {data.builtin}"
    images = min(tokens, length)
    patches = -(-patches * images // tokens) if tokens else patches  # of images that fit into the row
    return Load(
        rows=rows,
        length=length,
        image_tokens=rows * images,
        patches=rows * patches,
        masked=rows > 1 and not (data.packing or data.padding_free),
        assumption=assumption,
    )


def describe_image(tokens: int, patches: int, length: int) -> str:
    if tokens > length:
        return f"all of them image tokens: the largest image of the model has {tokens:,}, and the data check refuses a row with it"
    return f"{tokens:,} of them for one image, the largest that the model takes ({patches:,} patches)"


def smallest_image_tokens(rule: ImageTokens) -> int:
    """Tokens of the smallest image under this rule."""
    return rule.min_pixels // rule.unit**2 if rule.rule == "grid" and rule.unit else rule.tokens


def smallest_image(config: Config) -> tuple[int, int]:
    """(tokens, patches)."""
    rule = config.model.image_tokens
    tokens = smallest_image_tokens(rule)
    return tokens, tokens * patches_a_token(config) if rule.rule == "grid" else tile_patches(config)


def largest_image(config: Config) -> tuple[int, int]:
    """(tokens, patches) of the largest image that the model takes. data.max_pixels or data.max_tiles, where set, replace the processor's own
    limit, also with a larger one (trainer.models.family.Limit).

    grid: area / unit² (Qwen2-VL, arXiv 2409.12191, section 2.1). tiles and slices: `maximum` of them plus an overview, or a single one
    (InternVL, arXiv 2404.16821, section 3; MiniCPM-V, arXiv 2408.01800, section 3.2)."""
    rule, data = config.model.image_tokens, config.data
    if rule.rule == "grid":
        pixels = data.max_pixels or rule.max_pixels
        tokens = max(1, pixels // max(1, rule.unit) ** 2)  # no side is shorter than a unit
        return tokens, tokens * patches_a_token(config)
    if rule.rule == "fixed":
        return rule.tokens, tile_patches(config)
    parts = data.max_tiles or rule.maximum
    count = parts + (parts > 1)
    return rule.tokens * count, tile_patches(config) * count


def patches_a_token(config: Config) -> int:
    rule, patch = config.model.image_tokens, max(1, config.model.architecture.vision.patch_size)
    return max(1, rule.unit // patch) ** 2


def tile_patches(config: Config) -> int:
    """Patches of one tile, slice or fixed-size image."""
    rule, patch = config.model.image_tokens, max(1, config.model.architecture.vision.patch_size)
    return (rule.unit // patch) ** 2 if rule.unit else rule.tokens * PATCHES_A_TOKEN
