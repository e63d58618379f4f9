"""Texts that hold what is not text: marks of media without the media, images as base64, names of image files, marks of chat templates.

What is lost from a question is a problem of the row. Other finds are counted: a text may be about them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.data.rows.adjustment import SUFFIX, WITHIN, is_image
from trainer.data.rows.parsed_row import MARK, AddProblem, ParsedRow, Row, Turn

# modelscope/ms-swift and hiyouga/LLaMA-Factory replace these by the media of the row, ms-swift the last two by its `objects`.
MEDIA_MARKS, GROUNDING_MARKS = ("<video>", "<audio>"), ("<bbox>", "<ref-object>")
# What stands for an image in rows of other models: mPLUG-DocOwl and Llama 3.2, Phi-3-vision, Gemma 3, Janus.
IMAGE_MARKS = ("<|image|>", "<|image_1|>", "<start_of_image>", "<image_placeholder>")
# Of ChatML and its relatives, Llama 3, Gemma, Phi and Zephyr, and of Qwen-VL's images.
TOKENS = (
    *(
        "|im_start|",
        "|im_end|",
        "|endoftext|",
        "|eot_id|",
        "|start_header_id|",
        "|end_header_id|",
        "start_of_turn",
        "end_of_turn",
        "|user|",
    ),
    *("|assistant|", "|system|", "|end|", "|vision_start|", "|vision_end|", "|image_pad|", "|video_pad|", "IMG_CONTEXT"),
)
ANGLED = re.compile(
    f"<(?:{'|'.join(map(re.escape, (*TOKENS, *(mark[1:-1] for mark in (*MEDIA_MARKS, *GROUNDING_MARKS, *IMAGE_MARKS)))))})>"
)
# Each with a colon or a bracket, and what must be in the text too. Llama 2, Vicuna before and since 1.1, Alpaca.
PLAIN = (
    ("[INST]", ""),
    ("### Human:", ""),
    ("### Assistant:", ""),
    ("### Instruction:", "### Response:"),
    ("USER:", "ASSISTANT:"),
)
RUN = re.compile(r"[A-Za-z0-9+/]+")
STEP = 200  # characters: a run of twice as many covers one whole step
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
IMAGE_STARTS = ("iVBORw0KGgo", "/9j/4", "R0lGODlh", "R0lGODdh", "UklGR")  # of PNG, JPEG, GIF and WebP in base64
BASE64, NAMED = "long base64 in a text", "name of an image file in a text"


def check_texts(parsed: ParsedRow, row: Row, folders: tuple[Path, ...], add_problem: AddProblem) -> tuple[str, ...]:
    """What is counted. Reports what the row loses."""
    found: dict[str, None] = {}
    for turn in parsed.turns or ():
        text = turn.content
        if "<" in text:
            found |= dict.fromkeys(find_angled(turn, row, add_problem))
        if ":" in text or "[" in text:
            found |= {f"mark of a chat template in a text: {mark}": None for mark, other in PLAIN if mark in text and other in text}
        if len(text) >= STEP and has_base64(text):
            if turn.role == "user" and holds_image(text):
                add_problem(turn.text_field, "an image as base64 in a question", "save it as a file, and give its path under image")
            found[BASE64] = None
        if "." in text and SUFFIX.search(text) and names_other_image(text, parsed, folders):
            found[NAMED] = None
    return tuple(found)


def find_angled(turn: Turn, row: Row, add_problem: AddProblem) -> Iterator[str]:
    for mark in dict.fromkeys(ANGLED.findall(turn.content)):
        if mark in MEDIA_MARKS and turn.role == "user" and not is_about(mark, turn.content):
            add_problem(
                turn.text_field, f"a mark {mark} without its {mark[1:-1]}", "only images are supported: remove the row, or the mark"
            )
        elif mark in IMAGE_MARKS and turn.role == "user" and not is_about(mark, turn.content):
            add_problem(turn.text_field, f"{mark} is the mark of an image in rows of another model", f"write {MARK} in its place")
        elif mark in GROUNDING_MARKS and not row.get("objects") and not is_about(mark, turn.content):
            add_problem(turn.text_field, f"a mark {mark} without objects of the row", "write the box or the name into the text")
        elif mark in MEDIA_MARKS or (mark in GROUNDING_MARKS and not row.get("objects")):
            yield f"{mark} in a text"
        elif mark in GROUNDING_MARKS:
            continue  # filled in by the objects
        else:
            yield f"mark of a chat template in a text: {mark}"


def is_about(mark: str, text: str) -> bool:
    """Whether the text is about a tag of this name: it is closed, quoted, named as a tag, or the text has code or is about HTML."""
    lower = text.lower()
    closed = f"</{mark[1:]}" in text or f"`{mark}`" in text or "```" in text or "html" in lower
    return closed or bool(re.search(rf"{re.escape(mark)}[`'\"]?\s+(?:tags?|elements?)\b", lower))


def has_base64(text: str) -> bool:
    return any(RUN.fullmatch(text, at, at + STEP) for at in range(0, len(text) - STEP + 1, STEP))


def holds_image(text: str) -> bool:
    return DATA_URI.search(text) is not None or any(start in text for start in IMAGE_STARTS)


def names_other_image(text: str, parsed: ParsedRow, folders: tuple[Path, ...]) -> bool:
    """Whether the text names an image file that exists and is none of the row's images."""
    used = {image.name for image in parsed.images if isinstance(image.name, str)}
    names = {next(filter(None, match.groups())) for match in WITHIN.finditer(text)}
    return any(is_image(name, folders) for name in names - used)
