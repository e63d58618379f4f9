"""Ids and masks of chat templates in the shape of published ones, against transformers' own apply_chat_template."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.chat.shape import FRAMED, IMAGE, MARKS, SHAPES, open_shape, open_text, read_shape, tokenizer
from trainer.contract import InputRefused
from trainer.data.chat.prefix import cut_checkpoint, starts_by_prefix
from trainer.data.chat.sandbox import TemplateRefused
from trainer.data.encode import IGNORED, encode, encode_prompt
from trainer.data.rows.parsed_row import ToolCall
from trainer.data.rows.sample import Message, Sample

SYSTEM = Message(role="system", content="Be brief.")
TURNS = (
    Message(role="user", content="<image>\nWhich colour?"),
    Message(role="assistant", content="Blue"),
    Message(role="user", content="And <image><image> these, é漢?"),
    Message(role="assistant", content="Red.\nGreen"),
    Message(role="user", content="Sure?"),
    Message(role="assistant", content="Yes"),
)
TALKS = {"one": TURNS[4:], "three": TURNS, "system": (SYSTEM, *TURNS), "image": TURNS[:2]}
TOOL = '{"name": "zoom", "description": "looks closer", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}'
CALLS = (
    TURNS[0],
    Message(role="assistant", content="", calls=(ToolCall(name="zoom", arguments='{"x": 1, "y": "é"}'),)),
    Message(role="tool", content='{"ok": true}'),
    TURNS[1],
)
TEXTS = ("minicpm", "marked", "phi")  # that take the content of a question as one text
AFTER_IMAGE = {"internvl": "\n", "llava": "\n"}  # what the template writes behind an image


def sample_of(*messages: Message, tools: tuple[str, ...] = ()) -> Sample:
    images = sum(message.content.count("<image>") for message in messages)
    return Sample(id="1", images=(Path("a.png"),) * images, messages=messages, file="rows.json", row=3, tools=tools)


def as_given(name: str, message: Message) -> dict[str, Any]:
    """As a user of transformers writes the message for this template."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if name == "llava" or ("<image>" in message.content and name not in TEXTS):
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split("<image>")):
            text = text.removeprefix(AFTER_IMAGE.get(name, "")) if number else text
            parts += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
        found["content"] = parts
    elif name in TEXTS:
        found["content"] = message.content.replace("<image>", MARKS.get(name, IMAGE))
    if message.calls:
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.calls]
        found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return {**found, "reasoning_content": message.reasoning} if message.reasoning else found


def render(name: str, sample: Sample, messages: tuple[Message, ...], **options: Any) -> str:
    """What transformers writes, with an image as one token. The date is that at which ours is frozen."""
    source = read_shape(name).replace('strftime_now("%d %b %Y")', "'26 Jul 2024'")
    tools = [{"type": "function", "function": json.loads(tool)} for tool in sample.tools] or None
    given = [as_given(name, message) for message in messages]
    text = tokenizer().apply_chat_template(given, chat_template=source, tools=tools, tokenize=False, **options)
    return text.replace(MARKS.get(name, IMAGE), IMAGE)  # type: ignore[no-any-return]


