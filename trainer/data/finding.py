"""What is wrong with samples that were read: their images, and what the model's template makes of their text."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from trainer.contract import DataProblem, Template
from trainer.data.media.image import Examined, examine_image
from trainer.data.rows.parsed_row import printable
from trainer.data.rows.sample import Sample
from trainer.data.segment import find_template_problems

CHUNK = 4096  # images in flight: futures of a million at once would take a gigabyte


def examine_images(paths: Iterable[Path]) -> dict[Path, Examined]:
    """Decode and hash every image once, on all cores: Pillow and hashlib let go of the interpreter lock."""
    distinct = iter(dict.fromkeys(paths))
    found: dict[Path, Examined] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(distinct, CHUNK)):
            found.update(zip(chunk, pool.map(examine_image, chunk), strict=True))
    return found


def find_problems(samples: Iterable[Sample], images: dict[Path, Examined], template: Template, image_token: str) -> Iterator[DataProblem]:
    for sample in samples:
        yield from find_image_problems(sample, images)
        yield from find_template_problems(sample, template, image_token)
        yield from find_end_marks(sample, template)


def find_image_problems(sample: Sample, images: dict[Path, Examined]) -> Iterator[DataProblem]:
    for path in dict.fromkeys(sample.images):
        if images[path].problem:
            yield DataProblem(
                file=sample.file,
                row=sample.row,
                field="image",
                problem=printable(f"{path} {images[path].problem}"),
                fix="replace the image file, or leave the row out",
            )


def find_end_marks(sample: Sample, template: Template) -> Iterator[DataProblem]:
    """The template's end mark inside a message: the tokenizer makes of it the very token that ends a turn."""
    mark = template.end_mark.strip()
    if not mark:
        return
    for place, message in enumerate(sample.messages, start=1):
        if mark in message.content:
            what = "the model would learn to stop there" if message.role == "assistant" else "the model would read it as the end of a turn"
            problem = f"message {place} ({message.role}) holds the end mark {mark!r}: {what}"
            yield DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix="take it out, or write it in another way")
