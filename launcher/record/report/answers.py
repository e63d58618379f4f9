"""Answers of an evaluation, with images that are small enough to be embedded in a page."""

import base64
import importlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.record.reader import nested
from launcher.record.run_files import RunFiles

MAX_SAMPLES = 24  # per run
MAX_IMAGES = 4  # per sample
MAX_SCORES, MAX_NAME = 12, 40  # per sample; characters of a name
MAX_BOXES, POINT = 50, 0.04  # boxes of an answer that are drawn; the side of a point, of that of the image
MAX_TEXT = 2_000  # characters of a question or an answer
SIDE = 160  # pixels that an image is scaled to
MAX_FILE_BYTES = 64 * 2**20
MAX_PAGE_BYTES = 1_200_000  # of all images of a page
MAX_RAW_BYTES = 32_768  # of an image that is embedded unscaled, if Pillow is not installed
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True, kw_only=True)
class AnswerImage:
    """`data`: a data: URL; '' if the image is not shown for the reason in `missing`."""

    name: str
    data: str = ""
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class ShownBox:
    """A box over the image, in per cent of its width and height. `kind`: of the accepted answer, or of the model's."""

    kind: Literal["expected", "got"]
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """Texts are as in the record, not escaped. `scores`: metrics other than the match. `base`: the answer of the base model, and `change`:
    whether this one is better or worse; '' without a base."""

    row: str
    prompt: str
    expected: str
    got: str
    match: bool
    pictures: tuple[AnswerImage, ...]
    scores: str = ""
    base: str = ""
    change: str = ""
    boxes: tuple[ShownBox, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageBudget:
    """The images of one page, by file. All together have at most MAX_PAGE_BYTES."""

    known: dict[Path, AnswerImage] = field(default_factory=dict)

    def take(self, path: Path, name: str) -> AnswerImage:
        if path not in self.known:
            spent = sum(len(picture.data) for picture in self.known.values())
            self.known[path] = read_picture(path, name) if spent < MAX_PAGE_BYTES else AnswerImage(name=name, missing="the page is full")
        return self.known[path]


def choose_samples(run: RunFiles, images: ImageBudget) -> tuple[ShownAnswer, ...]:
    """Answers that are worse than those of the base first, then wrong ones, then right ones."""
    ordered = sorted(run.answers, key=lambda answer: (change_of(answer) != "worse", answer.get("match") is True))[:MAX_SAMPLES]
    root = Path(str(nested(run.plan, "spec", "data", "root") or "/"))
    return tuple(show_answer(answer, root, images) for answer in ordered)


def show_answer(answer: Mapping[str, Any], root: Path, images: ImageBudget) -> ShownAnswer:
    listed = answer.get("images")
    names = [str(name) for name in listed[:MAX_IMAGES]] if isinstance(listed, list) else []
    return ShownAnswer(
        row=str(answer.get("row", "")),
        prompt=shortened(answer.get("prompt")),
        expected=shortened(answer.get("expected")),
        got=shortened(answer.get("got")),
        match=answer.get("match") is True,
        pictures=tuple(images.take(root / name, name) for name in names),
        scores=describe_scores(answer.get("scores")),
        base=shortened(nested(answer, "base", "got")),
        change=change_of(answer),
        boxes=(*read_boxes(answer, "expected"), *read_boxes(answer, "got")) if len(names) == 1 else (),
    )


def read_boxes(answer: Mapping[str, Any], kind: Literal["expected", "got"]) -> tuple[ShownBox, ...]:
    """The boxes of a row, at most MAX_BOXES; a point is a small one. Values that are not numbers from 0 to 1 are left out."""
    listed = nested(answer, "boxes", kind)
    found = []
    for box in listed[:MAX_BOXES] if isinstance(listed, list) else ():
        if not isinstance(box, list) or len(box) not in (2, 4) or not all(type(share) in (int, float) and 0 <= share <= 1 for share in box):
            continue
        left, top = box[:2] if len(box) == 4 else (box[0] - POINT / 2, box[1] - POINT / 2)
        right, bottom = box[2:] if len(box) == 4 else (left + POINT, top + POINT)
        if right >= left and bottom >= top:
            x, y, width, height = (round(100 * share, 2) for share in (left, top, right - left, bottom - top))
            found.append(ShownBox(kind=kind, x=x, y=y, width=width, height=height))
    return tuple(found)


def change_of(answer: Mapping[str, Any]) -> str:
    change = nested(answer, "base", "change")
    return change if change in ("better", "worse", "same") else ""


def describe_scores(scores: Any) -> str:
    """`anls 0.80, perplexity 1.13`."""
    named = list(scores.items())[:MAX_SCORES] if isinstance(scores, dict) else ()
    return ", ".join(f"{name[:MAX_NAME].replace('_', ' ')} {value:.4g}" for name, value in named if type(value) in (int, float))


def shortened(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text):,} characters)"


def read_picture(path: Path, name: str) -> AnswerImage:
    """A file that is not an image is never embedded, whatever its name is."""
    try:
        if not path.is_file():
            return AnswerImage(name=name, missing="not on this machine")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            return AnswerImage(name=name, missing=f"{size:,} bytes")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        return AnswerImage(name=name, missing=f"cannot be read: {error}")
    data = scale(content)
    if data is None:
        kind = next((kind for signature, kind in SIGNATURES.items() if content.startswith(signature)), "")
        if not kind:
            return AnswerImage(name=name, missing="not an image that can be shown here")
        if size > MAX_RAW_BYTES:
            return AnswerImage(name=name, missing="too large: Pillow, which would scale it, is not installed")
        data = data_url(content, kind)
    return AnswerImage(name=name, data=data) if data else AnswerImage(name=name, missing="not an image, or a damaged one")


def scale(content: bytes) -> str | None:
    """At most SIDE pixels a side; '' if it is not a whole image, None if Pillow is not installed, which the launcher does not depend on."""
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            with pillow.open(io.BytesIO(content)) as image:
                image.draft("RGB", (SIDE, SIDE))
                image.load()
                small = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
            small.thumbnail((SIDE, SIDE))
            stream = io.BytesIO()
            photo = small.mode == "RGB" and small.width * small.height > 4096
            small.save(stream, "JPEG" if photo else "PNG", **({"quality": 82} if photo else {"optimize": True}))
        except Exception:  # a decoder may raise anything, and a damaged image must not fail the report
            return ""
    return data_url(stream.getvalue(), "jpeg" if photo else "png")


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