def encode_both(name: str, sample: Sample) -> tuple[list[int], list[int]]:
    image = tokenizer().convert_tokens_to_ids(IMAGE)
    found = encode(sample, tokenizer(), open_shape(name), IMAGE, ((image,),) * len(sample.images), 10_000)
    return found.input_ids, found.labels


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "llava"])
def test_ids_and_masks_are_those_of_transformers(name: str, talk: str) -> None:
    """An answer is trained on from where the template ends when it asks for it to its end mark."""
    sample = sample_of(*TALKS[talk])
    ids, labels = encode_both(name, sample)
    whole = render(name, sample, sample.messages)
    assert ids == tokenizer()(whole, add_special_tokens=False)["input_ids"]
    trained = tokenizer().decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])
    end = "<|eot|>" if name == "llama" else "<|im_end|>"
    assert trained == "".join(f"{message.content}{end}" for message in sample.messages if message.role == "assistant")
    asked = render(name, sample, sample.messages[:-1], add_generation_prompt=True, enable_thinking=False)
    assert labels[: len(tokenizer()(asked, add_special_tokens=False)["input_ids"])][-1] == IGNORED
    assert labels[len(tokenizer()(asked, add_special_tokens=False)["input_ids"])] != IGNORED


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_is_what_transformers_asks_with(name: str, talk: str) -> None:
    sample = sample_of(*TALKS[talk])
    image = tokenizer().convert_tokens_to_ids(IMAGE)
    found = encode_prompt(sample, tokenizer(), open_shape(name), IMAGE, ((image,),) * len(sample.images), 10_000).input_ids
    assert encode_both(name, sample)[0][: len(found)] == found
    if name == "llava" and talk in ("three", "system"):
        return  # its earlier answers get an end mark here
    asked = render(name, sample, sample.messages[:-1], add_generation_prompt=True, enable_thinking=False)
    assert found == tokenizer()(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("talk", TALKS)
def test_generation_marks_are_the_mask_of_transformers(talk: str) -> None:
    sample = sample_of(*TALKS[talk])
    given = [as_given("marked", message) for message in sample.messages]
    made = tokenizer().apply_chat_template(
        given, chat_template=read_shape("marked"), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids, labels = encode_both("marked", sample)
    assert ids == made["input_ids"]
    assert [int(label != IGNORED) for label in labels] == made["assistant_masks"]


def test_llava_has_no_end_mark_so_that_one_is_put_behind_each_answer() -> None:
    segments = cut_checkpoint(sample_of(SYSTEM, *TURNS), open_shape("llava"))
    assert [segment.text for segment in segments if segment.in_loss] == [" Blue</s>", " Red.\nGreen</s>", " Yes</s>"]
    text = "".join(segment.text for segment in segments)
    assert text == (
        f"Be brief. USER: {IMAGE}\nWhich colour? ASSISTANT: Blue</s>USER: {IMAGE}\n{IMAGE}\nAnd   these, é漢? ASSISTANT: Red.\nGreen</s>"
        "USER: Sure? ASSISTANT: Yes</s>"
    )


def test_calls_tools_and_results_are_written_as_transformers_writes_them() -> None:
    sample = sample_of(SYSTEM, *CALLS, tools=(TOOL,))
    ids, labels = encode_both("qwen3", sample)
    assert ids == tokenizer()(render("qwen3", sample, sample.messages), add_special_tokens=False)["input_ids"]
    trained = tokenizer().decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])
    assert trained == '<tool_call>\n{"name": "zoom", "arguments": {"x": 1, "y": "é"}}\n</tool_call><|im_end|>Blue<|im_end|>'


def test_reasoning_is_part_of_the_answer() -> None:
    """The model is asked with an open thought, and learns to close it. An earlier thought is left out, as the template does."""
    thought = replace(TURNS[5], reasoning="They said so.")
    sample = sample_of(*TURNS[:2], TURNS[4], thought)
    ids, labels = encode_both("qwen3", sample)
    assert ids == tokenizer()(render("qwen3", sample, sample.messages), add_special_tokens=False)["input_ids"]
    trained = tokenizer().decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])
    assert trained == "Blue<|im_end|>They said so.\n</think>\n\nYes<|im_end|>"


@pytest.mark.parametrize("name", SHAPES)
def test_no_system_text_at_all(name: str) -> None:
    """An empty system message stands for data.system=none."""
    text = "".join(segment.text for segment in cut_checkpoint(sample_of(replace(SYSTEM, content=""), *TURNS[:2]), open_shape(name)))
    assert "helpful" not in text and "Today" not in text and text.count("Which colour?") == 1


