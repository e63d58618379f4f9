"""A conversation that the checkpoint's own chat template has written, divided into segments inside and outside the loss.

An answer begins where the template ends when it asks for it, and ends with the end mark. Where the texts of the messages are is found by writing the
conversation once more with private characters around each of them: three renderings, however many messages. A template that looks into the texts may
write them otherwise then; each answer is found by writing the conversation up to it.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.contract import DataProblem, InputRefused
from trainer.data.chat.checkpoint_template import CheckpointTemplate, shared_start, write
from trainer.data.chat.sandbox import BEGIN, END, TemplateRefused
from trainer.data.chat.segment import Segment
from trainer.data.rows.sample import MARK, Message, Sample

FIRST, LAST = "\U000f0212", "\U000f0213"  # around the text of a message
PRIVATE, MARKS = re.compile(f"[{FIRST}{LAST}]"), re.compile(f"[{BEGIN}{END}]")
THOUGHT = "</think>"
USE_CONF = "reword or remove the row, or set model.chat_template=conf, which writes conversations with model.template"
Span = tuple[int, int]  # in characters of the text


@dataclass(frozen=True, kw_only=True)
class Divided:
    """`answers`: where each answer is in the text, from where the template asks for it to behind its end mark. `trained`: (start, end, which answer) of
    what may be in the loss; the same, or what `{% generation %}` encloses."""

    text: str
    answers: list[Span]
    trained: list[tuple[int, int, int]]


def cut_checkpoint(sample: Sample, template: CheckpointTemplate) -> tuple[Segment, ...]:
    """As `trainer.data.chat.segment.cut`. Raises InputRefused with file and row."""
    divided = divide_or_refuse(sample, template)
    return make_segments(sample, template, divided.text, divided.answers, divided.trained)


def cut_prompt_of_checkpoint(sample: Sample, template: CheckpointTemplate) -> tuple[Segment, ...]:
    """The segments before the last answer, as in training. Raises InputRefused."""
    divided = divide_or_refuse(sample, template)
    last = len(divided.answers) - 1
    before = [span for span in divided.trained if span[2] < last]
    return make_segments(sample, template, divided.text[: divided.answers[last][0]], divided.answers[:last], before)


def divide_or_refuse(sample: Sample, template: CheckpointTemplate) -> Divided:
    try:
        return divide(sample, template)
    except TemplateRefused as error:
        raise InputRefused(str(as_problem(sample, template, error))) from error


def as_problem(sample: Sample, template: CheckpointTemplate, error: TemplateRefused) -> DataProblem:
    problem = f"the chat template of the checkpoint{f' ({template.path})' if template.path else ''} {error}"
    return DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=USE_CONF)


def cut_or_problem(sample: Sample, template: CheckpointTemplate) -> tuple[Segment, ...] | DataProblem:
    """As `cut_checkpoint`, with the problem of a conversation that the template cannot express."""
    try:
        divided = divide(sample, template)
    except TemplateRefused as error:
        return as_problem(sample, template, error)
    return make_segments(sample, template, divided.text, divided.answers, divided.trained)


def divide(sample: Sample, template: CheckpointTemplate) -> Divided:
    refuse_unwritten(sample, template)
    messages, thinks = sample.messages, bool(sample.messages[-1].reasoning)
    text = write(template, messages, sample.tools, thinks=thinks)
    asked = write(template, messages[:-1], sample.tools, prompt=True, thinks=thinks)
    if not text.startswith(asked):
        raise TemplateRefused(describe_change(text, asked))
    refuse_dropped(sample, template, text)
    starts = [*find_starts(sample, template, text, thinks=thinks), len(asked.rstrip(" "))]
    answers = [(start, find_end(template, text, start, message)) for start, message in zip(starts, answers_of(messages), strict=True)]
    trained = [(start, end, number) for number, (start, end) in enumerate(answers)]
    return Divided(text=text, answers=answers, trained=find_marked(sample, template, text, answers) if template.marked else trained)


def answers_of(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.role == "assistant"]


def describe_change(text: str, asked: str) -> str:
    """`text` does not start with `asked`."""
    same = len(shared_start(text, asked))
    there, here = text[same : same + 30], asked[same : same + 30]
    return (
        f"depends on what comes after a message: asked for the last answer it writes {here!r} where the whole conversation has {there!r}, so that the "
        "model would be asked otherwise than it was trained"
    )


# ------------------------------------------------------------------------------------------------------- what is written


def refuse_unwritten(sample: Sample, template: CheckpointTemplate) -> None:
    """Raises TemplateRefused for what the template leaves out of every conversation."""
    messages = sample.messages
    wanted = {
        "system": (messages[0].role == "system" and bool(messages[0].content), "system messages"),
        "tools": (bool(sample.tools), "tools"),
        "calls": (any(message.calls for message in messages), "calls of tools"),
        "tool": (any(message.role == "tool" for message in messages), "results of tools"),
        "reasoning": (any(message.reasoning for message in messages), "the reasoning of an answer"),
    }
    lost = [what for name, (found, what) in wanted.items() if found and name not in template.renders]
    if lost:
        raise TemplateRefused(f"leaves out {' and '.join(lost)}")
    token = template.image_token
    if token != MARK and any(token in message.content for message in messages):
        raise TemplateRefused(f"would read {token!r} in a message as an image: it is the image token of the model")


def refuse_dropped(sample: Sample, template: CheckpointTemplate, text: str) -> None:
    """Raises TemplateRefused if the text of a message is not in that of the conversation. Thoughts that were written into an answer may be left out."""
    for number, message in enumerate(sample.messages, start=1):
        said = message.content.rpartition(THOUGHT)[2] if message.role == "assistant" else message.content
        for piece in said.split(MARK) if message.role == "user" else (said,):
            if piece.strip() not in text:
                raise TemplateRefused(f"leaves out or changes the text of message {number} ({message.role})")


# ------------------------------------------------------------------------------------------------------ where answers are


def find_starts(sample: Sample, template: CheckpointTemplate, text: str, *, thinks: bool) -> list[int]:
    """Of all answers but the last one."""
    if len(answers_of(sample.messages)) == 1:
        return []
    marked = write(template, tuple(map(enclose, sample.messages)), sample.tools, thinks=thinks)
    if PRIVATE.sub("", marked) != text:
        return list(starts_by_prefix(sample, template, text))
    return list(starts_by_place(sample, template, text, iter(places_of(marked))))


def enclose(message: Message) -> Message:
    return replace(message, content=f"{FIRST}{message.content}{LAST}") if message.content else message


def places_of(marked: str) -> list[Span]:
    """Where the text of each message is in `marked` without the private characters."""
    found = [match.start() - number for number, match in enumerate(PRIVATE.finditer(marked))]
    return list(zip(found[::2], found[1::2], strict=True))


def starts_by_place(sample: Sample, template: CheckpointTemplate, text: str, places: Iterator[Span]) -> Iterator[int]:
    """An answer starts behind the first opening between the text of the message before it and its own."""
    low = 0
    for message in sample.messages[:-1]:
        begin, end = next(places) if message.content else (len(text), low)
        if message.role == "assistant":
            found = [(text.find(opening, low, begin), -len(opening)) for opening in template.openings]
            place, length = min((each for each in found if each[0] >= 0), default=(-1, 0))
            if place < 0:
                raise TemplateRefused("begins an earlier answer in another way than it asks for one")
            low = place - length
            yield len(text[:low].rstrip(" "))
        low = max(low, end)


def starts_by_prefix(sample: Sample, template: CheckpointTemplate, text: str) -> Iterator[int]:
    for number, message in enumerate(sample.messages[:-1]):
        if message.role == "assistant":
            asked = write(template, sample.messages[:number], sample.tools, prompt=True, thinks=bool(message.reasoning))
            if not text.startswith(asked):
                raise TemplateRefused(describe_change(text, asked))
            yield len(asked.rstrip(" "))


def find_end(template: CheckpointTemplate, text: str, start: int, message: Message) -> int:
    """Behind the end mark of an answer; behind its text where the template writes none."""
    said = message.content.rpartition(THOUGHT)[2].strip()
    place = text.find(said, start)
    behind = max(start, place + len(said))
    if template.end_added:
        return behind
    end = text.find(template.end_mark, behind)
    return end + len(template.end_mark) if end >= 0 else len(text.rstrip())


def find_marked(sample: Sample, template: CheckpointTemplate, text: str, answers: list[Span]) -> list[tuple[int, int, int]]:
    """What `{% generation %}` encloses, as spans of answers. Spaces before it are part of it, as the model is asked without them."""
    marked = write(template, sample.messages, sample.tools, marks=True, thinks=bool(sample.messages[-1].reasoning))
    if MARKS.sub("", marked) != text:
        raise TemplateRefused("writes a conversation otherwise with {% generation %} than without")
    found = [match.start() - number for number, match in enumerate(MARKS.finditer(marked))]
    starts, spans = [start for start, _ in answers], []
    for begin, end in zip(found[::2], found[1::2], strict=True):
        number = max(0, bisect_right(starts, end - 1) - 1)
        first, behind = answers[number]
        begin = max(first, len(text[:begin].rstrip(" ")))
        spans.append((begin, min(end, behind) if template.end_added else end, number))
    return [span for span in spans if span[0] < span[1]]


# --------------------------------------------------------------------------------------------------------------- segments


def make_segments(
    sample: Sample, template: CheckpointTemplate, text: str, answers: Sequence[Span], trained: Iterable[tuple[int, int, int]]
) -> tuple[Segment, ...]:
    """Alternately masked and in the loss. Where the template writes no end mark, it takes the place of the spaces behind an answer, as in LLaVA's own
    code (haotian-liu/LLaVA, conversation.py, SeparatorStyle.TWO)."""
    wanted = [message.in_loss for message in answers_of(sample.messages)]
    segments: list[Segment] = []

    def add(piece: str, in_loss: bool) -> None:
        if segments and segments[-1].in_loss == in_loss:
            piece = segments.pop().text + piece
        if piece:
            segments.append(Segment(text=piece, in_loss=in_loss))

    place = 0
    for begin, end, number in trained:
        closes = template.end_added and end == answers[number][1]
        add(text[place:begin], False)
        add(text[begin:end] + (template.end_mark if closes else ""), wanted[number])
        place = end + (len(text[end:]) - len(text[end:].lstrip()) if closes else 0)
    add(text[place:], False)
    return tuple(segments)
