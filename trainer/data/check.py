"""Everything about the data that can be known before a rank is started. Imports neither torch nor transformers."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainer.contract import SCHEMA, DataProblem, DataReport, DataSpec, InputRefused, TrainSpec
from trainer.data.digits import write_digits
from trainer.data.image import hash_file, verify_image
from trainer.data.sample import Sample, read_samples
from trainer.data.segment import find_template_problems

KEPT_PROBLEMS = 50
CHUNK = 4096  # images in flight: futures of a million at once would take a gigabyte


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the data lies. `train` and `evaluation` are None when the spec names none."""

    train: Path | None
    evaluation: Path | None
    images: Path


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A set that the trainer writes itself: `write(root)` makes the files, which lie at these paths below root."""

    write: Callable[[Path], None]
    train: str
    evaluation: str
    images: str


BUILTIN = {"digits": Builtin(write=write_digits, train="digits/train.json", evaluation="digits/evaluation.json", images="digits")}


def check_data(spec: TrainSpec) -> DataReport:
    """Write the builtin set if the spec names one, read both annotation files, decode and hash every image.

    Problems of all rows are collected, the first KEPT_PROBLEMS kept. Raises InputRefused for a spec that names no data.
    """
    prepare(spec.data)
    places = resolve(spec.data)
    files = [file for file in needed(spec, places) if file]
    read = {file: read_samples(file, places.images) for file in files}
    images = inspect_images(image for samples, _ in read.values() for sample in samples for image in sample.images)
    problems = [problem for found in read.values() for problem in find_problems(spec, *found, images)]
    return DataReport(
        schema=SCHEMA,
        sha256=hash_data(read, images),
        train_rows=len(read[places.train][0]) if places.train in read else 0,
        evaluation_rows=len(read[places.evaluation][0]) if places.evaluation in read else 0,
        images=len(images),
        problems=bound(problems),
    )


def prepare(data: DataSpec) -> None:
    """Write the builtin set, if there is one. Raises InputRefused for an unknown name or a folder that cannot be written."""
    if data.builtin and data.builtin not in BUILTIN:
        raise InputRefused(f"data.builtin={data.builtin!r} is not known\n    valid are: {', '.join(BUILTIN)}, or '' for files of your own")
    if not data.builtin:
        return
    try:
        BUILTIN[data.builtin].write(Path(data.root))
    except OSError as error:
        fix = "make room there or make it writable, or set cluster.root to another folder"
        raise InputRefused(f"data.root={data.root}: the set {data.builtin} cannot be written: {error}\n    {fix}") from error


def resolve(data: DataSpec) -> Places:
    """Absolute paths stay; others lie below `data.root`. Without `data.images`, images lie beside the first annotation file."""
    root = Path(data.root)
    known = BUILTIN.get(data.builtin)
    train = data.train or (known.train if known else "")
    evaluation = data.evaluation or (known.evaluation if known else "")
    images = data.images or (known.images if known else str((root / (train or evaluation)).parent))
    return Places(
        train=root / train if train else None,
        evaluation=root / evaluation if evaluation else None,
        images=root / images,
    )


def needed(spec: TrainSpec, places: Places) -> tuple[Path | None, ...]:
    """Raises InputRefused when the file that the stage is about is not named."""
    key, file = ("train", places.train) if spec.stage.kind == "train" else ("evaluation", places.evaluation)
    if file is None:
        fix = f"set data.{key} to an annotation file, or take data=digits"
        raise InputRefused(f"stage {spec.stage.name} needs data.{key}, which is empty\n    {fix}")
    return (places.train, places.evaluation) if spec.stage.kind == "train" else (places.evaluation,)


# ---------------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True, kw_only=True)
class Inspected:
    sha256: str
    problem: str | None


def inspect_images(paths: Iterable[Path]) -> dict[Path, Inspected]:
    """Decode and hash every image once, on all cores: Pillow and hashlib let go of the interpreter lock."""
    distinct = iter(dict.fromkeys(paths))
    found: dict[Path, Inspected] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(distinct, CHUNK)):
            found.update(zip(chunk, pool.map(inspect_image, chunk), strict=True))
    return found


def inspect_image(path: Path) -> Inspected:
    try:
        digest = hash_file(path)
    except OSError as error:
        return Inspected(sha256="", problem=f"cannot be read: {error.strerror}")
    return Inspected(sha256=digest, problem=verify_image(path))


def find_problems(
    spec: TrainSpec, samples: tuple[Sample, ...], problems: tuple[DataProblem, ...], images: dict[Path, Inspected]
) -> Iterator[DataProblem]:
    yield from sorted([*problems, *find_image_problems(samples, images), *find_misfits(samples, spec)], key=lambda problem: problem.row)


def find_image_problems(samples: tuple[Sample, ...], images: dict[Path, Inspected]) -> Iterator[DataProblem]:
    for sample in samples:
        for path in sample.images:
            if images[path].problem:
                yield DataProblem(
                    file=sample.file,
                    row=sample.row,
                    field="image",
                    problem=f"{path} {images[path].problem}",
                    fix="replace the image file, or leave the row out",
                )


def find_misfits(samples: tuple[Sample, ...], spec: TrainSpec) -> Iterator[DataProblem]:
    for sample in samples:
        yield from find_template_problems(sample, spec.model.template, spec.model.image_token)


def bound(problems: list[DataProblem]) -> tuple[DataProblem, ...]:
    """At most KEPT_PROBLEMS, and one line more that counts the others."""
    kept, others = problems[:KEPT_PROBLEMS], problems[KEPT_PROBLEMS:]
    if not others:
        return tuple(kept)
    count = DataProblem(file=others[0].file, row=0, field="", problem=f"{len(others)} more problems", fix="mend these and check again")
    return (*kept, count)


def hash_data(read: dict[Path, tuple[tuple[Sample, ...], tuple[DataProblem, ...]]], images: dict[Path, Inspected]) -> str:
    """SHA-256 over the hash of each annotation file and then of its rows' images, in order. Where the files lie does not matter."""
    digest = hashlib.sha256()
    for file, (samples, _) in read.items():
        digest.update(hash_file(file).encode() if file.is_file() else b"")
        for sample in samples:
            for path in sample.images:
                digest.update(images[path].sha256.encode())
    return digest.hexdigest()
