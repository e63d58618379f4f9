"""What is checked of a parsed row without decoding its images: keys, texts, order of the messages, paths and marks of the images."""

import json
from pathlib import Path

from trainer.contract.wording import plural
from trainer.data.rows.image_path import path_text, suggest
from trainer.data.rows.known_key import IMAGE_MEANT, is_image_key
from trainer.data.rows.parsed_row import MARK, REPORTED, AddProblem, ImageReference, ParsedRow, Role, Row, Turn, kind, quote, shorten

FETCH = "save it with omnilaunch data fetch, then give the path of the file that it writes"
SHOWN = 300  # characters of a path
NO_FILE = "no image file at "


def check_parsed(parsed: ParsedRow, row: Row, folder: Path, add_problem: AddProblem) -> None:
    for image in parsed.images:
        check_path(image, folder, add_problem)
    if parsed.turns is None:
        return
    for turn in parsed.turns:
        check_text(turn, add_problem)
    check_order(parsed, add_problem)
    if check_image_key(parsed, row, add_problem):
        check_marks(parsed, add_problem)


# ---------------------------------------------------------------------------------------------------------------- messages


NAMES: dict[Role, str] = {"assistant": "answer", "tool": "result of a tool"}  # others: the role and `message`


def check_text(turn: Turn, add_problem: AddProblem) -> None:
    what = NAMES.get(turn.role, f"{turn.role} message")
    if (not turn.content or turn.content.isspace()) and not turn.calls and turn.role != "tool":
        add_problem(turn.text_field, f"empty {what}", "write its text, or remove the row")
    if turn.role != "user" and (MARK in turn.content or MARK in turn.reasoning):
        article = "an" if what[0] in "aeiou" else "a"
        add_problem(turn.text_field, f"{MARK} mark in {article} {what}", f"only questions may contain {MARK}")
    try:
        turn.content.encode()
        if turn.reasoning or turn.calls:
            "".join((turn.reasoning, *(text for call in turn.calls for text in (call.name, call.arguments)))).encode()
    except UnicodeEncodeError:
        add_problem(turn.text_field, "half of a surrogate pair, which is not a character", "write the text again from its source")


def check_order(parsed: ParsedRow, add_problem: AddProblem) -> None:
    """[system], then user and assistant alternately, ending with an answer; at least one of the answers is in the loss. An answer that calls tools is
    followed by their results, and these by the next answer."""
    turns = [turn for index, turn in enumerate(parsed.turns or ()) if turn.role != "system" or index > 0]
    previous: Role = "assistant"
    for index, turn in enumerate(turns):
        if turn.role == "system":
            add_problem(
                turn.field, "a system message that is not the first message", "a conversation may have one system message, at its beginning"
            )
            continue
        if problem := find_disorder(turn.role, previous, first=index == 0):
            add_problem(turn.field, *problem)
        previous = turn.role
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        add_problem(parsed.field, "conversation without an answer", 'add the answer as the last message ("gpt" or "assistant")')
    elif turns[-1].role == "user":
        add_problem(turns[-1].field, "conversation ends with a question", "add its answer, or remove the question")
    elif turns[-1].role == "tool":
        add_problem(turns[-1].field, "conversation ends with the result of a tool", "add the answer, or remove the call and its result")
    elif not any(turn.in_loss for turn in answers):
        add_problem(parsed.field, "all answers have loss: false, so nothing would be learned", "remove the row, or one of these keys")


def find_disorder(role: Role, previous: Role, *, first: bool) -> tuple[str, str] | None:
    """(problem, fix) of a message after another one."""
    if role == "tool":
        wrong = first or previous == "user"
        return ("the result of a tool without a call before it", "put it after the answer that calls the tool") if wrong else None
    if role == "user" and previous == "tool":
        return "a question after the result of a tool", "add the answer to the result"
    if role != previous:
        return None
    problem = "starts with an answer" if first else f"two {role} messages in a row"
    return problem, "questions and answers must alternate, with a question first"


# -------------------------------------------------------------------------------------------------------------------- images


def check_path(image: ImageReference, folder: Path, add_problem: AddProblem) -> None:
    if not check_name(image, add_problem) or image.exists or is_file(folder / path_text(image.name)):
        return
    if parts := split_paths(image.name, folder):
        listed = shorten(json.dumps(parts, ensure_ascii=False), SHOWN)
        add_problem(image.field, f"{shorten(image.name, SHOWN)!r} is several paths in one text", f"write a list: {listed}")
        return
    problem, near = f"{NO_FILE}{shorten(str(folder / path_text(image.name)), SHOWN)}", suggest(image.name, folder)
    hint = f"write {near!r} if that is meant; else " if near else ""
    add_problem(image.field, problem, f"{hint}put the file there, or set data.images (now {folder}) to the folder of the images")


def missing_file(problem: str) -> str:
    """The path that a problem says is not there; '' for another problem."""
    return problem.removeprefix(NO_FILE) if problem.startswith(NO_FILE) else ""


def split_paths(text: str, folder: Path) -> list[str]:
    """The paths of image files that exist, in a text with commas or semicolons between them, or that is the JSON of a list; [] for any other."""
    for parts in (parse_list(text), text.split(","), text.split(";")):
        paths = [part.strip() for part in parts]
        if (len(paths) > 1 or text.startswith("[")) and all(path and is_file(folder / path) for path in paths):
            return paths
    return []


def parse_list(text: str) -> list[str]:
    try:
        found = json.loads(text) if text.startswith("[") else []
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and found and all(isinstance(item, str) for item in found) else []


def check_name(image: ImageReference, add_problem: AddProblem) -> bool:
    """Whether it is the path of a file."""
    name = image.name
    if name is REPORTED:
        return False
    if not isinstance(name, str) or not name:
        problem = "is an empty path" if name == "" else f"is {kind(name)}, not a path"
        add_problem(image.field, problem, "give the path of the image as a string")
        return False
    if name.startswith(("http://", "https://")):
        add_problem(image.field, f"{name[:60]!r} is not a file; images are not downloaded", FETCH)
        return False
    return True


def check_image_key(parsed: ParsedRow, row: Row, add_problem: AddProblem) -> bool:
    """Whether the images are under a known key. Without this, a row whose marks are missing too would be trained on without its image."""
    wrong = next((key for key in row if is_image_key(key, row)), None)
    if parsed.images or wrong is None:
        return True
    meant = IMAGE_MEANT[wrong.lower()]
    add_problem(wrong, f"unknown key {quote(wrong)}: did you mean {meant!r}?", f"rename the key to {meant}")
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
