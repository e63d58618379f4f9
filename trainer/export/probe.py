"""Compares the logits of two forms of a model on a few inputs, text and images, in float32 and layer by layer from the disk: a derived
checkpoint is checked by its outputs, on a machine that could not hold the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from trainer.checkpoint.adapter import CONFIG, FACTOR, ROWS, find_parameter, name_without_wrapper, open_adapter, row_ids
from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import MARK, Message, Sample
from trainer.models import find_family
from trainer.models.family import Processor
from trainer.stages.lora import base_name, describe_mismatch
from trainer.tensor.int8 import dequantize_sources
from trainer.tensor.naming import find_tied, name_in_memory
from trainer.tensor.paging import ReadTensor, fill_buffers, page
from trainer.tensor.stream import PickledTensor, TensorSource, open_tensors, read_float32
from trainer.tensor.table import grow_sources, replace_rows

LAST = 8  # tokens of a row whose logits are compared: with a vocabulary of 150,000 all of them would be the largest tensor
SIDE = (96, 64)  # pixels of the image
LENGTH = 2**16  # maximum tokens of a probe: more than it needs
QUESTIONS = ("What is in this image?", "Name the colours of the rainbow.", "Which digit is this?", "Count from one to ten.")
ANSWERS = ("It is a slope of grey.", "Red, orange, yellow, green, blue, violet.", "7", "One two three four five six seven eight nine ten.")
"""Every other question shows the image."""


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """`relative`: the largest difference of two logits over the largest logit. `agreement`: share of positions where both have the same top
    token. `probes`: number of inputs; `values`: number of logits compared."""

    relative: float
    agreement: float
    probes: int
    values: int


def make_probes(spec: TrainSpec, processor: Processor, count: int) -> dict[str, Tensor]:
    """A batch of `count` inputs, always the same; `logits_to_keep` marks the last tokens of each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "probe.png"
        draw_image().save(file)
        samples = [make_sample(number, file) for number in range(count)]
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


def draw_image() -> Image.Image:
    """A gradient with stripes in three colours: no two patches are alike."""
    width, height = SIDE
    across = torch.arange(width)[None, :].expand(height, width)
    down = torch.arange(height)[:, None].expand(height, width)
    colours = torch.stack([across * 255 // width, down * 255 // height, (across * 7 + down * 13) % 256], dim=-1)
    return Image.fromarray(colours.to(torch.uint8).numpy())


def open_on_meta(folder: Path, spec: TrainSpec) -> torch.nn.Module:
    """The model of the checkpoint in `folder`, on the meta device."""
    return find_family(spec.model.family).load(folder, spec.model, torch.float32, on_meta=True)


def compute_logits(folder: Path, spec: TrainSpec, batch: Mapping[str, Tensor], device: torch.device, adapter: Path | None = None) -> Tensor:
    """(positions, vocabulary) float32, on the CPU: of the checkpoint in `folder`, with `adapter` applied but not merged."""
    model = open_on_meta(folder, spec)
    sources = dequantize_sources(open_tensors(folder))
    sources = grow_sources(sources, name_in_memory(model, sources), model)
    read = make_reader(model, sources)
    fill_buffers(model, read, set(name_in_memory(model, sources).values()), device)
    computing = page(
        add_adapter_layers(model, adapter) if adapter else model, read_adapted(model, read, adapter) if adapter else read, device
    )
    with torch.no_grad():
        logits = computing(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
    if logits.ndim == 3:
        logits = logits[batch["logits_to_keep"].to(logits.device)]
    return logits.float().cpu()


def make_reader(model: torch.nn.Module, sources: Mapping[str, TensorSource]) -> ReadTensor:
    """Reads by names in memory; a tied parameter reads the one that it is tied to."""
    saved = {memory: name for name, memory in name_in_memory(model, sources).items()}
    tied = find_tied(model)

    def read(name: str) -> Tensor:
        return read_float32(sources[saved[name if name in saved else tied[name]]])

    return read


def add_adapter_layers(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """Adds peft's layers to a model on the meta device. Raises InputRefused for an adapter of another model."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(adapter))
    config.init_lora_weights = False  # type: ignore[attr-defined]  # some initializations need the base's values
    config.trainable_token_indices = None  # type: ignore[attr-defined]  # these rows are read with those of the base
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise InputRefused(describe_mismatch(adapter, error)) from error


def read_adapted(model: torch.nn.Module, read: ReadTensor, adapter: Path) -> ReadTensor:
    """Reads by the names that peft gives to the parameters of `model`, which is not wrapped yet."""
    own: dict[str, TensorSource] = {}
    rows: dict[str, tuple[tuple[int, ...], TensorSource]] = {}
    config, tied = json.loads((adapter / CONFIG).read_text(encoding="utf-8")), find_tied(model)
    for name, source in open_adapter(adapter).items():
        if found := FACTOR.fullmatch(name):
            module = find_parameter(model, f"{found['module']}.weight").removesuffix(".weight")
            own[module + name.removeprefix(found["module"])] = source
        elif name.endswith(ROWS):
            module = name.removesuffix(ROWS)
            rows[find_parameter(model, f"{module}.weight")] = (row_ids(config, module), source)
        else:
            own[find_parameter(model, name_without_wrapper(name))] = source

    def read_either(name: str) -> Tensor:
        plain = base_name(name.replace(".default", "")) if ".lora_" in name else base_name(name)
        values = read_float32(own[plain]) if plain in own else read(plain)
        changed = rows.get(plain) or rows.get(tied.get(plain, ""))
        return read_float32(replace_rows(PickledTensor(tensor=values), changed[0], read_float32(changed[1]))) if changed else values

    return read_either


def compare(before: Tensor, after: Tensor, probes: int) -> LogitDifference:
    """Two tensors of logits, (positions, vocabulary). A NaN in either makes `relative` infinite."""
    largest = before.abs().max()
    relative = float((before - after).abs().max() / largest)
    return LogitDifference(
        relative=relative if relative == relative else float("inf"),
        agreement=float((before.argmax(dim=-1) == after.argmax(dim=-1)).float().mean()),
        probes=probes,
        values=before.numel(),
    )
