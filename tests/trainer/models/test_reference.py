"""Each family compared with transformers' model, which gets inputs that are made here by the documented rules of its processor."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MiniCPMV4_6ForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from tests.trainer.models.conftest import TINY, Made, read_model, talk, to_arguments
from trainer.contract import Template
from trainer.data.batch.collate import collate, collate_prompts
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.models.openbmb.omnilmm import OmniLMMForCausalLM
from trainer.models.openbmb.omnilmm_3b import MiniCPMV

CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "minicpm_v_4_6": MiniCPMV4_6ForConditionalGeneration,
    # Our own classes, compared with the published code in test_omnilmm; here their inputs and outputs are tested.
    "omnilmm_3b": MiniCPMV,
    "omnilmm": OmniLMMForCausalLM,
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[name for name in TINY if read_model(name).family in CLASSES])
def native(request: pytest.FixtureRequest, make_tiny: Callable[[str], Made]) -> Made:
    """The families that transformers has a class for; test_minicpm_v compares another one with its published code."""
    return make_tiny(request.param)


# -------------------------------------------------------------------------------------------- the text of an image


def grid_text(before: str, image: str, after: str) -> Callable[[Any, int], str]:
    """Qwen2_5_VLProcessor, Qwen2_5OmniProcessor: start and end token come from the chat template, t * h * w / merge_size^2 tokens."""

    def text(made: Any, place: int) -> str:
        return before + image * (int(made["image_grid_thw"][0].prod()) // 4) + after

    return text


def tile_text(made: Any, place: int) -> str:
    """InternVLProcessor.replace_image_token: image_seq_length tokens for each tile."""
    return "<img>" + "<IMG_CONTEXT>" * (16 * len(made["pixel_values"])) + "</img>"


def slice_text(made: Any, place: int) -> str:
    """MiniCPMV4_6Processor.replace_image_token: patches / 16 tokens for the overview and each slice, one line for each row."""
    counts = [int(rows) * int(columns) // 16 for rows, columns in made["target_sizes"]]
    rows, columns = made["grids"][0]
    text = f"<image_id>{place}</image_id><image>{'<|image_pad|>' * counts[0]}</image>"
    parts = [f"<slice>{'<|image_pad|>' * count}</slice>" for count in counts[1:]]
    return text + "\n".join("".join(parts[row * columns : (row + 1) * columns]) for row in range(rows))


def query_text(before: str, image: str, after: str) -> Callable[[Any, int], str]:
    """chat.py and modeling_minicpmv.py of OpenBMB: one token for each query of the resampler."""

    def text(made: Any, place: int) -> str:
        return before + image * 16 + after

    return text


RULES: dict[str, Callable[[Any, int], str]] = {
    "qwen2_5_vl": grid_text("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "qwen2_5_omni": grid_text("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "internvl": tile_text,
    "minicpm_v_4_6": slice_text,
    "omnilmm_3b": query_text("<image>", "<unk>", "</image>"),
    "omnilmm": query_text("<im_start>", "<im_patch>", "<im_end>"),
}


class Reference:
    """transformers' model and preprocessing, from a folder that the trainer saved."""

    def __init__(self, made: Made) -> None:
        self.family = made.family.name
        self.template = made.spec.model.template
        self.model = CLASSES[self.family].from_pretrained(made.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(made.folder)
        self.image_processor = AutoImageProcessor.from_pretrained(made.folder)
        self.processor = LlavaProcessor.from_pretrained(made.folder) if self.family == "llava" else None

    def ids_of(self, sample: Sample, text: str) -> tuple[list[int], list[Any]]:
        """The ids of a text of `sample` with its images, and the output of the image processor."""
        pictures = [Image.open(path) for path in sample.images]
        if self.processor is not None:
            batch = self.processor(images=pictures or None, text=text, return_tensors="pt", add_special_tokens=False)
            return batch["input_ids"][0].tolist(), [{"pixel_values": batch["pixel_values"]}] if pictures else []
        crop = {"crop_to_patches": True} if self.family == "internvl" else {}
        made = [self.image_processor(images=picture, return_tensors="pt", **crop) for picture in pictures]
        for place, one in enumerate(made):
            text = text.replace("<MARK>", RULES[self.family](one, place), 1)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"], made

    def row(self, sample: Sample, *, answered: bool = True) -> tuple[list[int], list[int], list[Any]]:
        """Ids, labels and images. The labels are the tokens between a prefix of the text and the next one that ends with an answer."""
        ids, labels, made, known = [], [], [], 0
        for text, trained in prefixes(sample, self.template, "<image>" if self.processor else "<MARK>", answered=answered):
            ids, made = self.ids_of(cut_images(sample, text, self.processor is not None), text)
            labels += ids[known:] if trained else [IGNORED] * (len(ids) - known)
            known = len(ids)
        return ids, labels, made

    def batch(self, samples: Sequence[Sample]) -> Tensors:
        rows = [self.row(sample) for sample in samples]
        width = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels, _ in rows]),
            **self.images([one for _, _, made in rows for one in made]),
        }

    def images(self, made: Sequence[Any]) -> Tensors:
        if not made:
            return {}
        names = [name for name in ("pixel_values", "image_grid_thw", "target_sizes") if name in made[0]]
        side = {"pixel_values": -1} if self.family == "minicpm_v_4_6" else {}
        return {name: torch.cat([one[name] for one in made], dim=side.get(name, 0)) for name in names}

    def complete(self, batch: Tensors) -> Tensors:
        """The token types that Qwen2_5_VLProcessor adds (return_mm_token_type_ids)."""
        if self.family != "qwen2_5_vl":
            return batch
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == self.model.config.image_token_id).int()}


