"""Read the input file of stage infer: questions without answers, {"prompt", "image" or "images"} or {"messages", "images"}."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.contract import LINE_FEED, DataProblem, ImageForm, InputRefused, describe_groups
from trainer.contract.wording import plural
from trainer.data.containers.annotation import read_rows
from trainer.data.media.store import MediaStore
from trainer.data.rows.image_path import find_image, path_text
from trainer.data.rows.inline_image import keep_images
from trainer.data.rows.known_key import refuse_keys
from trainer.data.rows.message.tool import TOOL_KEYS
from trainer.data.rows.message.turn import WRITE_TEXT, read_system, read_turns
from trainer.data.rows.parsed_row import MARK, AddProblem, ImageReference, Row, Turn, ends_with_question, keys_of, kind
from trainer.data.rows.row_check import check_name, check_text
from trainer.data.rows.row_images import choose_images, insert_marks, join_parts, read_images
from trainer.data.rows.sample import Message, as_message, collect_problems

SHOWN = 20  # causes in a message
EXAMPLE = '{"prompt": "...", "image": "a.png"} or {"messages": [{"role": "user", "content": "<image>..."}], "images": ["a.png"]}'


@dataclass(frozen=True, kw_only=True)
class Request:
    """`row`: the number of the row, from 1. The user's messages have one MARK for each of `images`."""

    row: int
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    id: str | int | None = None


def read_requests(file: Path, folder: Path, form: ImageForm = LINE_FEED, store: MediaStore | None = None) -> tuple[Request, ...]:
    """Relative image paths start at `folder`; whether the files exist is not checked. `form`: of the model's training rows.
    Raises InputRefused that lists the invalid rows, before anything is answered."""
    rows, found = read_rows(file, store)
    requests, problems = [], list(found)
    for number, row in rows:
        request, wrong = read_request(row, number, file, folder, form, store or MediaStore())
        problems += wrong
        requests += [request] if request is not None else []
    if problems:
        listed = "\n".join(describe_groups(sorted(problems, key=lambda problem: problem.row), SHOWN))
        raise InputRefused(f"stage.inference.input: {plural(len(problems), 'problem')}; nothing was answered\n{listed}")
    return tuple(requests)


def read_request(
    row: Any, number: int, file: Path, folder: Path, form: ImageForm, store: MediaStore
) -> tuple[Request | None, list[DataProblem]]:
    problems: list[DataProblem] = []
    add_problem = collect_problems(problems, file, number)
    if not isinstance(row, dict):
        add_problem("", f"is {kind(row)}, not an object", f"write a row as {EXAMPLE}")
        return None, problems
    refuse_keys(row, add_problem)
    for key in TOOL_KEYS:
        if row.get(key):
            add_problem(
                key, "tools are not supported in questions", "write them into the system message, as the chat template of the model does"
            )
    turns, images = read_question(row, add_problem)
    images = keep_images(images, folder, store, add_problem)
    for image in images:
        check_name(image, add_problem)
    turns = place_images(turns, len(images), form, add_problem) if turns is not None else None
    if problems or turns is None:
        return None, problems
    return Request(
        row=number,
        id=row["id"] if isinstance(row.get("id"), str | int) else None,
        messages=tuple(replace(as_message(turn), in_loss=True) for turn in turns),
        images=tuple(folder / path_text(find_image(image, folder)[0].name) for image in images),
    ), problems


def read_question(row: Row, add_problem: AddProblem) -> tuple[tuple[Turn, ...] | None, tuple[ImageReference, ...]]:
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        problem = "has both prompt and messages" if given else f"has neither prompt nor messages: its keys are {keys_of(row)}"
        add_problem("", problem, f"write a row as {EXAMPLE}")
        return None, ()
    images = read_images(row, add_problem)
    if given == ["messages"]:
        turns, in_blocks = read_turns(row, "messages", add_problem)
        images = choose_images(in_blocks, images, add_problem)
    elif isinstance(row["prompt"], str):
        turns = (Turn(role="user", content=row["prompt"], field="prompt"),)
    else:
        add_problem("prompt", f"is {kind(row['prompt'])}, not a string", WRITE_TEXT)
        return None, ()
    turns = read_system(row, turns, add_problem)
    if turns is not None:
        check_turns(turns, add_problem)
    return turns, images


def check_turns(turns: Sequence[Turn], add_problem: AddProblem) -> None:
    for turn in turns:
        check_text(turn, add_problem)
    roles = [turn.role for turn in turns]
    if not ends_with_question(roles):
        add_problem(
            turns[-1].field, f"the roles are {', '.join(roles)}", "questions and answers must alternate, with a question first and last"
        )


def place_images(turns: tuple[Turn, ...], images: int, form: ImageForm, add_problem: AddProblem) -> tuple[Turn, ...]:
    """The turns with one MARK for each image. If there are none at all, they are inserted into the first question."""
    marks = sum(turn.content.count(MARK) for turn in turns if turn.role == "user")
    if marks == images:
        return join_parts(turns, form)
    if marks or all(turn.role != "user" for turn in turns):
        add_problem(turns[0].field, f"{marks} {MARK} marks for {images} images", f"write {MARK} once for each image, or not at all")
        return turns
    return insert_marks(turns, images, form)
