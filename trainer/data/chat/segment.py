"""A conversation as the text that the model reads, divided into segments inside and outside the loss."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.contract import DataProblem, InputRefused, Template
from trainer.data.rows.sample import MARK, Message, Sample

CONTENT = "{content}"
OTHER_TEMPLATE = "start from a checkpoint whose own chat template has them (model.source.path=FOLDER model.chat_template=checkpoint)"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`in_loss`: an answer that is trained on, with its end mark. Everything else is masked."""

    text: str
    in_loss: bool


def cut(sample: Sample, template: Template, image_token: str) -> tuple[Segment, ...]:
    """The segments of a conversation, alternately masked and in the loss; concatenated they are its whole text.

    Each image mark becomes one `image_token`. Spaces at the end of `assistant_open` are moved to the answer: byte-pair tokenizers merge a
    space with the word after it, so a prompt that ends in a space would not occur in training. Raises InputRefused for a conversation
    that the template cannot express.
    """
    for problem in find_template_problems(sample, template, image_token):
        raise InputRefused(str(problem))
    merged: list[Segment] = []
    for segment in frame(sample.messages, template, image_token):
        if merged and not merged[-1].in_loss and not segment.in_loss:
            segment = Segment(text=merged.pop().text + segment.text, in_loss=False)
        if segment.text:
            merged.append(segment)
    return tuple(merged)


def frame(messages: tuple[Message, ...], template: Template, image_token: str) -> Iterator[Segment]:
    opening = template.assistant_open.rstrip(" ")
    spaces = template.assistant_open[len(opening) :]
    if CONTENT not in template.system and messages[0].role != "system":
        yield Segment(text=template.system, in_loss=False)
    for message in messages:
        if message.role == "system":
            # An empty one stands for no system message at all (data.system=none).
            yield Segment(text=message.content and frame_of_system(template).replace(CONTENT, message.content), in_loss=False)
        elif message.role in ("user", "tool"):
            content = message.content.replace(MARK, image_token)
            yield Segment(text=(template.user if message.role == "user" else template.tool).replace(CONTENT, content), in_loss=False)
        else:
            thought = message.reasoning and template.reasoning.replace(CONTENT, message.reasoning)
            yield Segment(text=opening, in_loss=False)
            yield Segment(text=spaces + thought + message.content + template.end_mark, in_loss=message.in_loss)
            yield Segment(text=template.separator, in_loss=False)


def frame_of_system(template: Template) -> str:
    """What a system message is put into; '' if the template has no place for one."""
    return template.system_frame or (template.system if CONTENT in template.system else "")


def find_template_problems(sample: Sample, template: Template, image_token: str) -> tuple[DataProblem, ...]:
    """Messages that the template or the image token of the model cannot express. Needs no tokenizer."""
    problems: list[DataProblem] = []

    def add_problem(problem: str, fix: str) -> None:
        problems.append(DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix))

    for found, what, fix in find_unframed(sample, template):
        if found:
            add_problem(f"the chat template of the model does not support {what}", fix)
    if image_token != MARK and any(image_token in message.content for message in sample.messages):
        add_problem(f"a message contains {image_token!r}, the image token of the model", f"write {MARK} for an image, or reword the text")
    return tuple(problems)


def find_unframed(sample: Sample, template: Template) -> Iterator[tuple[bool, str, str]]:
    """(whether the sample has it, what, fix) of all that the template has no frame for."""
    roles = {message.role for message in sample.messages}
    # A text that the template has no place for is refused only where the row has it: data.system=default leaves it out.
    own = sample.messages[0].role == "system" and sample.messages[0].content != ""
    if not frame_of_system(template):
        yield own, "a system message", "move its text into the first question, or set data.system=default, which leaves it out"
    yield bool(sample.tools), "tools", OTHER_TEMPLATE
    yield any(message.calls for message in sample.messages), "calls of tools", OTHER_TEMPLATE
    if not template.tool:
        yield "tool" in roles, "the result of a tool", OTHER_TEMPLATE
    if not template.reasoning:
        reasoned = any(message.reasoning for message in sample.messages)
        yield reasoned, "the reasoning of an answer", f"remove it from the row, or {OTHER_TEMPLATE}"
