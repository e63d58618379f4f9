"""What a micro-batch holds, in tokens and patches: the image tokens of the family's own rule, and how long a row is.

The rule's upper bound is counted (all tiles, all slices, the largest area), since the launcher opens no image: trainer.models.span has the
rules for an image of a known size. Data of our own has images of 8 x 8 pixels, which take the rule's least.
"""

from dataclasses import dataclass

from launcher.config.schema import Config, ImageTokens

TEXT_TOKENS = 64  # question, answer and template of the built-in sets; the digits' 30 in a tokenizer of real size, with room
PATCHES_A_TOKEN = 4  # where the rule names no pixels: two by two patches become one token in most towers


@dataclass(frozen=True, kw_only=True)
class Load:
    """One micro-batch of one device. `rows` of `length` tokens each, images included; `image_tokens` and `patches` (of the vision tower)
    of all rows. `masked`: rows are padded to the longest, so that attention is told where. `assumption` says what was taken for granted."""

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
    """`rows` samples, or packed rows, of this config's data. Never longer than data.max_length: the data check refuses such rows."""
    data = config.data
    tokens, patches = largest_image(config)
    length = data.max_length
    assumption = f"no sizes of the data are read: every row as long as data.max_length={length}, {describe_image(tokens, patches, length)}"
    if data.builtin and not data.packing:
        tokens, patches = smallest_image(config)
        length = min(length, tokens + TEXT_TOKENS)
        assumption = f"images of 8 x 8 pixels and {TEXT_TOKENS} tokens of text, as {data.builtin} has them"
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
        return f"all of it images: the largest that the model takes has {tokens:,} tokens, and a row with it is refused by the data check"
    return f"{tokens:,} of its tokens one image, the largest that the model takes ({patches:,} patches)"


def smallest_image_tokens(rule: ImageTokens) -> int:
    """Tokens of the smallest image that the rule knows."""
    return rule.min_pixels // rule.unit**2 if rule.rule == "grid" and rule.unit else rule.tokens


def smallest_image(config: Config) -> tuple[int, int]:
    """(tokens, patches)."""
    rule = config.model.image_tokens
    tokens = smallest_image_tokens(rule)
    return tokens, tokens * patches_a_token(config) if rule.rule == "grid" else tile_patches(config)


def largest_image(config: Config) -> tuple[int, int]:
    """(tokens, patches) of the largest image that the model takes: data.max_pixels or data.max_tiles stand for the processor's own bound where
    they are set, above it too (trainer.models.family.Limit).

    grid: area / unit² (Qwen2-VL, arXiv 2409.12191, section 2.1). tiles and slices: `maximum` of them and one of the whole image, unless
    there is one alone (InternVL, arXiv 2404.16821, section 3; MiniCPM-V, arXiv 2408.01800, section 3.2)."""
    rule, data = config.model.image_tokens, config.data
    if rule.rule == "grid":
        pixels = data.max_pixels or rule.max_pixels
        tokens = max(1, pixels // max(1, rule.unit) ** 2)  # no side is ever shorter than a unit
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
    """Of one tile, slice or fixed image."""
    rule, patch = config.model.image_tokens, max(1, config.model.architecture.vision.patch_size)
    return (rule.unit // patch) ** 2 if rule.unit else rule.tokens * PATCHES_A_TOKEN
