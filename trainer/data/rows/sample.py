"""Read annotation files into Samples: conversations with images, independent of the row format (trainer.data.rows.row_format).

An invalid row is reported and left out. It does not stop the reading and is never replaced by another row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

from trainer.contract import LINE_FEED, DataProblem, ImageForm
from trainer.contract.annotation_file import count_repeated
from trainer.contract.wording import plural
from trainer.data.rows.adjustment import adjust, report_paths, without_end_mark
from trainer.data.rows.annotation import Position, read_rows, stream_rows
from trainer.data.rows.parsed_row import MARK, AddProblem, ImageReference, ParsedRow, Role, Row, Turn, kind, printable
from trainer.data.rows.row_format import USUAL, parse_row
from trainer.data.rows.row_images import IMAGE_KEYS
from trainer.data.rows.source import AnnotationSource, find_sources

__all__ = ["MARK", "Message", "Role", "Sample", "Samples", "read_samples"]

OTHER_MEDIA = ("only images are supported", "remove the row, or give frames of it as images")
PREFERENCE = ("preference data is not supported", "give one answer for each question")
# Keys that would change the training, but are not supported.
UNREAD = {
    "video": OTHER_MEDIA,
    "videos": OTHER_MEDIA,
    "audio": OTHER_MEDIA,
    "audios": OTHER_MEDIA,
    "tools": ("tools are not supported", "write them into the system message, as the chat template of the model does"),
    "chosen": PREFERENCE,
    "rejected": PREFERENCE,
    "rejected_response": PREFERENCE,
    "chat_template_kwargs": ("settings of a single row are not supported", "remove them, and set data.max_pixels for all images"),
}
# Keys, in any case, under which other data has its images, and the keys here.
IMAGE_MEANT = {
    "image": "image", "img": "image", "picture": "image", "photo": "image", "image_path": "image", "img_path": "image", "image_file": "image",
    "images": "images", "imgs": "images", "pictures": "images", "photos": "images", "image_paths": "images",
}  # fmt: skip
MOST_ASKED = 10_000  # enough for a form that most questions have; of a large file each is read from the disk
GROUNDING = ("<bbox>", "<ref-object>")  # ms-swift replaces them by the `objects` of the row


@dataclass(frozen=True, kw_only=True)
class Message:
    """`in_loss`: whether an answer is trained on, or only context."""

    role: Role
    content: str
    in_loss: bool = True


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation. The user's messages have one `<image>` for each of `images`, in order. `row` counts from 1. `part`, from 0: the
    conversation in a row with several. `accepted`: further correct answers to the last question, if the row lists them; the last message is
    the one that is trained on. `adjustments`: what was changed so that the row is read as it was meant (trainer.data.rows.adjustment)."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    file: str
    row: int
    part: int = 0
    accepted: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    draw: str = ""  # what its random numbers depend on; '' = nothing is random about it


class Samples(Protocol):
    """Samples by number, from 0: a tuple, or `trainer.data.rows.indexed_samples.IndexedSamples`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sample: ...