def prefixes(sample: Sample, template: Template, mark: str, *, answered: bool) -> list[tuple[str, bool]]:
    """Prefixes of the conversation of increasing length, and whether the last addition is an answer."""
    text, found = template.system, []
    opening = template.assistant_open.rstrip(" ")
    blank = template.assistant_open[len(opening) :]
    for number, message in enumerate(sample.messages):
        if message.role == "user":
            text += template.user.replace("{content}", message.content.replace("<image>", mark)) + opening
            found.append((text, False))
        elif answered or number < len(sample.messages) - 1:
            text += blank + message.content + template.end_mark
            found.append((text, True))
            text += template.separator
    return [*found, (text, False)] if answered else found


def cut_images(sample: Sample, text: str, real: bool) -> Sample:
    """The sample with only the images that the text contains."""
    return replace(sample, images=sample.images[: text.count("<image>" if real else "<MARK>")])


def our_loss(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
    """The sum as in trainer.distributed.engine, with logits only at positions in the loss."""
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORED
    positions = torch.nn.functional.pad(trained, (0, 1))
    logits = model(**to_arguments(batch, "labels"), logits_to_keep=positions, use_cache=False).logits
    assert logits.shape[:-1] == (int(trained.sum()),)
    return cross_entropy(logits.float(), targets[trained], reduction="sum")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> Tensors:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------------ tests


def test_the_batch_equals_that_of_transformers(native: Made, samples: tuple[Sample, ...]) -> None:
    reference = Reference(native)
    ours, theirs = collate(samples, native.processor, native.spec), reference.complete(reference.batch(samples))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name


def test_loss_and_gradients(native: Made, samples: tuple[Sample, ...]) -> None:
    reference = Reference(native)
    theirs = reference.complete(reference.batch(samples))
    count = int((theirs["labels"][:, 1:] != IGNORED).sum())
    expected = reference.model(**theirs).loss * count  # a mean over the tokens in the loss
    wanted = gradients(reference.model, expected)
    loss = our_loss(native.model, collate(samples, native.processor, native.spec))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(native.model, loss)
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())  # that of a key bias is only rounding
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=max(1e-5 * float(gradient.abs().max()), 1e-7 * largest)), name
    assert {name for name, _ in native.model.named_parameters()} - found.keys() == native.family.unused(native.model)


def test_gradient_checkpointing_changes_nothing(tiny: Made, samples: tuple[Sample, ...]) -> None:
    """Also with everything below the head frozen, as in a stage that trains only the projector."""
    batch = collate(samples, tiny.processor, tiny.spec)
    plain = gradients(tiny.model, our_loss(tiny.model, batch))
    model = tiny.family.load(tiny.folder, tiny.spec.model, torch.float32).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    projector = {name for name in plain if re.match(tiny.spec.model.groups["projector"], name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in projector)
    found = gradients(model, our_loss(model, batch))
    assert found.keys() == projector
    assert all(torch.allclose(found[name], plain[name], rtol=1e-5, atol=1e-6) for name in projector)


def test_generation(native: Made, samples: tuple[Sample, ...]) -> None:
    """One prompt at a time as with transformers, and all of them left-padded as in the trainer."""
    reference = Reference(native)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=reference.tokenizer.pad_token_id, eos_token_id=None)
    batch, _ = collate_prompts(samples, native.processor, native.spec)
    together = native.model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]
    for number, sample in enumerate(samples):
        ids, _, made = reference.row(sample, answered=False)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **reference.images(made)}
        expected = reference.model.generate(**reference.complete(inputs), generation_config=greedy)[0, len(ids) :]
        assert expected.tolist() == together[number].tolist(), f"row {sample.row}"


def test_a_dummy_image_does_not_change_the_loss_and_reaches_the_tower(native: Made) -> None:
    """In a micro-batch without images every parameter of the tower gets a gradient of zero."""
    texts = (talk(("Hello?", "Yes."), row=1), talk(("Who is there this time?", "No one."), row=2))
    reference = Reference(native)
    theirs = reference.batch(texts)
    count = int((theirs["labels"][:, 1:] != IGNORED).sum())
    expected = reference.model(**theirs).loss.item() * count
    loss = our_loss(native.model, collate(texts, native.processor, native.spec))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = gradients(native.model, loss)
    assert {name for name, _ in native.model.named_parameters()} - found.keys() == native.family.unused(native.model)
    assert not any(found[name].any() for name in found if "vis" in name or "merger" in name or "projector" in name)
