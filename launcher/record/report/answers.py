"""Answers of an evaluation with their images, small enough to stand in a page."""

import base64
import importlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.record.reader import nested
from launcher.record.run_files import RunFiles

MOST_SAMPLES = 24  # of a run
MOST_IMAGES = 4  # of a sample
MOST_SCORES, MOST_NAME = 12, 40  # of a sample; characters
MOST_TEXT = 2_000  # characters of a question or an answer
SIDE = 160  # pixels that an image is scaled to
MOST_FILE_BYTES = 64 * 2**20
MOST_PAGE_BYTES = 1_200_000  # of all images of a page
MOST_RAW_BYTES = 32_768  # of an image that is taken as it is, where nothing is there to scale it
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True, kw_only=True)
class AnswerImage:
    """`data`: as a data: address, '' where `missing` says why it is not shown."""

    name: str
    data: str = ""
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One answer. Texts are as the record has them: who writes a page escapes them. `scores`: metrics besides the match; `base`: what the
    base answered, and `change`, whether this is better or worse, '' where there is no base."""

    row: str
    prompt: str
    expected: str
    got: str
    match: bool
    pictures: tuple[AnswerImage, ...]
    scores: str = ""
    base: str = ""
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Album:
    """Pictures of one page by file; the budget is that of all of them."""

    known: dict[Path, AnswerImage] = field(default_factory=dict)

    def take(self, path: Path, name: str) -> AnswerImage:
        if path not in self.known:
            spent = sum(len(picture.data) for picture in self.known.values())
            self.known[path] = read_picture(path, name) if spent < MOST_PAGE_BYTES else AnswerImage(name=name, missing="the page is full")
        return self.known[path]


def choose_samples(run: RunFiles, album: Album) -> tuple[Shown, ...]:
    """Of answers beside those of a base first what got worse; then wrong answers, in their order, then right ones."""
    ordered = sorted(run.answers, key=lambda answer: (change_of(answer) != "worse", answer.get("match") is True))[:MOST_SAMPLES]
    root = Path(str(nested(run.plan, "spec", "data", "root") or "/"))
    return tuple(show_answer(answer, root, album) for answer in ordered)


def show_answer(answer: Mapping[str, Any], root: Path, album: Album) -> Shown:
    listed = answer.get("images")
    names = [str(name) for name in listed[:MOST_IMAGES]] if isinstance(listed, list) else []
    return Shown(
        row=str(answer.get("row", "")),
        prompt=bounded(answer.get("prompt")),
        expected=bounded(answer.get("expected")),
        got=bounded(answer.get("got")),
        match=answer.get("match") is True,
        pictures=tuple(album.take(root / name, name) for name in names),
        scores=describe_scores(answer.get("scores")),
        base=bounded(base_of(answer).get("got")),
        change=change_of(answer),
    )


def base_of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    base = answer.get("base")
    return base if isinstance(base, dict) else {}


def change_of(answer: Mapping[str, Any]) -> str:
    change = base_of(answer).get("change")
    return change if change in ("better", "worse", "same") else ""


def describe_scores(scores: Any) -> str:
    """`anls 0.80, perplexity 1.13`, of what are numbers."""
    named = scores.items() if isinstance(scores, dict) else ()
    return ", ".join(
        f"{name[:MOST_NAME].replace('_', ' ')} {value:.4g}" for name, value in list(named)[:MOST_SCORES] if type(value) in (int, float)
    )


def bounded(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}… ({len(text):,} characters)"


def read_picture(path: Path, name: str) -> AnswerImage:
    """A file that holds anything else than an image is not shown, whatever it is called."""
    try:
        if not path.is_file():
            return AnswerImage(name=name, missing="not on this machine")
        size = path.stat().st_size
        if size > MOST_FILE_BYTES:
            return AnswerImage(name=name, missing=f"{size:,} bytes")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null in it
        return AnswerImage(name=name, missing=f"cannot be read: {error}")
    data = scale(content)
    if data is None:
        kind = next((kind for signature, kind in SIGNATURES.items() if content.startswith(signature)), "")
        if not kind or size > MOST_RAW_BYTES:
            return AnswerImage(
                name=name, missing="no image that can be shown here" if not kind else "Pillow, which would scale it, is not installed"
            )
        data = address(content, kind)
    return AnswerImage(name=name, data=data) if data else AnswerImage(name=name, missing="no image, or a broken one")


def scale(content: bytes) -> str | None:
    """At most SIDE pixels a side; '' for what is no whole image, None where Pillow is not installed: the launcher does without it."""
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
        except Exception:  # a decoder may raise anything, and a broken image takes no report away
            return ""
    return address(stream.getvalue(), "jpeg" if photo else "png")


def address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def count_matches(answers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(answer.get("match") is True for answer in answers), len(answers)
