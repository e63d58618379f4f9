"""The size of a micro-batch in tokens and patches: image tokens by the rule of the model's family, and the length of a row.

The launcher opens no image, so the upper bound of the rule is used (all tiles, all slices, the largest area); trainer.models.span has the
rules for an image of a known size. The built-in sets have images of 8 x 8 pixels: a run that trains on them is planned with the lower bound.
A stage that answers is always planned with the upper one, because its questions come from elsewhere.
"""

import math
from dataclasses import dataclass, replace

from launcher.config.schema import Config, ImageTokens
from trainer.contract.wording import plural

TEXT_TOKENS = 64  # question, answer and template of the built-in sets: 30 with the tokenizer of a real model, rounded up
QUESTION_TOKENS = 256  # of the text beside the largest image, in a question to a model that serves or infers
PATCHES_A_TOKEN = 4  # for rules without pixels: most towers merge 2 x 2 patches into one token


@dataclass(frozen=True, kw_only=True)
class Load:
    """One micro-batch of one device: `rows` of `length` tokens each, including images. `image_tokens` and `patches` (of the vision tower)
    count all rows. `masked`: rows are padded to the longest one, so attention needs a mask. `assumption`: what was assumed about the data.
    `answer`: of `length`, tokens that are generated one by one."""

    rows: int
    length: int
    image_tokens: int
    patches: int
    masked: bool
    assumption: str
    answer: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def read_load(config: Config, *, rows: int) -> Load:
    """`rows` samples, or packed rows, of this config's data. A row has at most data.max_length tokens: the data check refuses longer ones."""
    data = config.data
    tokens, patches = largest_image(config)
    length = data.max_length
    assumption = f"the data is not read; every row has data.max_length={length} tokens, {describe_image(config, tokens, length)}"
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


def describe_image(config: Config, tokens: int, length: int) -> str:
    if tokens > length:
        return f"all of them image tokens: the largest image of the model has {tokens:,}, and the data check refuses a row with it"
    return f"{tokens:,} of them for one image; {describe_largest(config)}"


def read_answer_load(config: Config, *, rows: int, most_new: int) -> Load:
    """`rows` questions with their answers of at most `most_new` tokens, of a stage that does not train: images as large as the model takes
    them, whatever the data are."""
    if config.stage.kind in ("infer", "serve"):
        return read_question_load(config, rows=rows)
    data, (tokens, patches) = config.data, largest_image(config)
    length = min(data.max_length, tokens + TEXT_TOKENS) if data.builtin else data.max_length
    image = describe_largest(config)
    if config.model.image_tokens.rule == "grid" and not (data.builtin or data.max_pixels) and length > tokens > 0:
        # The processor of a published checkpoint may have a larger bound than the class of its family; only the length of a row bounds it.
        tokens, patches, image = length, length * patches_a_token(config), "all of them of an image (data.max_pixels sets a bound)"
    images = min(tokens, length)
    return Load(
        rows=rows,
        length=length + most_new,
        image_tokens=rows * images,
        patches=rows * (-(-patches * images // tokens) if tokens else patches),
        masked=rows > 1,
        answer=most_new,
        assumption=f"{plural(rows, 'question')} at a time, {length:,} tokens each, {image}; answers of up to {most_new:,} tokens",
    )


def read_evaluation_load(config: Config, *, rows: int, most_new: int) -> Load:
    """Of an evaluation during training, which answers the held-out rows of the set that is trained on."""
    load = read_load(config, rows=rows)
    return replace(load, length=load.length + most_new, answer=most_new)


def read_question_load(config: Config, *, rows: int) -> Load:
    """Of a stage whose `context` the trainer enforces (trainer.generation.answerer). A question may take nearly all of it."""
    context, (tokens, patches) = resolve_context(config), largest_image(config)
    images = count_images(config, context // max(1, tokens))
    shown = min(context, images * tokens)
    each = f"{images} images" if images > 1 else "one image" if images else "no image"
    size = f", {describe_largest(config)}" if images else ""
    if images and tokens > context:
        key = f"stage.{'serving' if config.stage.serving else 'inference'}.context"
        size += f". Such an image does not fit into the context: a question with it is refused. A larger {key}, or the bound of an image, changes that"
    return Load(
        rows=rows,
        length=context,
        image_tokens=rows * shown,
        patches=rows * (-(-patches * shown // tokens) if tokens else patches * images),
        masked=rows > 1,
        assumption=f"{plural(rows, 'answer')} at a time, each with a context of {context:,} tokens (question and answer) and {each}{size}",
    )


def resolve_context(config: Config) -> int:
    """Tokens of a question with its answer, at most: the stage's `context`, or, where it is 0, the largest image with QUESTION_TOKENS of text
    (or data.max_length, if that is more) and the longest answer, as far as the model's own context reaches."""
    options = config.stage.serving or config.stage.inference
    if options is None:
        return config.data.max_length
    image = largest_image(config)[0] + QUESTION_TOKENS if config.data.builtin else 0
    chosen = options.context or max(config.data.max_length, image) + options.sampling.max_new_tokens
    return max(1, min(config.model.context, chosen))


def bound_of_questions(config: Config) -> int:
    """Pixels of an image in a question to a model that infers or serves: what the memory is judged for. A published processor may take more
    (Qwen2.5-VL: 16,384 tokens for one image), and would scale no image that the device cannot hold. 0 = the processor's own bound."""
    return config.model.image_tokens.max_pixels if config.stage.kind in ("infer", "serve") else 0


def count_images(config: Config, most: int) -> int:
    """Images of a question: as many as the server takes and the context holds; one in a row of a file; that of stage.inference.image."""
    serving, inference = config.stage.serving, config.stage.inference
    if serving is not None:
        return min(serving.max_images, max(1, most))
    return 1 if inference is None or inference.input or inference.image else 0


def describe_largest(config: Config) -> str:
    """The largest image that the model takes, with its size, and the key that sets a smaller one."""
    rule, data, (tokens, patches) = config.model.image_tokens, config.data, largest_image(config)
    key = f"{tokens:,} tokens and {patches:,} patches"
    if rule.rule == "grid":
        pixels = data.max_pixels or rule.max_pixels
        whose = "data.max_pixels" if data.max_pixels else "the model's own bound, data.max_pixels sets a smaller one"
        side = math.isqrt(pixels)
        return f"an image has up to {pixels:,} pixels, as {side:,} x {side:,} ({whose}): {key}"
    if rule.rule in ("tiles", "slices"):
        parts = data.max_tiles or rule.maximum
        whose = "data.max_tiles" if data.max_tiles else "the model's own bound, data.max_tiles sets a smaller one"
        return f"an image has up to {parts} {rule.rule} of {rule.unit} x {rule.unit} pixels ({whose}): {key}"
    size = f" of {rule.unit} x {rule.unit} pixels" if rule.unit else ""
    return f"an image{size} has {key}"


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
