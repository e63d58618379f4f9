"""The 1,797 handwritten digits that ship inside scikit-learn, as instruction data: "Which digit is this?" -> "7".

Two more sets ask other questions about the same images, so that a chain of stages has something new to learn.
UCI ML hand-written digits (Alpaydin and Kaynak, 1998), 8x8 pixels with 17 grey levels. 1,500 rows are for training, 297 are held out;
`permute(1797, "digits")` fixes the split, independent of the seed of a run.
"""

import hashlib
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.contract import write_text
from trainer.data.batch.order import permute
from trainer.data.kept_folder import locked

ROWS = 1797
TRAIN_ROWS = 1500
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class DigitsQuestion:
    """The question about each image, and the answer for a digit."""

    text: str
    answer: Callable[[int], str]


# Key: name of the set and of its folder.
QUESTIONS = {
    "digits": DigitsQuestion(text="Which digit is this?", answer=str),
    "digits_even": DigitsQuestion(text="Is the digit even?", answer=lambda digit: "no" if digit % 2 else "yes"),
    "digits_large": DigitsQuestion(text="Is the digit greater than four?", answer=lambda digit: "yes" if digit > 4 else "no"),
}


def write_digits(root: Path, name: str = "digits") -> None:
    """Create `root/name` unless it is complete: train.json, evaluation.json, images/*.png and, last, the manifest.

    Written to a temporary folder and renamed, one process at a time, so that an incomplete set is never visible; the bytes are the same on
    every machine. A damaged set is moved to `root/<name>.damaged.*`, because it may contain files of the user. Raises OSError, and KeyError
    for a name that is not in QUESTIONS.
    """
    question, folder = QUESTIONS[name], root / name
    if is_whole(folder):
        return
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{name}.lock"):
        if is_whole(folder):
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            write_set(aside, question)
            aside.chmod(0o755)  # mkdtemp sets 0700, which the user of a container could not read
            if folder.exists():
                folder.rename(root / f"{name}.damaged{aside.suffix}")
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether the manifest exists and has the hash of the files."""
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == {"sha256": hash_set(folder)})
    except (OSError, ValueError):
        return False


def hash_set(folder: Path) -> str:
    """SHA-256 over names and bytes of the annotation files and images. Raises OSError when one is missing."""
    digest = hashlib.sha256()
    for name in ["train.json", "evaluation.json", *map(image_name, range(ROWS))]:
        digest.update(f"{name}\0".encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def write_set(folder: Path, question: DigitsQuestion) -> None:
    pixels, labels = load_pixels()
    (folder / "images").mkdir()
    for index, image in enumerate(pixels):
        (folder / image_name(index)).write_bytes(png(image))
    order = [int(index) for index in permute(ROWS, "digits")]
    for name, part in (("train.json", order[:TRAIN_ROWS]), ("evaluation.json", order[TRAIN_ROWS:])):
        rows = ",\n".join(json.dumps(row(index, labels[index], question)) for index in part)
        write_text(f"[\n{rows}\n]\n", folder / name)
    write_text(json.dumps({"sha256": hash_set(folder)}) + "\n", folder / MANIFEST)


def load_pixels() -> tuple[NDArray[np.uint8], list[int]]:
    """([1797, 8, 8] uint8 from 0 to 255, labels)."""
    from sklearn.datasets import load_digits  # takes a second to import, and is needed once per machine

    digits = load_digits()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), [int(label) for label in digits.target]


def row(index: int, label: int, question: DigitsQuestion) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer(label)}]
    return {"id": f"digit-{index:04}", "image": image_name(index), "conversations": turns}


def image_name(index: int) -> str:
    return f"images/{index:04}.png"


def png(image: NDArray[np.uint8]) -> bytes:
    """[H, W] grey levels as a PNG with one stored deflate block. Compressed bytes, and with them the hash, would depend on the version of zlib.

    https://www.w3.org/TR/png-3/ sections 5 and 11; RFC 1950, RFC 1951 section 3.2.4. At most 65,535 bytes of pixels and filter marks.
    """
    height, width = image.shape
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    block = b"\x78\x01\x01" + struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF) + lines + struct.pack(">I", zlib.adler32(lines))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", block) + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
