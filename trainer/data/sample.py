"""Conversations with images, read from the shapes that people have.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

A bad row is reported and left out; it never stops the reading and never turns into another row.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract import DataProblem
from trainer.data.annotation import read_rows

Role = Literal["system", "user", "assistant"]
Complain = Callable[[str, str, str], None]  # field, problem, fix

MARK = "<image>"
ROLES: dict[str, Role] = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MESSAGE_KEYS = ("conversations", "messages")
ROLE_KEYS = ("from", "role")
TEXT_KEYS = ("value", "content")
IMAGE_KEYS = ("image", "images")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
SHAPES = (
    'give {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]} '
    'or {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\\n..."}, {"role": "assistant", "content": "..."}]}'
)


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation. `<image>` stands once in the user's messages for each of `images`, in their order. `row` counts from 1."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    file: str
    row: int


def read_samples(file: Path, images: Path) -> tuple[tuple[Sample, ...], tuple[DataProblem, ...]]:
    """The whole samples of an annotation file and all problems of the others. Relative image paths are looked up below `images`."""
    rows, file_problems = read_rows(file)
    samples: list[Sample] = []
    problems = list(file_problems)
    for number, row in rows:
        sample, found = read_row(row, number, file, images)
        problems += found
        if sample:
            samples.append(sample)
    return tuple(samples), tuple(problems)


def read_row(row: Any, number: int, file: Path, folder: Path) -> tuple[Sample | None, list[DataProblem]]:
    """The sample, or None and every problem that can be seen without decoding an image."""
    problems: list[DataProblem] = []

    def complain(field: str, problem: str, fix: str) -> None:
        problems.append(DataProblem(file=str(file), row=number, field=field, problem=problem, fix=fix))

    if not isinstance(row, dict):
        complain("", f"is {kind(row)}, not an object", SHAPES)
        return None, problems
    refuse_other_media(row, complain)
    messages = read_messages(row, complain)
    images = read_images(row, folder, complain)
    if messages is not None:
        check_order(messages, message_key(row), complain)
        check_marks(messages, images, message_key(row), complain)
    if problems or messages is None:
        return None, problems
    paths = tuple(folder / name for name in images)
    identity = number if row.get("id") is None else row["id"]
    return Sample(id=str(identity), images=paths, messages=messages, file=str(file), row=number), problems


# ------------------------------------------------------------------------------------------------------------------ messages


def message_key(row: dict[str, Any]) -> str:
    return next((key for key in MESSAGE_KEYS if key in row), "")


def read_messages(row: dict[str, Any], complain: Complain) -> tuple[Message, ...] | None:
    """The messages, or None when one of them cannot be understood: their order says nothing then."""
    present = [key for key in MESSAGE_KEYS if key in row]
    if len(present) != 1:
        found = f"keys {', '.join(map(repr, row)) or 'none'}"
        complain("", f"has both {' and '.join(present)}" if present else f"has no known shape: {found}", SHAPES)
        return None
    key = present[0]
    if not isinstance(row[key], list) or not row[key]:
        complain(key, "is empty" if row[key] == [] else f"is {kind(row[key])}, not a list of messages", SHAPES)
        return None
    messages = [read_message(item, f"{key}[{place}]", complain) for place, item in enumerate(row[key])]
    return tuple(message for message in messages if message) if all(messages) else None


def read_message(item: Any, field: str, complain: Complain) -> Message | None:
    if not isinstance(item, dict):
        complain(field, f"is {kind(item)}, not an object", SHAPES)
        return None
    role_key = next((key for key in ROLE_KEYS if key in item), "")
    text_key = next((key for key in TEXT_KEYS if key in item), "")
    if not role_key or not text_key:
        complain(field, f"has the keys {', '.join(map(repr, item)) or 'none'}", 'give it "from" and "value", or "role" and "content"')
        return None
    role, text = item[role_key], item[text_key]
    if not isinstance(role, str) or role not in ROLES:
        complain(f"{field}.{role_key}", f"unknown role {role!r}", f"valid are: {', '.join(ROLES)}")
        return None
    if not isinstance(text, str):
        complain(f"{field}.{text_key}", f"is {kind(text)}, not a string", f"write the text itself, with {MARK} where an image stands")
        return None
    return check_text(Message(role=ROLES[role], content=text), f"{field}.{text_key}", complain)


def check_text(message: Message, field: str, complain: Complain) -> Message:
    if not message.content.strip():
        what = "answer" if message.role == "assistant" else f"{message.role} message"
        complain(field, f"empty {what}", "write its text, or leave the row out")
    if MARK in message.content and message.role != "user":
        what = "an answer" if message.role == "assistant" else "a system message"
        complain(field, f"{MARK} mark in {what}", f"only questions may hold {MARK}")
    try:
        message.content.encode()
    except UnicodeEncodeError:
        complain(field, "half of a surrogate pair, which is no character", "write the text again from its source")
    return message


def check_order(messages: tuple[Message, ...], key: str, complain: Complain) -> None:
    """[system] then user and assistant in turn, ending with an answer."""
    turns = [(place, message.role) for place, message in enumerate(messages) if message.role != "system" or place > 0]
    previous: Role = "assistant"
    for place, role in turns:
        if role == "system":
            complain(f"{key}[{place}]", "system message after the first place", "a conversation has one system message, at its head")
            continue
        if role == previous:
            again = "starts with an answer" if place == turns[0][0] else f"two {role} messages in a row"
            complain(f"{key}[{place}]", again, "let questions and answers alternate, a question first")
        previous = role
    if not any(role == "assistant" for _, role in turns):
        complain(key, "conversation without an answer", 'add the answer as the last message ("gpt" or "assistant")')
    elif turns[-1][1] == "user":
        complain(f"{key}[{turns[-1][0]}]", "conversation ends with a question", "add its answer, or drop the question")


# -------------------------------------------------------------------------------------------------------------------- images


def refuse_other_media(row: dict[str, Any], complain: Complain) -> None:
    for key in OTHER_MEDIA:
        if row.get(key):
            complain(key, "only images are read; training would ignore it", "leave the row out, or give frames of it as images")


def read_images(row: dict[str, Any], folder: Path, complain: Complain) -> list[str]:
    """The paths as written, unusable ones too, so that they are counted against the marks."""
    given = [key for key in IMAGE_KEYS if row.get(key) is not None]
    if len(given) > 1:
        complain("image", "both image and images are given", "keep one of them, as a path or a list of paths")
    if not given:
        return []
    key = given[0]
    names = row[key] if isinstance(row[key], list) else [row[key]]
    for place, name in enumerate(names):
        check_path(name, folder, f"{key}[{place}]" if isinstance(row[key], list) else key, complain)
    return [name if isinstance(name, str) else "" for name in names]


def check_path(name: Any, folder: Path, field: str, complain: Complain) -> None:
    if not isinstance(name, str) or not name:
        complain(field, "is an empty path" if name == "" else f"is {kind(name)}, not a path", "give the image's path as a string")
    elif name.startswith(("http://", "https://", "data:")):
        complain(field, f"{name[:60]!r} is not a file; a run reads no network", "save the image as a file and give its path")
    elif not is_file(folder / name):
        complain(field, f"no image file at {folder / name}", f"put it there, or set data.images (now {folder}) to where it is")


def check_marks(messages: tuple[Message, ...], images: list[str], key: str, complain: Complain) -> None:
    counts = Counter({place: message.content.count(MARK) for place, message in enumerate(messages) if message.role == "user"})
    marks = counts.total()
    if marks == len(images):
        return
    few = marks < len(images)
    place = next((place for place, count in counts.items() if count), next(iter(counts), 0))
    problem = f"too {'few' if few else 'many'} {MARK} marks: {marks} in the questions for {plural(len(images), 'image')}"
    complain(f"{key}[{place}]", problem, f"write {MARK} once for each image, where it stands in the question")


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, a folder without permission: not a file that can be read
        return False


def kind(value: Any) -> str:
    return KINDS[type(value)]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
