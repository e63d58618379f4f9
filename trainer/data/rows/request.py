"""Questions without answers: rows {"prompt", "image" or "images"} or {"messages", "images"}, one JSON object a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem, InputRefused
from trainer.data.rows.annotation import read_rows
from trainer.data.rows.parsed_row import MARK, Complain, ImageReference, Row, Turn, keys_of, kind, printable
from trainer.data.rows.row_images import read_pictures, take_blocks
from trainer.data.rows.sample import Message, path_text, refuse_unread
from trainer.data.rows.turn import read_system, read_turns

SHOWN = 20  # problems in a message
EXAMPLE = '{"prompt": "...", "image": "a.png"} or {"messages": [{"role": "user", "content": "<image>..."}], "images": ["a.png"]}'


@dataclass(frozen=True, kw_only=True)
class Request:
    """`row` counts from 1, as a reader of the file does. MARK stands in the user's messages for each of `images`."""

    row: int
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    id: str | int | None = None


def read_requests(file: Path, folder: Path) -> tuple[Request, ...]:
    """Relative paths of images are looked up below `folder`; whether they are there is not asked. Raises InputRefused that names each row
    which is no question, before anything is answered."""
    rows, found = read_rows(file)
    requests, problems = [], list(found)
    for number, row in rows:
        request, wrong = read_request(row, number, file, folder)
        problems += wrong
        requests += [request] if request is not None else []
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        said = "\n".join(str(problem) for problem in sorted(problems, key=lambda problem: problem.row)[:SHOWN])
        raise InputRefused(f"stage.inference.input: {len(problems)} problem(s), and nothing was answered\n{said}{more}")
    return tuple(requests)


def read_request(row: Any, number: int, file: Path, folder: Path) -> tuple[Request | None, list[DataProblem]]:
    problems: list[DataProblem] = []

    def complain(field: str, problem: str, fix: str) -> None:
        problems.append(DataProblem(file=str(file), row=number, field=printable(field), problem=printable(problem), fix=printable(fix)))

    if not isinstance(row, dict):
        complain("", f"is {kind(row)}, not an object", f"write a row as {EXAMPLE}")
        return None, problems
    refuse_unread(row, complain)
    turns, pictures = read_asked(row, complain)
    for picture in pictures:
        check_name(picture, complain)
    turns = place_images(turns, len(pictures), complain) if turns is not None else None
    if problems or turns is None:
        return None, problems
    return Request(
        row=number,
        id=row["id"] if isinstance(row.get("id"), str | int) else None,
        messages=tuple(Message(role=turn.role, content=turn.content) for turn in turns),
        images=tuple(folder / path_text(picture.name) for picture in pictures),
    ), problems


def read_asked(row: Row, complain: Complain) -> tuple[tuple[Turn, ...] | None, tuple[ImageReference, ...]]:
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        said = "has both prompt and messages" if given else f"has neither prompt nor messages: its keys are {keys_of(row)}"
        complain("", said, f"write a row as {EXAMPLE}")
        return None, ()
    pictures = read_pictures(row, complain)
    if given == ["messages"]:
        turns, standing = read_turns(row, "messages", complain)
        pictures = take_blocks(row, standing, pictures, complain)
    elif isinstance(row["prompt"], str):
        turns = (Turn(role="user", content=row["prompt"], field="prompt"),)
    else:
        complain("prompt", f"is {kind(row['prompt'])}, not a string", "write the text itself")
        return None, ()
    turns = read_system(row, turns, complain)
    if turns is not None:
        check_turns(turns, complain)
    return turns, pictures


def check_turns(turns: Sequence[Turn], complain: Complain) -> None:
    for turn in turns:
        if not turn.content.strip():
            complain(turn.text_field, f"empty {turn.role} message", "write its text, or leave the row out")
        if printable(turn.content) != turn.content:
            complain(turn.text_field, "half of a surrogate pair, which is no character", "write the text again from its source")
        if MARK in turn.content and turn.role != "user":
            complain(turn.text_field, f"{MARK} mark in a message of the {turn.role}", f"only questions may hold {MARK}")
    roles = [turn.role for turn in turns]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if asked != ["user", "assistant"] * (len(asked) // 2) + ["user"]:
        complain(turns[-1].field, f"the roles are {', '.join(roles)}", "let questions and answers alternate, a question first and last")


def check_name(picture: ImageReference, complain: Complain) -> None:
    name = picture.name
    if not isinstance(name, str) or not name:
        complain(picture.field, "is an empty path" if name == "" else f"is {kind(name)}, not a path", "give the image's path as a string")
    elif name.startswith(("http://", "https://", "data:")):
        complain(picture.field, f"{name[:60]!r} is not a file; a run reads no network", "save the image as a file and give its path")


def place_images(turns: tuple[Turn, ...], images: int, complain: Complain) -> tuple[Turn, ...]:
    """The turns with a mark for each image: where none says its place, they stand before the first question."""
    marks = sum(turn.content.count(MARK) for turn in turns if turn.role == "user")
    if marks == images:
        return turns
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if marks or first is None:
        complain(turns[0].field, f"{marks} {MARK} marks for {images} images", f"write {MARK} once for each image, or nowhere")
        return turns
    asked = turns[first]
    marked = Turn(role="user", content=f"{MARK * images}\n{asked.content}", field=asked.field, text_key=asked.text_key)
    return (*turns[:first], marked, *turns[first + 1 :])
