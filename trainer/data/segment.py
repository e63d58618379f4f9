"""A conversation as the text that the model reads, cut where training starts and stops."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.contract import DataProblem, InputRefused, Template
from trainer.data.rows.sample import MARK, Message, Sample

CONTENT = "{content}"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`in_loss`: an answer that is learned, with its end mark. Everything else is masked."""

    text: str
    in_loss: bool


def cut(sample: Sample, template: Template, image_token: str) -> tuple[Segment, ...]:
    """The segments of a conversation, masked and trained ones in turn; joined they are its whole text.

    Each image mark becomes one `image_token`. Blanks at the end of `assistant_open` go to the answer: byte-pair tokenizers make one
    token of a blank and the word behind it, and a prompt that ends in a lone blank is something the model never saw in training.
    Raises InputRefused for what the template cannot express.
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
    blanks = template.assistant_open[len(opening) :]
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
            yield Segment(text=blanks + message.content + template.end_mark, in_loss=message.in_loss)
            yield Segment(text=template.separator, in_loss=False)


def find_template_problems(sample: Sample, template: Template, image_token: str) -> tuple[DataProblem, ...]:
    """What a model's template or image token cannot express, seen without its tokenizer."""
    problems: list[DataProblem] = []

    def complain(problem: str, fix: str) -> None:
        problems.append(DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix))

    if sample.messages[0].role == "system" and CONTENT not in template.system:
        complain("the model's chat template has no place for a system message", "write its text into the first question")
    if image_token != MARK and any(image_token in message.content for message in sample.messages):
        complain(f"a message holds {image_token!r}, which the model reads as part of an image", f"write {MARK} for an image, or reword")
    return tuple(problems)
