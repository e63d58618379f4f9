"""Read annotation files into Samples: conversations with images, independent of the row format (trainer.data.rows.row_format).

An invalid row is reported and left out. It does not stop the reading and is never replaced by another row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.contract import LINE_FEED, DataProblem, ImageForm
from trainer.contract.annotation_file import count_repeated
from trainer.data.containers.annotation import Position, read_rows, stream_rows
from trainer.data.rows.adjustment import adjust, report_paths, without_end_mark
from trainer.data.rows.parsed_row import MARK, AddProblem, Role, Row, ToolCall, Turn, kind, printable
from trainer.data.rows.row_check import check_parsed, path_text, refuse_unread
from trainer.data.rows.row_format import USUAL, parse_row
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.sources.source import AnnotationSource, find_sources

__all__ = ["MARK", "Message", "Role", "Sample", "Samples", "read_samples"]

MOST_ASKED = 10_000  # enough for a form that most questions have; of a large file each is read from the disk


@dataclass(frozen=True, kw_only=True)
class Message:
    """`in_loss`: whether an answer is trained on, or only context. `reasoning`: what an answer thinks before its content. `calls`: the tools that
    an answer calls; the results are messages of the role `tool` after it."""

    role: Role
    content: str
    in_loss: bool = True
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation. The user's messages have one `<image>` for each of `images`, in order. `row` counts from 1. `part`, from 0: the
    conversation in a row with several. `accepted`: further correct answers to the last question, if the row lists them; the last message is
    the one that is trained on. `tools`: the JSON of each tool that the assistant may call. `adjustments`: what was changed so that the row is
    read as it was meant (trainer.data.rows.adjustment)."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    file: str
    row: int
    part: int = 0
    accepted: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    draw: str = ""  # what its random numbers depend on; '' = nothing is random about it


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation of row `row`: its sample, or None and its problems. Row 0: a problem of the whole file."""

    row: int
    sample: Sample | None
    problems: tuple[DataProblem, ...]


class Samples(Protocol):
    """Samples by number, from 0: a tuple, or `trainer.data.rows.indexed_samples.IndexedSamples`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sample: ...


def read_samples(
    file: Path, images: Path, form: ImageForm = LINE_FEED, rules: RowRules = DEFAULT
) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The valid samples of an annotation file, or of the files that a meta file lists, and the problems of all other rows. Relative image
    paths start at `images`. `form`: of rows to ask: that of the rows that the model was trained on."""
    sources, found = find_sources(file, images, rules)
    samples: list[Sample] = []
    problems = list(found)
    for source in sources:
        read, wrong = read_source(source, form)
        samples += chosen_samples(read, source.repeat)
        problems += wrong
    return tuple(samples), tuple(problems)


def chosen_samples(read: Sequence[Conversation], repeat: float) -> list[Sample]:
    """The valid ones, as often as they are used. A part of a file is the first part of its conversations, valid or not: leaving out one that is not
    valid brings no other one in."""
    used = read[: count_repeated(len(read), repeat)] if repeat < 1 else read
    return [each.sample for each in used if each.sample is not None] * max(1, int(repeat))


def questions_of(samples: Samples) -> Iterator[str]:
    """Of at most MOST_ASKED samples, evenly spread."""
    step = max(1, -(-len(samples) // MOST_ASKED))
    chosen = (samples[number] for number in range(0, len(samples), step))
    return (message.content for sample in chosen for message in sample.messages if message.role == "user")


def read_source(source: AnnotationSource, form: ImageForm) -> tuple[tuple[Conversation, ...], tuple[DataProblem, ...]]:
    """Of a file that is not JSON there is no conversation."""
    rows, file_problems = read_rows(source.file)
    read = tuple(each for number, row in rows for each in read_parts(row, number, source, form))
    unread = [Conversation(row=problem.row, sample=None, problems=()) for problem in file_problems if problem.row]
    ordered = tuple(sorted((*read, *unread), key=lambda each: each.row)) if unread else read
    return ordered, (*file_problems, *(problem for each in read for problem in each.problems))


def stream_source(source: AnnotationSource, position: Position | None = None) -> Iterator[Conversation]:
    """The conversations of a file, in its order, without the whole file in memory. `position` is kept up to date."""
    for found in stream_rows(source.file, position):
        if isinstance(found, DataProblem):
            yield Conversation(row=found.row, sample=None, problems=(found,))
        else:
            yield from read_parts(found[1], found[0], source)


def read_parts(row: Any, number: int, source: AnnotationSource, form: ImageForm = LINE_FEED) -> Iterator[Conversation]:
    for part, name, item in split_row(row):
        sample, problems = read_row(item, number, source, form, part=part, prefix=name)
        yield Conversation(row=number, sample=sample, problems=tuple(problems))


def split_row(row: Any) -> Iterator[tuple[int, str, Any]]:
    """(part, field, row): each conversation of a list is a sample (Qwen2.5-VL's script packs those of a list into one sequence; here
    data.packing does that)."""
    if not isinstance(row, list) or not row:
        yield 0, "", row
        return
    for part, item in enumerate(row):
        yield part, f"[{part}]", item


def read_row(
    row: Any, number: int, source: AnnotationSource, form: ImageForm = LINE_FEED, *, part: int = 0, prefix: str = ""
) -> tuple[Sample | None, list[DataProblem]]:
    """The sample, or None and every problem that can be found without decoding an image."""
    problems: list[DataProblem] = []
    add_problem = collect_problems(problems, source.file, number, prefix)
    if not isinstance(row, dict):
        add_problem("", f"is {kind(row)}, not an object", f"write a row as {USUAL}")
        return None, problems
    if source.columns is not None:
        row, add_problem = source.columns.rename(row), source.columns.with_names_of_the_file(add_problem)
    refuse_unread(row, add_problem)
    parsed, adjustments = parse_row(row, add_problem), ()
    if parsed is not None and not report_paths(parsed, row, (source.images, source.file.parent), add_problem):
        parsed, adjustments = adjust(parsed, form, source.rules)
        check_parsed(parsed, row, source.images, add_problem)
    if problems or parsed is None or parsed.turns is None:
        return None, problems
    identity = number if row.get("id") is None else row["id"]
    return Sample(
        id=str(identity),
        images=tuple(source.images / path_text(image.name) for image in parsed.images),
        messages=tuple(map(as_message, parsed.turns)),
        file=str(source.file),
        row=number,
        part=part,
        accepted=read_accepted(row),
        tools=parsed.tools,
        adjustments=adjustments,
    ), problems


def as_message(turn: Turn) -> Message:
    return Message(role=turn.role, content=turn.content, in_loss=turn.in_loss, reasoning=turn.reasoning, calls=turn.calls)


def collect_problems(problems: list[DataProblem], file: Path, row: int, prefix: str = "") -> AddProblem:
    """A function that appends a problem of `row` to `problems`. `prefix`: the path of the conversation in a row with several."""

    def add_problem(field: str, problem: str, fix: str) -> None:
        path = f"{prefix}.{field}" if prefix and field else prefix or field
        problems.append(DataProblem(file=str(file), row=row, field=printable(path), problem=printable(problem), fix=printable(fix)))

    return add_problem


def read_accepted(row: Row) -> tuple[str, ...]:
    """The key `answers` of DocVQA and TextVQA: a list of texts. Values of another type are ignored."""
    answers = row.get("answers")
    texts = isinstance(answers, list) and all(isinstance(answer, str) and answer.strip() for answer in answers)
    return tuple(dict.fromkeys(map(without_end_mark, answers))) if texts and answers else ()
