"""Conversations with images: one record, whatever shape a row had (trainer.data.rows.shape).

A bad row is reported and left out; it never stops the reading and never turns into another row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.data.rows.annotation import read_rows
from trainer.data.rows.parsed_row import MARK, Complain, ImageReference, ParsedRow, Role, Row, Turn, kind, printable
from trainer.data.rows.shape import USUAL, read_row_shape
from trainer.data.rows.source import AnnotationSource, find_sources

__all__ = ["MARK", "Message", "Role", "Sample", "read_samples"]

OTHER_MEDIA = ("only images are read; training would ignore it", "leave the row out, or give frames of it as images")
PREFERENCE = ("preferences are not trained on", "give one answer for each question")
# Keys that would change what is trained on, and that nothing here reads.
UNREAD = {
    "video": OTHER_MEDIA,
    "videos": OTHER_MEDIA,
    "audio": OTHER_MEDIA,
    "audios": OTHER_MEDIA,
    "tools": ("tools are not read; training would ignore them", "write them into the system message, as the model's template does"),
    "chosen": PREFERENCE,
    "rejected": PREFERENCE,
    "rejected_response": PREFERENCE,
    "chat_template_kwargs": ("settings of a single row are not read", "take them out, and set the size of images for all: data.max_pixels"),
}
GROUNDING = ("<bbox>", "<ref-object>")  # ms-swift puts the row's `objects` in their place


@dataclass(frozen=True, kw_only=True)
class Message:
    """`in_loss`: whether an answer is learned, or only read."""

    role: Role
    content: str
    in_loss: bool = True


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation. `<image>` stands once in the user's messages for each of `images`, in their order. `row` counts from 1; `part`,
    from 0, tells the conversations of a row apart that holds several. `accepted`: answers to its last question, any of which is right, where
    the row lists them; the last message is the one that is learned."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    file: str
    row: int
    part: int = 0
    accepted: tuple[str, ...] = ()


def read_samples(file: Path, images: Path) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The whole samples of an annotation file (or of those that a meta file lists) and all problems of the others. Relative image paths
    are looked up below `images`."""
    sources, found = find_sources(file, images)
    samples: list[Sample] = []
    problems = list(found)
    for source in sources:
        read, wrong = read_source(source)
        samples += repeat(read, source.repeat)
        problems += wrong
    return tuple(samples), tuple(problems)


def read_source(source: AnnotationSource) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    rows, file_problems = read_rows(source.file)
    samples: list[Sample] = []
    problems = list(file_problems)
    for number, row in rows:
        for part, name, item in split_row(row):
            sample, found = read_row(item, number, source, part=part, prefix=name)
            problems += found
            if sample:
                samples.append(sample)
    return tuple(samples), tuple(problems)


def repeat(samples: tuple[Sample, ...], times: float) -> tuple[Sample, ...]:
    return samples[: int(len(samples) * times)] if times < 1 else samples * int(times)


def split_row(row: Any) -> Iterator[tuple[int, str, Any]]:
    """(part, field, row): the conversations of a list are samples of their own (Qwen2.5-VL's script puts those of a list into one
    sequence; here data.packing does that)."""
    if not isinstance(row, list) or not row:
        yield 0, "", row
        return
    for part, item in enumerate(row):
        yield part, f"[{part}]", item


def read_row(row: Any, number: int, source: AnnotationSource, *, part: int = 0, prefix: str = "") -> tuple[Sample | None, list[DataProblem]]:
    """The sample, or None and every problem that can be seen without decoding an image."""
    problems: list[DataProblem] = []

    def complain(field: str, problem: str, fix: str) -> None:
        place = f"{prefix}.{field}" if prefix and field else prefix or field
        problems.append(
            DataProblem(file=str(source.file), row=number, field=printable(place), problem=printable(problem), fix=printable(fix))
        )

    if not isinstance(row, dict):
        complain("", f"is {kind(row)}, not an object", f"write a row as {USUAL}")
        return None, problems
    if source.columns is not None:
        row, complain = source.columns.rename(row), source.columns.complain_in_theirs(complain)
    refuse_unread(row, complain)
    draft = read_row_shape(row, complain)
    if draft is not None:
        check_draft(draft, row, source.images, complain)
    if problems or draft is None or draft.turns is None:
        return None, problems
    identity = number if row.get("id") is None else row["id"]
    return Sample(
        id=str(identity),
        images=tuple(source.images / path_text(picture.name) for picture in draft.pictures),
        messages=tuple(Message(role=turn.role, content=turn.content, in_loss=turn.in_loss) for turn in draft.turns),
        file=str(source.file),
        row=number,
        part=part,
        accepted=read_accepted(row),
    ), problems


