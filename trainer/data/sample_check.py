"""Problems of samples that were read: their images, and texts that the chat template of the model cannot express."""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from trainer.contract import Augmentation, DataProblem, Template
from trainer.data.chat.conversation import ChatTemplate
from trainer.data.chat.segment import find_template_problems
from trainer.data.grounding.placement import find_box_problems
from trainer.data.media.image import Examined, examine_image
from trainer.data.rows.parsed_row import printable
from trainer.data.rows.sample import Sample
from trainer.data.special_token import tokens_of_template

# Marks and coordinates of a place in an image, as Qwen, InternVL, MiniCPM, LLaVA and ms-swift write them.
BOXES = re.compile(
    r"<(?:box|bbox|quad|ref-object|point|points|\|box_start\||\|object_ref_start\|)[ >]|bbox_2d|point_2d|\[\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3}\s*\]"
)
CHUNK = 4096  # images submitted at a time: a million futures would take a gigabyte


def examine_images(paths: Iterable[Path], *, truncated: bool = False) -> dict[Path, Examined]:
    """Decode and hash every image once, on all cores: Pillow and hashlib release the global interpreter lock."""
    distinct = iter(dict.fromkeys(paths))
    found: dict[Path, Examined] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(distinct, CHUNK)):
            found.update(zip(chunk, pool.map(partial(examine_image, truncated=truncated), chunk), strict=True))
    return found


def find_problems(
    samples: Iterable[Sample], images: dict[Path, Examined], template: ChatTemplate | None, image_token: str
) -> Iterator[DataProblem]:
    """`template`: None = it is not known. What the checkpoint's own cannot express is found where its texts are counted (trainer.data.length)."""
    tokens = tokens_of_template(template, image_token) if isinstance(template, Template) else None
    for sample in samples:
        yield from find_image_problems(sample, images)
        if isinstance(template, Template):
            yield from find_template_problems(sample, template, image_token)
        if template is not None:
            yield from find_end_marks(sample, template)
        if tokens is not None:
            yield from tokens.find(sample)[0]


def find_image_problems(sample: Sample, images: dict[Path, Examined]) -> Iterator[DataProblem]:
    for path in dict.fromkeys(sample.images):
        if images[path].problem:
            yield DataProblem(
                file=sample.file,
                row=sample.row,
                field="image",
                problem=printable(f"{path} {images[path].problem}"),
                fix=images[path].fix,
            )


def find_wrong_boxes(samples: Iterable[Sample], images: dict[Path, Examined], boxes: str) -> Iterator[DataProblem]:
    """Boxes outside of their image. `boxes`: data.boxes."""
    for sample in samples:
        if not any(images[path].problem for path in sample.images):
            yield from find_box_problems(sample, [images[path].size for path in sample.images], boxes)


def find_moved_boxes(samples: Iterable[Sample], augmentation: Augmentation) -> Iterator[DataProblem]:
    """Training rows whose text names places in an image, which cropping and mirroring would move. A text that says left or right is not
    recognized as one: the report counts those."""
    if not augmentation.moves:
        return
    keys = " ".join(f"data.augmentation.{name}=0" for name in ("crop", "flip") if getattr(augmentation, name))
    for sample in samples:
        found = next(filter(None, (BOXES.search(message.content) for message in sample.messages)), None)
        if found and sample.images:
            problem = f"{found[0][:40]!r} is a place in an image, which data.augmentation would move, but not the text"
            yield DataProblem(file=sample.file, row=sample.row, field="", problem=printable(problem), fix=f"set {keys}, or remove the row")


def find_end_marks(sample: Sample, template: ChatTemplate) -> Iterator[DataProblem]:
    """Messages that contain the end mark of the template: the tokenizer turns it into the token that ends a turn."""
    mark = template.end_mark.strip()
    if not mark:
        return
    for number, message in enumerate(sample.messages, start=1):
        if mark in message.content:
            effect = "learn to stop there" if message.role == "assistant" else "read it as the end of the turn"
            problem = f"message {number} ({message.role}) contains the end mark {mark!r}: the model would {effect}"
            yield DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix="remove it, or write it differently")
