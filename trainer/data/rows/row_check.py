"""What is checked of a parsed row without decoding its images: keys, texts, order of the messages, paths and marks of the images."""

from pathlib import Path

from trainer.contract.wording import plural
from trainer.data.rows.parsed_row import MARK, AddProblem, ImageReference, ParsedRow, Role, Row, Turn, kind, quote
from trainer.data.rows.row_images import IMAGE_KEYS

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
NO_FILE = "no image file at "
GROUNDING = ("<bbox>", "<ref-object>")  # ms-swift replaces them by the `objects` of the row


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
        problem = f"{NO_FILE}{folder / path_text(image.name)}"
        add_problem(image.field, problem, f"put the file there, or set data.images (now {folder}) to the folder of the images")


def missing_file(problem: str) -> str:
    """The path that a problem says is not there; '' for another problem."""
    return problem.removeprefix(NO_FILE) if problem.startswith(NO_FILE) else ""


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
