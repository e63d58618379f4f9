"""Two forms of a model held against each other by their logits on a few inputs, text and images, in float32 and layer by layer from the
disk: so that what was made of a model is judged by what it answers, on a machine that could not hold it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from trainer.checkpoint.adapter import FACTOR, find_parameter, open_adapter, plain_name
from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import MARK, Message, Sample
from trainer.models import find_family
from trainer.models.family import Processor
from trainer.stages.lora import base_name, describe_misfit
from trainer.tensor.int8 import see_through
from trainer.tensor.naming import find_tied, name_in_memory
from trainer.tensor.paging import Read, fill_buffers, page
from trainer.tensor.stream import TensorSource, open_tensors, read_single

LAST = 8  # tokens of a row whose logits are compared: at all of them a vocabulary of 150,000 would be the largest tensor of all
SIDE = (96, 64)  # pixels of the image
LENGTH = 2**16  # tokens that a probe may have: as many as it needs
QUESTIONS = ("What is in this image?", "Name the colours of the rainbow.", "Which digit is this?", "Count from one to ten.")
ANSWERS = ("It is a slope of grey.", "Red, orange, yellow, green, blue, violet.", "7", "One two three four five six seven eight nine ten.")
"""Every other question shows the image."""


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """`relative`: the largest difference of two logits over the largest logit. `agreement`: share of places where both have the same first
    choice. `probes`: inputs, `values`: logits compared."""

    relative: float
    agreement: float
    probes: int
    values: int


def make_probes(spec: TrainSpec, processor: Processor, count: int) -> dict[str, Tensor]:
    """A batch of `count` inputs, the same ones every time; `logits_to_keep` marks the last tokens of each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "probe.png"
        draw().save(file)
        samples = [make_sample(number, file) for number in range(count)]
        wide = replace(spec, data=replace(spec.data, max_length=LENGTH))
        batch = collate(samples, processor, wide)
    mask = batch["attention_mask"].bool()
    behind = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end of the row
    return {**{key: value for key, value in batch.items() if key != "labels"}, "logits_to_keep": mask & (behind <= LAST)}


def make_sample(number: int, file: Path) -> Sample:
    place = number % len(QUESTIONS)
    seen = place % 2 == 0
    question = f"{MARK}\n{QUESTIONS[place]}" if seen else QUESTIONS[place]
    again = f" ({number // len(QUESTIONS) + 1})" if number >= len(QUESTIONS) else ""
    messages = (Message(role="user", content=question + again), Message(role="assistant", content=ANSWERS[place]))
    return Sample(id=f"probe-{number}", images=(file,) * seen, messages=messages, file="probe", row=number + 1)


def draw() -> Image.Image:
    """A slope with stripes in three colours: no two patches of it are alike."""
    width, height = SIDE
    across = torch.arange(width)[None, :].expand(height, width)
    down = torch.arange(height)[:, None].expand(height, width)
    colours = torch.stack([across * 255 // width, down * 255 // height, (across * 7 + down * 13) % 256], dim=-1)
    return Image.fromarray(colours.to(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------------------ reading


def open_hollow(folder: Path, spec: TrainSpec) -> torch.nn.Module:
    """The model of the checkpoint in `folder` without its values."""
    return find_family(spec.model.family).load(folder, spec.model, torch.float32, on_meta=True)


def compute_logits(folder: Path, spec: TrainSpec, batch: Mapping[str, Tensor], place: torch.device, adapter: Path | None = None) -> Tensor:
    """(places, vocabulary) float32, on the CPU: of the checkpoint in `folder`, and of `adapter` on top of it, not merged."""
    model = open_hollow(folder, spec)
    sources = see_through(open_tensors(folder))
    read = make_reader(model, sources)
    fill_buffers(model, read, set(name_in_memory(model, sources).values()), place)
    computing = page(wrap(model, adapter) if adapter else model, read_adapted(model, read, adapter) if adapter else read, place)
    with torch.no_grad():
        logits = computing(**{key: value.to(place) for key, value in batch.items()}, use_cache=False).logits
    if logits.ndim == 3:
        logits = logits[batch["logits_to_keep"].to(logits.device)]
    return logits.float().cpu()


def make_reader(model: torch.nn.Module, sources: Mapping[str, TensorSource]) -> Read:
    """By names in memory; a tied parameter reads what it is tied to."""
    saved = {memory: name for name, memory in name_in_memory(model, sources).items()}
    tied = find_tied(model)

    def read(name: str) -> Tensor:
        return read_single(sources[saved[name if name in saved else tied[name]]])

    return read


# ------------------------------------------------------------------------------------------------------------------ adapter


def wrap(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """The hollow model with peft's layers, whose values come from the adapter. Raises InputRefused for an adapter of another model."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(adapter))
    config.init_lora_weights = False  # type: ignore[attr-defined]  # some starts want the base's values
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise InputRefused(describe_misfit(adapter, error)) from error


def read_adapted(model: torch.nn.Module, read: Read, adapter: Path) -> Read:
    """By the names that peft gives to the parameters of `model`, which is not wrapped."""
    own: dict[str, TensorSource] = {}
    for name, source in open_adapter(adapter).items():
        if found := FACTOR.fullmatch(name):
            module = find_parameter(model, f"{found['module']}.weight").removesuffix(".weight")
            own[module + name.removeprefix(found["module"])] = source
        else:
            own[find_parameter(model, plain_name(name))] = source

    def read_either(name: str) -> Tensor:
        plain = base_name(name.replace(".default", "")) if ".lora_" in name else base_name(name)
        return read_single(own[plain]) if plain in own else read(plain)

    return read_either


# ---------------------------------------------------------------------------------------------------------------- comparing


def compare(before: Tensor, after: Tensor, probes: int) -> LogitDifference:
    """Two tensors of logits, (places, vocabulary). A NaN on either side makes `relative` infinite."""
    largest = before.abs().max()
    relative = float((before - after).abs().max() / largest)
    return LogitDifference(
        relative=relative if relative == relative else float("inf"),
        agreement=float((before.argmax(dim=-1) == after.argmax(dim=-1)).float().mean()),
        probes=probes,
        values=before.numel(),
    )
