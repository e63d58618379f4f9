from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.data.conftest import CHATML, VICUNA
from trainer.contract import InputRefused
from trainer.data.chat.segment import cut, find_template_problems
from trainer.data.rows.parsed_row import ToolCall
from trainer.data.rows.sample import Message, Sample

SYSTEM = Message(role="system", content="Be brief.")
TURNS = (
    Message(role="user", content="<image>\nWhat?"),
    Message(role="assistant", content="A cat."),
    Message(role="user", content="Sure?"),
    Message(role="assistant", content="Yes."),
)


def sample(*messages: Message) -> Sample:
    return Sample(id="1", images=(Path("a.png"),), messages=messages, file="rows.json", row=3)


def marked(template, image_token: str, *messages: Message) -> str:
    return "".join(f"[{segment.text}]" if segment.in_loss else segment.text for segment in cut(sample(*messages), template, image_token))


def test_vicuna() -> None:
    assert marked(VICUNA, "<image>", *TURNS) == "USER: <image>\nWhat? ASSISTANT:[ A cat.</s>]USER: Sure? ASSISTANT:[ Yes.</s>]"


def test_chatml_with_the_row_s_system_message() -> None:
    assert marked(CHATML, "<|image_pad|>", SYSTEM, *TURNS) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|image_pad|>\nWhat?<|im_end|>\n<|im_start|>assistant\n[A cat.<|im_end|>]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]\n"
    )


def test_without_a_system_message_there_is_no_system_turn() -> None:
    assert marked(CHATML, "<image>", *TURNS[2:]).startswith("<|im_start|>user\nSure?")


def test_a_fixed_system_text_is_always_included() -> None:
    fixed = replace(VICUNA, system="A chat. ")
    assert marked(fixed, "<image>", *TURNS[2:]) == "A chat. USER: Sure? ASSISTANT:[ Yes.</s>]"


def test_braces_in_a_message_are_ordinary_text() -> None:
    braces = Message(role="user", content="{content} {0}")
    assert marked(VICUNA, "<image>", braces, TURNS[3]) == "USER: {content} {0} ASSISTANT:[ Yes.</s>]"


def test_a_message_that_the_template_cannot_express_is_refused() -> None:
    (problem,) = find_template_problems(sample(SYSTEM, *TURNS), VICUNA, "<image>")
    assert "does not support a system message" in problem.problem
    with pytest.raises(InputRefused, match=r"rows.json row 3: the chat template of the model does not support"):
        cut(sample(SYSTEM, *TURNS), VICUNA, "<image>")


def test_the_model_s_own_image_token_in_a_text() -> None:
    confusing = sample(Message(role="user", content="<image> <|image_pad|>"), TURNS[1])
    (problem,) = find_template_problems(confusing, CHATML, "<|image_pad|>")
    assert "'<|image_pad|>', the image token of the model" in problem.problem
    assert find_template_problems(confusing, CHATML, "<image>") == ()


PLACED = replace(CHATML, system="<|im_start|>system\nHelp.<|im_end|>\n", system_frame=CHATML.system)


def test_a_row_s_system_message_takes_the_place_of_the_default_text() -> None:
    for message, text in ((None, "Help."), (SYSTEM, "Be brief.")):
        messages = (*((message,) if message else ()), *TURNS[2:])
        assert marked(PLACED, "<image>", *messages).startswith(f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\nSure?")
    assert marked(PLACED, "<image>", replace(SYSTEM, content=""), *TURNS[2:]).startswith("<|im_start|>user\nSure?")


def test_results_and_reasoning_have_frames_of_their_own() -> None:
    framed = replace(PLACED, tool="<|im_start|>tool\n{content}<|im_end|>\n", reasoning="<think>\n{content}\n</think>\n\n")
    thought = replace(TURNS[3], reasoning="Hm.")
    assert marked(framed, "<image>", TURNS[2], TURNS[1], Message(role="tool", content="42"), thought).endswith(
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n[<think>\nHm.\n</think>\n\nYes.<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        (TURNS, ("{}",), "tools"),
        ((TURNS[0], replace(TURNS[1], calls=(ToolCall(name="f", arguments="{}"),)), *TURNS[2:]), (), "calls of tools"),
        ((*TURNS[:2], Message(role="tool", content="42"), TURNS[3]), (), "the result of a tool"),
        ((*TURNS[:3], replace(TURNS[3], reasoning="Hm.")), (), "the reasoning of an answer"),
    ],
)
def test_what_has_no_frame_is_refused(messages: tuple[Message, ...], tools: tuple[str, ...], what: str) -> None:
    (problem,) = find_template_problems(replace(sample(*messages), tools=tools), PLACED, "<image>")
    assert problem.problem == f"the chat template of the model does not support {what}"
    assert "model.chat_template=checkpoint" in problem.fix