def read_accepted(row: Row) -> tuple[str, ...]:
    """`answers`, as DocVQA and TextVQA have them beside the question: a list of texts. Any other shape of that key is somebody's own."""
    answers = row.get("answers")
    texts = isinstance(answers, list) and all(isinstance(answer, str) and answer.strip() for answer in answers)
    return tuple(dict.fromkeys(answers)) if texts and answers else ()


def refuse_unread(row: Row, complain: Complain) -> None:
    for key in sorted(UNREAD.keys() & row.keys()):
        if row[key]:
            complain(key, *UNREAD[key])


def check_draft(draft: ParsedRow, row: Row, folder: Path, complain: Complain) -> None:
    for picture in draft.pictures:
        check_path(picture, folder, complain)
    if draft.turns is None:
        return
    for turn in draft.turns:
        check_text(turn, complain)
        if row.get("objects") and any(mark in turn.content for mark in GROUNDING):
            complain(turn.text_field, "marks of ms-swift's objects are not filled in", "write the boxes as the model writes them")
    check_order(draft, complain)
    check_marks(draft, complain)


# ---------------------------------------------------------------------------------------------------------------- messages


def check_text(turn: Turn, complain: Complain) -> None:
    if not turn.content or turn.content.isspace():
        what = "answer" if turn.role == "assistant" else f"{turn.role} message"
        complain(turn.text_field, f"empty {what}", "write its text, or leave the row out")
    if MARK in turn.content and turn.role != "user":
        what = "an answer" if turn.role == "assistant" else "a system message"
        complain(turn.text_field, f"{MARK} mark in {what}", f"only questions may hold {MARK}")
    try:
        turn.content.encode()
    except UnicodeEncodeError:
        complain(turn.text_field, "half of a surrogate pair, which is no character", "write the text again from its source")


def check_order(draft: ParsedRow, complain: Complain) -> None:
    """[system] then user and assistant in turn, ending with an answer; one of the answers at least is learned."""
    turns = [turn for place, turn in enumerate(draft.turns or ()) if turn.role != "system" or place > 0]
    previous: Role = "assistant"
    for place, turn in enumerate(turns):
        if turn.role == "system":
            complain(turn.field, "system message after the first place", "a conversation has one system message, at its head")
            continue
        if turn.role == previous:
            again = f"two {turn.role} messages in a row" if place else "starts with an answer"
            complain(turn.field, again, "let questions and answers alternate, a question first")
        previous = turn.role
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        complain(draft.field, "conversation without an answer", 'add the answer as the last message ("gpt" or "assistant")')
    elif turns[-1].role == "user":
        complain(turns[-1].field, "conversation ends with a question", "add its answer, or drop the question")
    elif not any(turn.in_loss for turn in answers):
        complain(
            draft.field, "all answers have loss: false, so that nothing would be learned", "leave the row out, or take out one of them"
        )


# -------------------------------------------------------------------------------------------------------------------- images


def check_path(picture: ImageReference, folder: Path, complain: Complain) -> None:
    name = picture.name
    if not isinstance(name, str) or not name:
        said = "is an empty path" if name == "" else f"is {kind(name)}, not a path"
        complain(picture.field, said, "give the image's path as a string")
    elif name.startswith(("http://", "https://", "data:")):
        complain(picture.field, f"{name[:60]!r} is not a file; a run reads no network", "save the image as a file and give its path")
    elif not is_file(folder / path_text(name)):
        said = f"no image file at {folder / path_text(name)}"
        complain(picture.field, said, f"put it there, or set data.images (now {folder}) to where it is")


def path_text(name: str) -> str:
    return name.removeprefix("file://")


def check_marks(draft: ParsedRow, complain: Complain) -> None:
    questions = [turn for turn in draft.turns or () if turn.role == "user"]
    marks, images = sum(turn.content.count(MARK) for turn in questions), len(draft.pictures)
    if marks == images:
        return
    marked = next((turn for turn in questions if MARK in turn.content), questions[0] if questions else None)
    problem = f"too {'few' if marks < images else 'many'} {MARK} marks: {marks} in the questions for {plural(images, 'image')}"
    complain(marked.field if marked else draft.field, problem, f"write {MARK} once for each image, where it stands in the question")


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, a folder without permission: not a file that can be read
        return False


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
