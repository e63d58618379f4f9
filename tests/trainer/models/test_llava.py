from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.contract import InputRefused, Template
from trainer.data.chat.segment import cut
from trainer.data.rows.sample import Message, Sample
from trainer.models.llava import LLAVA
from trainer.models.registry import FAMILIES, find_family
from trainer.models.template import chat_template

TEMPLATES = [
    Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>"),
    Template(system="A 'chat'.\n\n", user="USER: {content}\n", assistant_open="ASSISTANT:", end_mark="</s>", separator="\n"),
    Template(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        assistant_open="<|im_start|>assistant\n",
        end_mark="<|im_end|>",
        separator="\n",
    ),
    Template(user="{% {{ \\ {content} ", assistant_open="a ", end_mark="}}"),
]


def test_a_random_start_depends_only_on_the_seed(tiny_spec: Any) -> None:
    spec = tiny_spec()

    def make(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in LLAVA.create(spec.model).parameters()])

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))


def test_the_number_of_parameters_is_that_of_the_config_file(tiny_spec: Any) -> None:
    assert sum(p.numel() for p in LLAVA.create(tiny_spec(width=96).model).parameters()) == 614_400


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, [-2, 0]])
def test_unused_parameters_are_those_without_gradient(layer: int | list[int], tiny_spec: Any) -> None:
    model = tiny_spec().model
    options = {**model.architecture["options"], "vision_feature_layer": layer}
    model = replace(model, architecture={**model.architecture, "options": options})
    made, processor = LLAVA.create(model), LLAVA.create_processor(model)
    images, span = processor.image_features(Image.new("RGB", (20, 30), "red")), processor.span((20, 30), 0)
    assert span == (processor.tokenizer.convert_tokens_to_ids("<image>"),) * 16
    ids = torch.tensor([[*span, 40, 41]])
    made(input_ids=ids, **images).logits[:, -1].sum().backward()
    assert LLAVA.unused(made) == {name for name, p in made.named_parameters() if p.grad is None}


def test_image_tokens_fit_the_features_of_either_strategy(tiny_spec: Any) -> None:
    model = tiny_spec().model
    options = {**model.architecture["options"], "vision_feature_select_strategy": "full"}
    processor = LLAVA.create_processor(replace(model, architecture={**model.architecture, "options": options}))
    assert len(processor.span((8, 8), 1)) == 17


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tiny_spec: Any) -> None:
    model = tiny_spec().model
    small = {**model.architecture, "text": {**model.architecture["text"], "vocab_size": 300}}
    with pytest.raises(InputRefused, match="vocab_size: 300 is too small for the tokenizer's"):
        LLAVA.create(replace(model, architecture=small))


def test_an_unknown_family_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(InputRefused, match=f"'lava' is not a family of the trainer; valid families: {', '.join(sorted(FAMILIES))}"):
        find_family("lava")
    assert all(name == family.name for name, family in FAMILIES.items())


def test_a_saved_model_is_the_same_in_another_dtype(tiny_spec: Any, tmp_path: Any) -> None:
    spec = tiny_spec()
    made, processor = LLAVA.create(spec.model), LLAVA.create_processor(spec.model)
    made.save_pretrained(tmp_path)
    processor.save(tmp_path)
    loaded, opened = LLAVA.load(tmp_path, spec.model, torch.bfloat16), LLAVA.load_processor(tmp_path, spec.model)
    assert all(torch.equal(p.to(torch.bfloat16), q) for p, q in zip(made.parameters(), loaded.parameters(), strict=True))
    picture = Image.linear_gradient("L").convert("RGB")
    assert torch.equal(processor.image_features(picture)["pixel_values"], opened.image_features(picture)["pixel_values"])
    assert opened.tokenizer("USER: <image>7")["input_ids"] == processor.tokenizer("USER: <image>7")["input_ids"]
    assert opened.tokenizer.padding_side == "right"


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tiny_spec: Any, tmp_path: Any) -> None:
    LLAVA.create(tiny_spec(width=32).model).save_pretrained(tmp_path)
    wanted = tiny_spec("other", width=64).model
    vision = {**wanted.architecture["vision"], "patch_size": 16, "num_hidden_layers": 9}
    wanted = replace(wanted, architecture={**wanted.architecture, "vision": vision})
    with pytest.raises(InputRefused) as caught:
        LLAVA.load(tmp_path, wanted, torch.float32)
    text = str(caught.value)
    assert f"{tmp_path} is not {wanted.name}: set model=NAME to the checkpoint's model" in text
    for line in (
        "model.architecture.vision.hidden_size: 64, the checkpoint has 32",
        "model.architecture.vision.num_hidden_layers: 9, the checkpoint has 2",
        "model.architecture.vision.patch_size: 16, the checkpoint has 8",
        "model.architecture.text.intermediate_size: 128, the checkpoint has 64",
    ):
        assert line in text
    assert "num_attention_heads" not in text and "vocab_size" not in text


def test_a_checkpoint_of_another_family_is_refused(tiny_spec: Any, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "hidden_size": 32}')
    with pytest.raises(InputRefused, match=r"has the model type qwen2_5_vl, but .* has llava"):
        LLAVA.load(tmp_path, tiny_spec().model, torch.float32)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_writes_the_training_text(template: Template) -> None:
    turns = [("user", "<image>\nWhat {x} 'is' it? "), ("assistant", 'A "cat"\n'), ("user", "And {{ this }}?"), ("assistant", "7")]
    if "{content}" in template.system:
        turns.insert(0, ("system", "Be brief."))
    messages = tuple(Message(role=role, content=content) for role, content in turns)  # type: ignore[arg-type]
    sample = Sample(id="1", images=(), messages=messages, file="f", row=1)
    wanted = "".join(segment.text for segment in cut(sample, template, "<image>"))
    assert render(template, [{"role": role, "content": content} for role, content in turns]) == wanted
    prompt = render(template, [{"role": role, "content": content} for role, content in turns[:-1]], add_generation_prompt=True)
    assert wanted.startswith(prompt)
    assert wanted[len(prompt) :].strip().startswith("7")


def test_images_in_parts_become_image_marks() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhich?"}]
    assert render(TEMPLATES[0], [{"role": "user", "content": parts}], add_generation_prompt=True) == "USER: <image>\nWhich? ASSISTANT:"


def render(template: Template, messages: list[dict[str, Any]], **options: Any) -> str:
    """With transformers."""
    from trainer.models.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer("<image>", template)
    return tokenizer.apply_chat_template(messages, chat_template=chat_template(template, "<image>"), tokenize=False, **options)
