from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainer.data.conftest import TOKENS
from trainer.contract import InputRefused, Lora
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import collate, collate_prompts, needs_dummy
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Message, Sample, read_samples


def text_only(row: int, question: str = "Hello?") -> Sample:
    messages = (Message(role="user", content=question), Message(role="assistant", content="Yes."))
    return Sample(id=str(row), images=(), messages=messages, file="rows.json", row=row)


@pytest.fixture
def samples(write_data, tmp_path: Path) -> tuple[Sample, ...]:
    return read_samples(write_data(12), tmp_path)[0]


def test_shapes_padding_and_images(samples, processor, spec) -> None:
    batch = collate([samples[10], samples[1], text_only(99)], processor, spec)
    rows, width = batch["input_ids"].shape
    assert rows == 3
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((3, width), torch.int64),
        "attention_mask": ((3, width), torch.int64),
        "labels": ((3, width), torch.int64),
        "pixel_values": ((2, 3, 8, 8), torch.float32),
    }
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [10, 1], "images in the order of the samples"
    padding = batch["attention_mask"] == 0
    assert torch.equal(padding.long().sort(dim=1).values, padding.long()), "padding is on the right"
    assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(dim=1).tolist() == [TOKENS, TOKENS, 0]


def test_the_longest_row_is_not_padded(samples, processor, spec) -> None:
    batch = collate([samples[10], samples[1]], processor, spec)
    assert batch["attention_mask"].sum(dim=1).tolist() == [batch["input_ids"].shape[1], batch["input_ids"].shape[1] - 1]


def test_prompts_are_padded_on_the_left(samples, processor, spec) -> None:
    tensors, references = collate_prompts([samples[3], text_only(99)], processor, spec)
    assert references == ("number 3", "Yes.")
    assert "labels" not in tensors
    assert tensors["attention_mask"][0].all() and not tensors["attention_mask"][1, 0]
    texts = [
        processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(tensors["input_ids"], tensors["attention_mask"], strict=True)
    ]
    assert texts == ["USER: " + "<image>" * TOKENS + "\nWhich is it? ASSISTANT:", "USER: Hello? ASSISTANT:"]
    assert tensors["pixel_values"].shape == (1, 3, 8, 8)


def test_cached_results_are_the_same_and_need_no_files(samples, processor, spec, tmp_path) -> None:
    cache = Cache(10_000_000)
    fresh = collate(samples[:4], processor, spec)
    first = collate(samples[:4], processor, spec, cache)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    second = collate(samples[:4], processor, spec, cache)
    for name, tensor in fresh.items():
        assert torch.equal(tensor, first[name]) and torch.equal(tensor, second[name])


def test_a_missing_image_is_reported_with_its_row(samples, processor, spec, tmp_path) -> None:
    (tmp_path / "2.png").unlink()
    with pytest.raises(InputRefused, match=r"train.json row 3, key 'image': .*2.png: cannot be read: No such file"):
        collate(samples, processor, spec)


def test_a_tokenizer_without_a_pad_token(samples, processor, spec) -> None:
    class NoPad:
        def __init__(self, inner: object) -> None:
            self.inner, self.pad_token_id = inner, None

        def __call__(self, *args: object, **options: object) -> object:
            return self.inner(*args, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    with pytest.raises(InputRefused, match="no pad token"):
        collate(samples[:1], replace(processor, tokenizer=NoPad(processor.tokenizer)), spec)


# ---------------------------------------------------------------------------------------------------------------- dummy image


def test_needs_dummy(spec) -> None:
    frozen = replace(spec, stage=replace(spec.stage, trainable=("lm",), lora=Lora(r=1, alpha=1, dropout=0, targets=("q_proj",))))
    projector = replace(spec, stage=replace(spec.stage, trainable=("projector",)))
    sharded = replace(frozen, deepspeed={"zero_optimization": {"stage": 3}})
    evaluation = replace(spec, stage=replace(spec.stage, kind="evaluate"))
    assert [needs_dummy([(), ()], each) for each in (spec, projector, frozen, sharded, evaluation)] == [True, True, False, True, False]
    assert not needs_dummy([(), ("an image",)], spec)


def test_the_dummy_is_masked_and_after_the_shortest_row(processor, spec) -> None:
    long, short = text_only(1, "Hello, who is there this time?"), text_only(2)
    batch = collate([long, short], processor, spec)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [0, TOKENS]
    dummy = batch["input_ids"] == image
    assert not batch["attention_mask"][dummy].any() and (batch["labels"][dummy] == IGNORED).all()
    assert batch["pixel_values"].shape == (1, 3, 8, 8) and not batch["pixel_values"].any()


def test_the_dummy_does_not_change_the_loss_and_gives_every_group_gradients(processor, spec) -> None:
    """With transformers' own LLaVA: the same loss and language gradients, and zero gradients for the tower."""
    model = tiny_llava(processor.tokenizer)
    plain = replace(spec, stage=replace(spec.stage, trainable=("lm",)))
    batches = [collate([text_only(1, "Hello, who is there?"), text_only(2)], processor, each) for each in (plain, spec)]
    assert ["pixel_values" in batch for batch in batches] == [False, True]
    losses, gradients = zip(*(run(model, batch) for batch in batches), strict=True)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    tower = {name for name in gradients[1] if "multi_modal_projector" in name or "patch_embedding" in name}
    assert tower and tower.isdisjoint(gradients[0]), "without the dummy these have no gradient"
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0].get(name, torch.zeros_like(gradient)), atol=1e-6, rtol=1e-5)


def run(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def tiny_llava(tokenizer):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=4)
    text = LlamaConfig(**size, vocab_size=384, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=4))


def test_blank_images_are_black(processor) -> None:
    assert not processor.image_features(Image.new("RGB", (64, 64)))["pixel_values"].any()
