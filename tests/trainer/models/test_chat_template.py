"""Every family with its exported chat template, and with one of another's in its folder, against transformers on the same files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer.data.chat.shape import read_shape
from tests.trainer.models.conftest import TINY, Made, talk
from trainer.contract import InputRefused, Template
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import encode_arguments, load_images
from trainer.data.chat.prefix import USE_CONF
from trainer.data.encode import IGNORED, encode
from trainer.data.length import LengthTally
from trainer.data.media.image import read_size
from trainer.data.rows.sample import Message, Sample
from trainer.models.registry import find_family
from trainer.models.template import chat_template

# The exported template of commit 9ed9b4a and before: no place for a system message, and tools are dropped.
EARLIER = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}{{ image_mark if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
EARLIER_TURNS = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{ user_before }}{{ text(message['content']) }}{{ user_after }}
  {%- elif message['role'] == 'assistant' -%}{{ open }}{{ text(message['content']) }}{{ close }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ prompt }}{%- endif -%}"""
SYSTEM = Message(role="system", content="Be brief.")
# Of a family, what the shapes of tests/trainer/data/chat have as the token of an image.
SHAPES = {
    "tiny_qwen2_5_vl": ("chatml", "<|image_pad|>"),
    "tiny_internvl": ("internvl", "<IMG_CONTEXT>"),
    "tiny_llava": ("llava", "<image>"),
}
SHAPES |= {"tiny_minicpm_v_4_6": ("internvl", "<|image_pad|>"), "tiny_minicpm_v_2_6": ("minicpm", "<unk>")}
MARKS = {"tiny_qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "tiny_minicpm_v_2_6": "(<image>./</image>)"}
MARKS |= {"tiny_qwen2_5_omni": "<|vision_bos|><|IMAGE|><|vision_eos|>"}


def encode_sample(sample: Sample, processor: Any, made: Made) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    images = load_images(sample, processor, made.spec, Cache(0))
    found = encode(sample, *encode_arguments(processor, made.spec, images))
    return found.input_ids, found.labels, [processor.span(image.size, index) for index, image in enumerate(images)]


def as_given(message: Message, *, parts: bool, mark: str) -> dict[str, Any]:
    pieces = message.content.split("<image>") if message.role == "user" else [message.content]
    if not parts:
        return {"role": message.role, "content": mark.join(pieces)}
    listed: list[dict[str, str]] = []
    for number, text in enumerate(pieces):
        listed += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return {"role": message.role, "content": listed}


def expected_ids(tokenizer: Any, text: str, mark: str, spans: list[tuple[int, ...]], token: str) -> list[int]:
    """The ids of what transformers has written, with each mark replaced as the processor of the model does."""
    marked, remaining = text.replace(mark, token), iter(spans)
    image = tokenizer.convert_tokens_to_ids(token)
    ids = tokenizer(marked, add_special_tokens=False)["input_ids"]
    return [each for one in ids for each in (next(remaining) if one == image else (one,))]


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "text"])
def test_the_saved_template_is_what_is_trained_with(tiny: Made, samples: tuple[Sample, ...], parts: bool, system: Message | None) -> None:
    """transformers' own rendering of the saved folder, for several turns, images and a system message; the mask from the rendered prefixes."""
    kind = PreTrainedTokenizerFast if "2_6" in tiny.name else AutoTokenizer
    tokenizer = kind.from_pretrained(tiny.folder)
    mark = MARKS.get(tiny.name, tiny.spec.model.image_token)
    for sample in samples:
        sample = replace(sample, messages=(*((system,) if system else ()), *sample.messages))
        ids, labels, spans = encode_sample(sample, tiny.processor, tiny)
        given = [as_given(message, parts=parts, mark=mark) for message in sample.messages]
        text = tokenizer.apply_chat_template(given, tokenize=False)
        assert ids == expected_ids(tokenizer, text, mark, spans, tiny.spec.model.image_token)
        asked = tokenizer.apply_chat_template(given[:-1], tokenize=False, add_generation_prompt=True)
        prompt = expected_ids(tokenizer, asked, mark, spans, tiny.spec.model.image_token)
        assert ids[: len(prompt)] == prompt
        last = labels[len(prompt) :]
        end = tiny.spec.model.template.end_mark
        assert tokenizer.decode([token for token in last if token != IGNORED]).strip() == f"{sample.messages[-1].content}{end}"


