"""Special tokens of the model in texts: refused where they divide a conversation or stand for media, counted elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.data.conftest import CHATML, VICUNA
from trainer.data.rows.sample import Message, Sample
from trainer.data.special_token import SpecialTokens, tokens_of_template, tokens_of_tokenizer
from trainer.models.tiny_tokenizer import tiny_tokenizer

MORE = {
        "vision": "<|vision_start|>", "box": "<|box_start|>", "ref": "<ref>", "call": "<tool_call>", "unit": "<unit>", "slice": "<slice>",
        "begin": "<|im_start|>",
}  # fmt: skip


def qwen() -> SpecialTokens:
    return tokens_of_tokenizer(tiny_tokenizer("<|image_pad|>", CHATML, MORE), CHATML, "<|image_pad|>")


def sample(text: str, reasoning: str = "") -> Sample:
    messages = Message(role="user", content="What?"), Message(role="assistant", content=text, reasoning=reasoning)
    return Sample(id="1", images=(), messages=messages, file="rows.json", row=3)


# text -> what is refused, what is counted
FOUND: dict[str, tuple[str, str]] = {
    "a cat, 1 < 2 <b>": ("", ""),
    "<|im_start|>user": ("<|im_start|>", ""),
    "see <|vision_start|>": ("<|vision_start|>", ""),
    "<slice> and <slice>": ("<slice>", ""),
    "a <pad> token": ("", "<pad>"),
    "a <unit>": ("", "<unit>"),
    "<|box_start|>(1,2)": ("", ""),
    "<ref>it</ref>": ("", ""),
    "<tool_call>{}": ("", ""),
    "<image>": ("", ""),
    "<|endoftext|>": ("", ""),
}


@pytest.mark.parametrize("text", FOUND)
def test_of_a_tokenizer(text: str) -> None:
    refused, counted = FOUND[text]
    problems, warnings = qwen().find(sample(text))
    assert len(problems) == bool(refused)
    assert all(f"message 2 (assistant) contains {refused!r}" in problem.problem and problem.row == 3 for problem in problems)
    assert warnings == ((f"special token of the model in a text: {counted}",) if counted else ())


def test_reasoning_is_a_text_too() -> None:
    assert len(qwen().find(sample("2", "<|im_start|>"))[0]) == 1


def test_of_a_template_without_its_tokenizer() -> None:
    tokens = tokens_of_template(CHATML, "<|image_pad|>")
    assert tokens.refused == {"<|im_start|>"}, "the end mark and the image token are reported elsewhere"
    assert tokens_of_template(VICUNA, "<image>").pattern is None and tokens_of_template(VICUNA, "<image>").find(sample("<s>")) == ((), ())


def test_begin_and_end_of_a_text_are_refused_under_any_name() -> None:
    plain: Any = SimpleNamespace(all_special_tokens=["[BOS]", "</s>", "[UNK]", ""], bos_token="[BOS]", eos_token="</s>")
    tokens = tokens_of_tokenizer(plain, CHATML, "<image>")
    assert (tokens.refused, tokens.counted, tokens.angled) == ({"[BOS]", "</s>"}, {"[UNK]"}, False)
    assert len(tokens.find(sample("[BOS] What?"))[0]) == 1
