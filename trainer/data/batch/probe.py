"""Inputs that are always the same, text and an image, to compare the outputs of two forms of a model."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.processor import Processor
from trainer.data.rows.sample import MARK, Message, Sample

LAST = 8  # tokens of a row whose logits are compared: with a vocabulary of 150,000 all of them would be the largest tensor
SIDE = (96, 64)  # pixels of the image
LENGTH = 2**16  # maximum tokens of a probe: more than it needs
QUESTIONS = ("What is in this image?", "Name the colours of the rainbow.", "Which digit is this?", "Count from one to ten.")
ANSWERS = ("It is a slope of grey.", "Red, orange, yellow, green, blue, violet.", "7", "One two three four five six seven eight nine ten.")


def make_probes(spec: TrainSpec, processor: Processor, count: int, *, first: int = 0) -> dict[str, Tensor]:
    """A batch of `count` inputs, always the same, from the input `first` on: the even ones show the image. `logits_to_keep` marks the last tokens of each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "probe.png"
        draw_probe().save(file)
        samples = [make_sample(number, file) for number in range(first, first + count)]
        wide = replace(spec, data=replace(spec.data, max_length=LENGTH))
        batch = collate(samples, processor, wide)
    mask = batch["attention_mask"].bool()
    behind = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end of the row
    return {**{key: value for key, value in batch.items() if key != "labels"}, "logits_to_keep": mask & (behind <= LAST)}


def make_sample(number: int, file: Path) -> Sample:
    index = number % len(QUESTIONS)
    seen = index % 2 == 0
    question = f"{MARK}\n{QUESTIONS[index]}" if seen else QUESTIONS[index]
    again = f" ({number // len(QUESTIONS) + 1})" if number >= len(QUESTIONS) else ""
    messages = (Message(role="user", content=question + again), Message(role="assistant", content=ANSWERS[index]))
    return Sample(id=f"probe-{number}", images=(file,) * seen, messages=messages, file="probe", row=number + 1)


def draw_probe() -> Image.Image:
    """A gradient with stripes in three colours: no two patches are alike."""
    width, height = SIDE
    across = torch.arange(width)[None, :].expand(height, width)
    down = torch.arange(height)[:, None].expand(height, width)
    colours = torch.stack([across * 255 // width, down * 255 // height, (across * 7 + down * 13) % 256], dim=-1)
    return Image.fromarray(colours.to(torch.uint8).numpy())