def test_an_answer_outside_of_the_loss() -> None:
    messages = (*TURNS[:3], replace(TURNS[3], in_loss=False), *TURNS[4:])
    for name in SHAPES:
        trained = [segment.text for segment in cut_checkpoint(sample_of(*messages), open_shape(name)) if segment.in_loss]
        assert [text.strip().split("<")[0] for text in trained] == ["Blue", "Yes"], name


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("llava", "qwen3")])
def test_both_ways_to_find_an_answer_agree(name: str) -> None:
    template, sample = open_shape(name), sample_of(SYSTEM, *TURNS)
    segments = cut_checkpoint(sample, template)
    text = "".join(segment.text for segment in segments)
    places = [len("".join(segment.text for segment in segments[:number])) for number, each in enumerate(segments) if each.in_loss]
    assert list(starts_by_prefix(sample, template, text)) == places[:-1]


# --------------------------------------------------------------------------------------------------------- rows refused


@pytest.mark.parametrize(
    ("name", "sample", "problem"),
    [
        ("chatml", sample_of(*CALLS, tools=(TOOL,)), "leaves out tools and calls of tools"),
        ("chatml", sample_of(TURNS[0], replace(TURNS[1], reasoning="It is.")), "leaves out the reasoning of an answer"),
        ("chatml", sample_of(replace(TURNS[0], content=f"<image> {IMAGE}"), TURNS[1]), "in a message as an image"),
        ("qwen3", sample_of(*TURNS[:2], SYSTEM, *TURNS[4:]), "The system message comes first"),
    ],
)
def test_what_the_template_cannot_express_is_refused(name: str, sample: Sample, problem: str) -> None:
    with pytest.raises(InputRefused, match=rf"rows\.json row 3: the chat template of the checkpoint \({name}\.jinja\) .*{problem}"):
        cut_checkpoint(sample, open_shape(name))


CHATML = read_shape("chatml")


def test_a_text_that_the_template_changes_is_refused() -> None:
    template = open_text(CHATML.replace("{{ turn['content'] }}", "{{ turn['content'] | replace('Blue', 'Red') }}"), FRAMED)
    with pytest.raises(InputRefused, match=r"changes the text of message 2 \(assistant\)"):
        cut_checkpoint(sample_of(*TURNS[:2]), template)
    cut_checkpoint(sample_of(*TURNS[4:]), template)


def test_a_template_that_depends_on_a_text_that_follows_is_refused() -> None:
    template = open_text("{% if messages[-1]['content'] == 'Blue' %}guess{% endif %}" + CHATML, FRAMED)
    with pytest.raises(
        InputRefused, match=r"depends on what comes after a message: asked for the last answer it writes '<\|im_start\|>system"
    ):
        cut_checkpoint(sample_of(*TURNS[:2]), template)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            ("<|im_start|>{{ turn['role'] }}", "{{ messages | length }}<|im_start|>{{ turn['role'] }}"),
            "not begin an answer as it asks for one",
        ),
        (("{% if loop.first", "{% if loop.index > 2 %}{{ raise_exception('two at most') }}{% endif %}{% if loop.first"), "two at most"),
        (("{% if turn['content'] is string %}", "{% if true %}{% elif turn['content'] is string %}"), "leaves out questions, answers"),
        (("{% for turn", "{{ now() }}{% for turn"), "'now' is undefined"),
        (("{% for turn", "{% for turn turn"), "is not valid Jinja in line 2"),
        (("{% for turn", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{% for turn"), "does not end"),
        (("{% for turn", "{{ 'x' * 99999999 }}{% for turn"), "a text of more than 16,777,216 characters"),
        (("{% for turn", "{{ messages.__class__.__mro__ }}{% for turn"), "unsafe"),
    ],
)
def test_a_template_that_cannot_be_trained_with(change: tuple[str, str], problem: str) -> None:
    assert change[0] in CHATML
    with pytest.raises(TemplateRefused, match=problem):
        open_text(CHATML.replace(*change), FRAMED)


def test_an_image_without_the_tokens_around_it_is_written_as_text() -> None:
    """The model's processor would read the token alone as an image without its frame."""
    template = open_text(CHATML.replace(FRAMED, IMAGE), FRAMED)
    assert not template.images
    assert open_shape("chatml").images
    segments = cut_checkpoint(sample_of(*TURNS[:2]), template)
    assert segments == cut_checkpoint(sample_of(*TURNS[:2]), open_shape("chatml"))
