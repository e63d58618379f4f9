"""Everything about the data that can be known before a rank is started. Torch is imported only where there are lengths to be counted."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.contract import DATA_PROBLEMS_FILE, SCHEMA, DataProblem, DataReport, DataSpec, InputRefused, StageSpec, TrainSpec
from trainer.data.digits import QUESTIONS, write_digits
from trainer.data.finding import examine_images, find_problems
from trainer.data.length import Lengths, measure
from trainer.data.media.image import Examined, hash_file
from trainer.data.rows.sample import Sample, read_samples
from trainer.data.summary import summarise

KEPT_PROBLEMS = 50

Read = tuple[tuple[Sample, ...], tuple[DataProblem, ...]]


@dataclass(frozen=True, kw_only=True)
class DataPaths:
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


BUILTIN = {
    name: Builtin(write=partial(write_digits, name=name), train=f"{name}/train.json", evaluation=f"{name}/evaluation.json", images=name)
    for name in QUESTIONS
}


def check_data(spec: TrainSpec) -> DataReport:
    """What `examine_data` finds, with the first KEPT_PROBLEMS of the problems. Raises InputRefused for a spec that names no data."""
    return examine_data(spec)[0]


def examine_data(spec: TrainSpec) -> tuple[DataReport, tuple[DataProblem, ...], dict[Path, str]]:
    """Write the builtin set if the spec names one, read both annotation files, decode and hash every image, count every text's tokens.

    The report, all problems of all rows, and the hash of every file. Raises InputRefused for a spec that names no data.
    """
    prepare(spec.data)
    places = resolve(spec.data)
    files = needed(spec, places)
    read = {file: read_samples(file, places.images) for file in files}
    samples = distinct(read)
    images = examine_images(image for sample in samples for image in sample.images)
    unread = (problem for _, problems in read.values() for problem in problems)
    wrong = tuple(find_problems(samples, images, spec.model.template, spec.model.image_token))
    lengths = measure_whole(samples, wrong, images, spec)
    problems = in_order((*unread, *wrong, *lengths.problems))
    hashes = hash_annotations(read) | {path: image.sha256 for path, image in images.items()}
    report = DataReport(
        schema=SCHEMA,
        sha256=hash_data(read, hashes),
        train_rows=len(read[places.train][0]) if places.train in read else 0,
        evaluation_rows=len(read[places.evaluation][0]) if places.evaluation in read else 0,
        images=len(images),
        problems=bound(problems),
        problem_count=len(problems),
        summary=summarise(samples, images, lengths),
    )
    return report, problems, hashes


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


def resolve(data: DataSpec) -> DataPaths:
    """Absolute paths stay; others lie below `data.root`. Without `data.images`, images lie beside the first annotation file."""
    root = Path(data.root)
    known = BUILTIN.get(data.builtin)
    train = data.train or (known.train if known else "")
    evaluation = data.evaluation or (known.evaluation if known else "")
    images = data.images or (known.images if known else str((root / (train or evaluation)).parent))
    return DataPaths(
        train=root / train if train else None,
        evaluation=root / evaluation if evaluation else None,
        images=root / images,
    )


def needed(spec: TrainSpec, places: DataPaths) -> tuple[Path, ...]:
    """Raises InputRefused when a file that the stage is about is not named."""
    files: list[Path] = []
    for key, must in asked_of(spec.stage):
        file: Path | None = getattr(places, key)
        if file is None and must:
            fix = f"set data.{key} to an annotation file, or take data=digits"
            raise InputRefused(f"stage {spec.stage.name} needs data.{key}, which is empty\n    {fix}")
        files += [file] if file else []
    return tuple(files)


def asked_of(stage: StageSpec) -> tuple[tuple[str, bool], ...]:
    """Which files a stage reads, and whether it cannot do without. Those of an inference are looked at row by row as they are answered."""
    if stage.kind == "train":
        return (("train", True), ("evaluation", False))
    if stage.quantization is not None:
        return (("train", True),) * bool(stage.quantization.calibration) + (("evaluation", True),) * stage.quantization.compare
    return (("evaluation", True),) if stage.kind == "evaluate" else ()


# -------------------------------------------------------------------------------------------------------------- what was found


def distinct(read: dict[Path, Read]) -> tuple[Sample, ...]:
    """Every sample once, however often its rows count."""
    return tuple({(sample.file, sample.row, sample.part): sample for samples, _ in read.values() for sample in samples}.values())


def measure_whole(samples: tuple[Sample, ...], wrong: tuple[DataProblem, ...], images: dict[Path, Examined], spec: TrainSpec) -> Lengths:
    """Lengths of the samples that nothing is wrong with."""
    if spec.data.builtin:
        return Lengths(unmeasured="the rows of a built-in set are a few words long")
    bad = {(problem.file, problem.row) for problem in wrong}
    whole = [sample for sample in samples if (sample.file, sample.row) not in bad]
    return measure(whole, {path: image.size for path, image in images.items()}, spec) if whole else Lengths(unmeasured="no row can be read")


def in_order(problems: Iterable[DataProblem]) -> tuple[DataProblem, ...]:
    """File after file as they were first named, by row."""
    listed = list(problems)
    files = {file: place for place, file in enumerate(dict.fromkeys(problem.file for problem in listed))}
    return tuple(sorted(listed, key=lambda problem: (files[problem.file], problem.row)))


def bound(problems: tuple[DataProblem, ...]) -> tuple[DataProblem, ...]:
    """At most KEPT_PROBLEMS, and one line more that counts the others."""
    kept, others = problems[:KEPT_PROBLEMS], problems[KEPT_PROBLEMS:]
    if not others:
        return kept
    fix = f"mend these and check again; all of them are in {DATA_PROBLEMS_FILE}"
    return (*kept, DataProblem(file=others[0].file, row=0, field="", problem=f"{len(others)} more problems", fix=fix))


def hash_annotations(read: dict[Path, Read]) -> dict[Path, str]:
    """Of each annotation file and of those that it lists; '' for one that is not there."""
    parts = {part for file, (samples, _) in read.items() for part in (file, *(Path(sample.file) for sample in samples))}
    return {part: hash_file(part) if part.is_file() else "" for part in parts}


def hash_data(read: dict[Path, Read], hashes: dict[Path, str]) -> str:
    """SHA-256 over the hash of each annotation file and then of its rows' images, in order. Where the files lie does not matter."""
    digest = hashlib.sha256()
    for file, (samples, _) in read.items():
        for part in dict.fromkeys((file, *(Path(sample.file) for sample in samples))):
            digest.update(hashes[part].encode())
        for sample in samples:
            for path in sample.images:
                digest.update(hashes[path].encode())
    return digest.hexdigest()