def read_samples(file: Path, images: Path, form: ImageForm = LINE_FEED) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The valid samples of an annotation file, or of the files that a meta file lists, and the problems of all other rows. Relative image
    paths start at `images`. `form`: of rows to ask: that of the rows that the model was trained on."""
    sources, found = find_sources(file, images)
    samples: list[Sample] = []
    problems = list(found)
    for source in sources:
        read, wrong = read_source(source, form)
        samples += islice(cycle(read), count_repeated(len(read), source.repeat))
        problems += wrong
    return tuple(samples), tuple(problems)


def questions_of(samples: Samples) -> Iterator[str]:
    """Of at most MOST_ASKED samples, evenly spread."""
    step = max(1, -(-len(samples) // MOST_ASKED))
    chosen = (samples[number] for number in range(0, len(samples), step))
    return (message.content for sample in chosen for message in sample.messages if message.role == "user")


def read_source(source: AnnotationSource, form: ImageForm) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    rows, file_problems = read_rows(source.file)
    samples: list[Sample] = []
    problems = list(file_problems)
    for number, row in rows:
        for found in read_parts(row, number, source, form):
            (samples if isinstance(found, Sample) else problems).append(found)  # type: ignore[arg-type]
    return tuple(samples), tuple(problems)


def stream_source(source: AnnotationSource, position: Position | None = None) -> Iterator[Sample | DataProblem]:
    """The valid samples and the problems of a file, in its order, without the whole file in memory. `position` is kept up to date."""
    for found in stream_rows(source.file, position):
        if isinstance(found, DataProblem):
            yield found
        else:
            yield from read_parts(found[1], found[0], source)


def read_parts(row: Any, number: int, source: AnnotationSource, form: ImageForm = LINE_FEED) -> Iterator[Sample | DataProblem]:
    """The samples of a row, or the problems of each."""
    for part, name, item in split_row(row):
        sample, problems = read_row(item, number, source, form, part=part, prefix=name)
        yield from problems
        if sample:
            yield sample


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
        parsed, adjustments = adjust(parsed, form)
        check_parsed(parsed, row, source.images, add_problem)
    if problems or parsed is None or parsed.turns is None:
        return None, problems
    identity = number if row.get("id") is None else row["id"]
    return Sample(
        id=str(identity),
        images=tuple(source.images / path_text(image.name) for image in parsed.images),
        messages=tuple(Message(role=turn.role, content=turn.content, in_loss=turn.in_loss) for turn in parsed.turns),
        file=str(source.file),
        row=number,
        part=part,
        accepted=read_accepted(row),
        adjustments=adjustments,
    ), problems


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


def refuse_unread(row: Row, add_problem: AddProblem) -> None:
    for key in sorted(UNREAD.keys() & row.keys()):
        if row[key]:
            add_problem(key, *UNREAD[key])


def check_parsed(parsed: ParsedRow, row: Row, folder: Path, add_problem: AddProblem) -> None:
    for image in parsed.images:
        check_path(image, folder, add_problem)
    if parsed.turns is None:
        return
    for turn in parsed.turns:
        check_text(turn, add_problem)
        if row.get("objects") and any(mark in turn.content for mark in GROUNDING):
            add_problem(turn.text_field, "ms-swift's objects are not supported", "write the boxes into the text as the model writes them")
    check_order(parsed, add_problem)
    if check_image_key(parsed, row, add_problem):
        check_marks(parsed, add_problem)


# ---------------------------------------------------------------------------------------------------------------- messages


def check_text(turn: Turn, add_problem: AddProblem) -> None:
    if not turn.content or turn.content.isspace():
        what = "answer" if turn.role == "assistant" else f"{turn.role} message"
        add_problem(turn.text_field, f"empty {what}", "write its text, or remove the row")
    if MARK in turn.content and turn.role != "user":
        what = "an answer" if turn.role == "assistant" else "a system message"
        add_problem(turn.text_field, f"{MARK} mark in {what}", f"only questions may contain {MARK}")
    try:
        turn.content.encode()
    except UnicodeEncodeError:
        add_problem(turn.text_field, "half of a surrogate pair, which is not a character", "write the text again from its source")


def check_order(parsed: ParsedRow, add_problem: AddProblem) -> None:
    """[system], then user and assistant alternately, ending with an answer; at least one of the answers is in the loss."""
    turns = [turn for index, turn in enumerate(parsed.turns or ()) if turn.role != "system" or index > 0]
    previous: Role = "assistant"
    for index, turn in enumerate(turns):
        if turn.role == "system":
            add_problem(
                turn.field, "a system message that is not the first message", "a conversation may have one system message, at its beginning"
            )
            continue
        if turn.role == previous:
            problem = f"two {turn.role} messages in a row" if index else "starts with an answer"
            add_problem(turn.field, problem, "questions and answers must alternate, with a question first")
        previous = turn.role
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        add_problem(parsed.field, "conversation without an answer", 'add the answer as the last message ("gpt" or "assistant")')
    elif turns[-1].role == "user":
        add_problem(turns[-1].field, "conversation ends with a question", "add its answer, or remove the question")
    elif not any(turn.in_loss for turn in answers):
        add_problem(parsed.field, "all answers have loss: false, so nothing would be learned", "remove the row, or one of these keys")


# -------------------------------------------------------------------------------------------------------------------- images


def check_path(image: ImageReference, folder: Path, add_problem: AddProblem) -> None:
    if check_name(image, add_problem) and not is_file(folder / path_text(image.name)):
        problem = f"no image file at {folder / path_text(image.name)}"
        add_problem(image.field, problem, f"put the file there, or set data.images (now {folder}) to the folder of the images")


def check_name(image: ImageReference, add_problem: AddProblem) -> bool:
    """Whether it is the path of a file."""
    name = image.name
    if not isinstance(name, str) or not name:
        problem = "is an empty path" if name == "" else f"is {kind(name)}, not a path"
        add_problem(image.field, problem, "give the path of the image as a string")
        return False
    if name.startswith(("http://", "https://", "data:")):
        add_problem(image.field, f"{name[:60]!r} is not a file; images are not downloaded", "save the image as a file and give its path")
        return False
    return True


def path_text(name: str) -> str:
    return name.removeprefix("file://")


def check_image_key(parsed: ParsedRow, row: Row, add_problem: AddProblem) -> bool:
    """Whether the images are under a known key. Without this, a row whose marks are missing too would be trained on without its image."""
    wrong = next((key for key in row if key.lower() in IMAGE_MEANT and row[key] and isinstance(row[key], str | list)), None)
    if parsed.images or wrong is None or any(row.get(key) for key in IMAGE_KEYS):
        return True
    meant = IMAGE_MEANT[wrong.lower()]
    add_problem(wrong, f"unknown key {wrong!r}: did you mean {meant!r}?", f"rename the key to {meant}")
    return False


def check_marks(parsed: ParsedRow, add_problem: AddProblem) -> None:
    questions = [turn for turn in parsed.turns or () if turn.role == "user"]
    marks, images = sum(turn.content.count(MARK) for turn in questions), len(parsed.images)
    if marks == images:
        return
    marked = next((turn for turn in questions if MARK in turn.content), questions[0] if questions else None)
    problem = f"too {'few' if marks < images else 'many'} {MARK} marks: {marks} in the questions for {plural(images, 'image')}"
    add_problem(marked.field if marked else parsed.field, problem, f"write {MARK} once for each image, at its position in the question")


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for the file system, or the folder is not accessible
        return False
