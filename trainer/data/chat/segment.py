"""A conversation as the text that the model reads, divided into segments inside and outside the loss."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.contract import DataProblem, InputRefused, Template
from trainer.data.rows.sample import MARK, Message, Sample

CONTENT = "{content}"


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
    if CONTENT not in template.system:
        yield Segment(text=template.system, in_loss=False)
    for message in messages:
        if message.role == "system":
            yield Segment(text=template.system.replace(CONTENT, message.content), in_loss=False)
        elif message.role == "user":
            content = message.content.replace(MARK, image_token)
            yield Segment(text=template.user.replace(CONTENT, content), in_loss=False)
        else:
            yield Segment(text=opening, in_loss=False)
            yield Segment(text=spaces + message.content + template.end_mark, in_loss=message.in_loss)
            yield Segment(text=template.separator, in_loss=False)


def find_template_problems(sample: Sample, template: Template, image_token: str) -> tuple[DataProblem, ...]:
    """Messages that the template or the image token of the model cannot express. Needs no tokenizer."""
    problems: list[DataProblem] = []

    def add_problem(problem: str, fix: str) -> None:
        problems.append(DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix))

    if sample.messages[0].role == "system" and CONTENT not in template.system:
        add_problem("the chat template of the model does not support a system message", "move its text into the first question")
    for part in find_unshown(sample):
        remedy = "set data.reasoning=strip" if part == "reasoning" else "remove them"
        add_problem(f"the chat template of this model has no place for {part}", f"{remedy}, or use a model whose template has one")
    if image_token != MARK and any(image_token in message.content for message in sample.messages):
        add_problem(f"a message contains {image_token!r}, the image token of the model", f"write {MARK} for an image, or reword the text")
    return tuple(problems)


def find_unshown(sample: Sample) -> tuple[str, ...]:
    """What a conversation holds beside its texts."""
    tools = sample.tools or any(message.calls or message.role == "tool" for message in sample.messages)
    found = (("tools", tools), ("reasoning", any(message.reasoning for message in sample.messages)))
    return tuple(name for name, present in found if present)