def copy_with(tiny: Made, folder: Path, template: str | None) -> Path:
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("run", "data", "*.safetensors"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def reopen(made: Made, folder: Path, choice: str) -> Any:
    model = replace(made.spec.model, chat_template=choice)  # type: ignore[arg-type]
    return find_family(model.family).load_processor(folder, model)


@pytest.mark.parametrize("name", SHAPES)
def test_the_checkpoint_s_own_template_is_used_and_kept(
    make_tiny: Callable[[str], Made], samples: tuple[Sample, ...], tmp_path: Path, name: str
) -> None:
    made, (shape, token) = make_tiny(name), SHAPES[name]
    template = read_shape(shape).replace("<|image_pad|>", token)
    processor = reopen(made, copy_with(made, tmp_path / "own", template), "auto")
    tokenizer, mark = processor.tokenizer, MARKS.get(name, token)
    assert processor.notes[0].startswith("chat template: that of the checkpoint, chat_template.jinja")
    for sample in samples:
        sample = replace(sample, messages=(SYSTEM, *sample.messages))
        ids, _, spans = encode_sample(sample, processor, made)
        line = "\n" if shape in ("internvl", "llava") else ""
        given = [
            as_given(replace(each, content=each.content.replace(f"<image>{line}", "<image>")), parts=shape != "minicpm", mark=mark)
            for each in sample.messages
        ]
        text = tokenizer.apply_chat_template(given, chat_template=template, tokenize=False)
        if shape == "llava":  # the end mark is put where the template writes a space
            for answer in (each.content for each in sample.messages if each.role == "assistant"):
                text = text.replace(f"ASSISTANT: {answer} ", f"ASSISTANT: {answer}</s>")
        assert ids == expected_ids(tokenizer, text, mark, spans, token)
    (tmp_path / "saved").mkdir()
    processor.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_an_export_of_an_earlier_version_is_ours(tiny: Made, tmp_path: Path) -> None:
    """It is not used, as it drops system messages; a checkpoint that starts from it gets the present one."""
    template, mark = tiny.spec.model.template, MARKS.get(tiny.name, tiny.spec.model.image_token)
    before, _, after = template.user.partition("{content}")
    values = {
        "image_mark": mark,
        "user_before": before,
        "user_after": after,
        "open": template.assistant_open,
        "close": template.end_mark + template.separator,
        "prompt": template.assistant_open.rstrip(" "),
    }
    system = "{{- " + json.dumps(template.system) + " -}}\n" if template.system else ""
    text = "".join(f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}\n".replace('"', "'") for key, value in values.items())
    folder = copy_with(tiny, tmp_path / "old", text + EARLIER + system + EARLIER_TURNS)
    processor = reopen(tiny, folder, "auto")
    assert isinstance(processor.template, Template) and "which the checkpoint was saved with" in processor.notes[0]
    processor.save(folder)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == chat_template(template, mark)


@pytest.mark.parametrize("choice", ["auto", "conf", ""])
def test_our_own_export_gives_the_ids_of_before(tiny: Made, samples: tuple[Sample, ...], choice: str) -> None:
    processor = reopen(tiny, tiny.folder, choice)
    for sample in samples:
        assert encode_sample(sample, processor, tiny)[:2] == encode_sample(sample, tiny.processor, tiny)[:2]


def test_a_checkpoint_without_a_template(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    made = make_tiny("tiny_qwen2_5_vl")
    folder = copy_with(made, tmp_path / "bare", None)
    assert isinstance(reopen(made, folder, "auto").template, Template)
    with pytest.raises(InputRefused, match=r"has no chat template\n.*model\.chat_template=conf"):
        reopen(made, folder, "checkpoint")


def test_a_template_that_cannot_be_used_is_refused_with_a_way_out(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    made = make_tiny("tiny_qwen2_5_vl")
    folder = copy_with(made, tmp_path / "bad", "{{ nothing() }}")
    with pytest.raises(InputRefused, match=r"chat_template\.jinja: .* 'nothing' is undefined\n.*model\.chat_template=conf"):
        reopen(made, folder, "auto")
    assert reopen(made, folder, "conf").template == made.spec.model.template


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "video"}]}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        ],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}, {"role": "system", "content": "late"}],
    ],
)
def test_the_exported_template_drops_nothing(tiny: Made, messages: list[dict[str, Any]]) -> None:
    tokenizer = tiny.processor.tokenizer
    text = chat_template(tiny.spec.model.template, "<image>")
    with pytest.raises(Exception, match="This chat template"):  # jinja2's TemplateError
        tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
    with pytest.raises(Exception, match="does not support tools"):
        tokenizer.apply_chat_template(messages[:1], chat_template=text, tools=[{"type": "function"}], tokenize=False)
    link = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Hi"}]}]
    assert "<image>Hi" in tokenizer.apply_chat_template(link, chat_template=text, tokenize=False)


def test_the_check_counts_and_reports_with_that_template(
    make_tiny: Callable[[str], Made], samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    made = make_tiny("tiny_qwen2_5_vl")
    folder = copy_with(made, tmp_path / "own", read_shape("qwen3"))
    processor = reopen(made, folder, "auto")
    late = replace(talk(("a", "b"), row=9), messages=(*talk(("a", "b")).messages, SYSTEM, *talk(("c", "d")).messages))
    tally = LengthTally(replace(made.spec, model=replace(made.spec.model, chat_template="auto")), processor)
    tally.add((*samples[:2], late, samples[2]), read_size)
    found = tally.lengths()
    encoded = [encode_sample(sample, processor, made) for sample in samples]
    assert list(found.tokens) == [len(ids) for ids, _, _ in encoded]
    assert found.trained == sum(label != IGNORED for _, labels, _ in encoded for label in labels)
    (problem,) = found.problems
    assert (problem.row, problem.fix) == (9, USE_CONF) and "The system message comes first" in problem.problem


def test_every_tiny_family_is_here() -> None:
    assert len(TINY) == 8
    assert talk(("a", "b")).messages[0].role == "user"
