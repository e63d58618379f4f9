"""Speed of the data check, compared with the minimum: json.load, and decoding every image with PIL, one after the other.

    python -m tests.benchmarks.data_check [--rows 100000] [--images 2000]

Both read the same files in the same run, separately for texts (rows without images) and photos (a small JPEG each). The parts of our check
are also measured separately: reading rows (all row formats), images (hash, decode, verify), lengths (the tokenizer of tiny_llava).
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tests.trainer.data.conftest import VICUNA, FakeProcessor, image_features
from trainer.data.length import LengthTally
from trainer.data.rows.sample import read_samples
from trainer.data.sample_check import examine_images, find_problems
from trainer.models.tiny_tokenizer import tiny_tokenizer

WORDS = "which of these is shown in the picture and what would one say of it if it were asked by a child".split()  # noqa: SIM905
SIZE = (320, 240)
IMAGE_TOKENS = 16
SPEC = SimpleNamespace(
    model=SimpleNamespace(template=VICUNA, image_token="<image>"),
    data=SimpleNamespace(max_length=2048, too_long="refuse", bad_rows="refuse"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=2_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="omnilaunch-data-") as name:
        folder = Path(name)
        compare("texts", write_texts(folder, arguments.rows), arguments.rows)
        compare("photos", write_photos(folder, arguments.images), arguments.images)


def compare(name: str, file: Path, rows: int) -> None:
    parts: dict[str, Took] = {}
    with timed(parts, "bare"):
        read_bare(file)
    with timed(parts, "rows"):
        samples, problems = read_samples(file, file.parent)
    with timed(parts, "images"):
        images = examine_images(image for sample in samples for image in sample.images)
    with timed(parts, "template"):
        wrong = list(find_problems(samples, images, VICUNA, "<image>"))
    with timed(parts, "lengths"):
        tally = LengthTally(SPEC, make_processor())  # type: ignore[arg-type]  # the parts of a spec that it reads
        tally.add(samples, lambda path: images[path].size)
        lengths = tally.lengths()
    assert not problems and not wrong and not lengths.problems and len(samples) == rows, "the generated data set must be valid"
    bare = parts.pop("bare")
    ours = Took(wall_s=sum(part.wall_s for part in parts.values()), cpu_s=sum(part.cpu_s for part in parts.values()))
    print(f"{name:7} {rows:,} rows: bare {rows / bare.wall_s:,.0f} rows/s, checked {rows / ours.wall_s:,.0f} rows/s")
    print(f"        {ours.wall_s / bare.wall_s:.2f} times the wall time, {ours.cpu_s / bare.cpu_s:.2f} times the processor time")
    for part, took in {"bare": bare, **parts}.items():
        print(f"        {part:9} {took.wall_s:8.2f} s, {1e6 * took.cpu_s / rows:8.1f} us of processor time per row")
    print(json.dumps({"set": name, "rows": rows} | {part: asdict(took) for part, took in {"bare": bare, **parts}.items()}))


def read_bare(file: Path) -> None:
    for row in json.loads(file.read_text(encoding="utf-8")):
        if "image" in row:
            with Image.open(file.parent / row["image"]) as image:
                image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Took:
    """`cpu_s`: of all threads; unlike `wall_s` it hardly depends on other load of the machine."""

    wall_s: float
    cpu_s: float


@contextmanager
def timed(parts: dict[str, Took], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    parts[name] = Took(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)


def make_processor() -> FakeProcessor:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return FakeProcessor(tokenizer=tokenizer, image_features=image_features, span=lambda size, place: (image,) * IMAGE_TOKENS)


def turns(rng: random.Random, mark: str = "") -> list[dict[str, str]]:
    asked, answered = (" ".join(rng.choices(WORDS, k=rng.randint(4, 60))) for _ in range(2))
    return [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": answered}]


def write_texts(folder: Path, count: int) -> Path:
    rng, file = random.Random(1), folder / "texts.json"
    file.write_text(json.dumps([{"id": row, "conversations": turns(rng)} for row in range(count)]), encoding="utf-8")
    return file


def write_photos(folder: Path, count: int) -> Path:
    """Different smooth colour fields, about 15 kB each."""
    rng, noise, file = random.Random(2), np.random.default_rng(2), folder / "photos.json"
    for row in range(count):
        small = Image.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{row}.jpg", quality=90)
    rows = [{"id": row, "image": f"{row}.jpg", "conversations": turns(rng, "<image>\n")} for row in range(count)]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
