"""Read annotation files into Samples: conversations with images, independent of the row format (trainer.data.rows.row_format).

An invalid row is reported and left out. It does not stop the reading and is never replaced by another row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from trainer.contract import LINE_FEED, DataProblem, ImageForm
from trainer.contract.annotation_file import count_repeated
from trainer.data.containers.annotation import Position, read_rows, stream_rows
from trainer.data.grounding.objects import Objects, read_objects
from trainer.data.media.store import MediaStore
from trainer.data.rows.adjustment import adjust, report_paths, without_end_mark
from trainer.data.rows.image_path import find_images, path_text
from trainer.data.rows.inline_image import keep_images
from trainer.data.rows.known_key import check_keys, refuse_keys
from trainer.data.rows.parsed_row import MARK, AddProblem, ParsedRow, Role, Row, ToolCall, Turn, kind, printable
from trainer.data.rows.row_check import check_parsed
from trainer.data.rows.row_format import USUAL, find_format, known_keys, parse_row
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.rows.selection import RowSelection
from trainer.data.rows.text_mark import check_texts
from trainer.data.sources.data_set import EMPTY, DataSet, set_of_file
from trainer.data.sources.source import AnnotationSource

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
    read as it was meant (trainer.data.rows.adjustment). `ignored`: keys of the row, its messages and blocks that are not read. `warnings`: what its texts hold
    that may not be meant as text."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    file: str
    row: int
    part: int = 0
    accepted: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    objects: Objects | None = None  # boxes for the marks <bbox> and <ref-object> in its texts
    placed: bool = False  # whether boxes are in the form of the model (trainer.data.grounding.placement)
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
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
    file: Path, images: Path, form: ImageForm = LINE_FEED, store: MediaStore = EMPTY, *, rules: RowRules = DEFAULT
) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The valid samples of an annotation file, or of the files that a meta file lists, and the problems of all other rows. Relative image
    paths start at `images`. `form`: of rows to ask: that of the rows that the model was trained on. `store`: for images that are not files. Raises
    InputRefused where one cannot be kept."""
    return read_set(set_of_file(file, images, rules, store), form)


def read_set(
    found: DataSet, form: ImageForm = LINE_FEED, selection: RowSelection | None = None
) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The same of a data set. `selection`: of its conversations, and problems of those only; None for all, as often as their files are used."""
    samples: list[Sample] = []
    problems = list(found.problems)
    rows: list[Conversation] = []
    for source in found.sources:
        read, wrong = read_source(source, form)
        if selection is None:
            samples += chosen_samples(read, source.repeat)
            problems += wrong
        else:
            rows += read
            problems += (problem for problem in wrong if not problem.row)
    if selection is not None:
        used = [rows[number] for number in selection.rows() if number < len(rows)]  # fewer than were counted in a file that is no JSON
        samples = [each.sample for each in used if each.sample is not None]
        problems += dict.fromkeys(problem for each in used for problem in each.problems)
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
    rows, file_problems = read_rows(source.file, source.store)
    read = tuple(each for number, row in rows for each in read_parts(row, number, source, form))
    unread = [Conversation(row=problem.row, sample=None, problems=(problem,)) for problem in file_problems if problem.row]
    ordered = tuple(sorted((*read, *unread), key=lambda each: each.row)) if unread else read
    return ordered, (*file_problems, *(problem for each in read for problem in each.problems))


def stream_source(source: AnnotationSource, position: Position | None = None) -> Iterator[Conversation]:
    """The conversations of a file, in its order, without the whole file in memory. `position` is kept up to date."""
    for found in stream_rows(source.file, position, source.store):
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
    read = examine_row(row, source, form, add_problem)
    if problems or read is None or read.parsed.turns is None:
        return None, problems
    identity = number if row.get("id") is None else row["id"]
    return Sample(
        id=str(identity),
        images=tuple(source.images / path_text(image.name) for image in read.parsed.images),
        messages=tuple(map(as_message, read.parsed.turns)),
        file=str(source.file),
        row=number,
        part=part,
        accepted=read_accepted(row),
        tools=read.parsed.tools,
        adjustments=read.adjustments,
        objects=read.objects,
        ignored=read.ignored,
        warnings=read.warnings,
    ), problems


@dataclass(frozen=True, kw_only=True)
class ExaminedRow:
    """A row as it was meant. The fields are those of Sample."""

    parsed: ParsedRow
    adjustments: tuple[str, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    objects: Objects | None


def examine_row(row: Row, source: AnnotationSource, form: ImageForm, add_problem: AddProblem) -> ExaminedRow | None:
    """None for a row that cannot be parsed, or has the paths of its images in its texts."""
    refuse_keys(row, add_problem)
    row_format, folders = find_format(row, add_problem), (source.images, source.file.parent)
    parsed = parse_row(row, row_format, source.rules, add_problem)
    if parsed is None:
        return None
    kept = keep_images(parsed.images, source.images, source.store, add_problem)
    parsed = parsed if kept == parsed.images else replace(parsed, images=kept)
    if report_paths(parsed, row, folders, add_problem):
        return None
    ignored = check_keys(row, known_keys(row_format), parsed, folders, add_problem)
    parsed, adjustments = adjust(parsed, form, source.rules)
    parsed, renamed = find_images(parsed, source.images)
    check_parsed(parsed, row, source.images, add_problem)
    warnings = check_texts(parsed, row, folders, add_problem)
    objects = read_objects(row, parsed, add_problem)
    return ExaminedRow(parsed=parsed, adjustments=(*adjustments, *renamed), ignored=ignored, warnings=warnings, objects=objects)


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
