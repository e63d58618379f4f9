"""The data check before a run: read all rows, decode all images, count all tokens. Imports torch only if lengths are measured."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.contract import DATA_PROBLEMS_FILE, SCHEMA, DataProblem, DataReport, DataSpec, InputRefused, StageSpec, TrainSpec
from trainer.data.digits import QUESTIONS, write_digits
from trainer.data.learning_facts import collect_facts
from trainer.data.length import Lengths, measure
from trainer.data.media.image import Examined, hash_file
from trainer.data.rows.sample import Sample, read_samples
from trainer.data.sample_check import examine_images, find_moved_boxes, find_problems
from trainer.data.summary import summarise

KEPT_PROBLEMS = 50

Read = tuple[tuple[Sample, ...], tuple[DataProblem, ...]]


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """The paths of the data. `train` and `evaluation` are None when the spec has none. `images` None: image paths start at the folder of
    the file that has them."""

    train: Path | None
    evaluation: Path | None
    images: Path | None

    def images_of(self, file: Path) -> Path:
        """The folder that the image paths of an annotation file start at."""
        return self.images or file.parent


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A data set that the trainer writes itself: `write(root)` creates the files, at these paths below root."""

    write: Callable[[Path], None]
    train: str
    evaluation: str
    images: str


BUILTIN = {
    name: Builtin(write=partial(write_digits, name=name), train=f"{name}/train.json", evaluation=f"{name}/evaluation.json", images=name)
    for name in QUESTIONS
}


def examine_data(spec: TrainSpec) -> tuple[DataReport, tuple[DataProblem, ...], dict[Path, str]]:
    """Write the built-in set if the spec names one, read both annotation files, decode and hash every image, count the tokens of every text.

    Returns the report (with the first KEPT_PROBLEMS problems), all problems, and the hash of every file. Raises InputRefused for a spec
    without data.
    """
    prepare(spec.data)
    paths = resolve(spec.data)
    files = needed(spec, paths)
    read = {file: read_samples(file, paths.images_of(file)) for file in files}
    samples = distinct(read)
    images = examine_images(image for sample in samples for image in sample.images)
    row_problems = (problem for _, problems in read.values() for problem in problems)
    wrong = tuple(find_problems(samples, images, spec.model.template, spec.model.image_token))
    lengths = measure_whole(samples, wrong, images, spec)
    train, held_out = (read[file][0] if file in read else () for file in (paths.train, paths.evaluation))
    moved = find_moved_boxes(train, spec.data.augmentation)
    problems = in_order((*row_problems, *wrong, *lengths.problems, *moved)) or tuple(find_count_problems(spec, len(train)))
    hashes = hash_annotations(read) | {path: image.sha256 for path, image in images.items()}
    report = DataReport(
        schema=SCHEMA,
        sha256=hash_data(read, hashes),
        train_rows=len(train),
        evaluation_rows=len(held_out),
        images=len(images),
        problems=bound(problems),
        problem_count=len(problems),
        summary=summarise(samples, images, lengths),
        learning=collect_facts(train, held_out, images),
    )
    return report, problems, hashes


def prepare(data: DataSpec) -> None:
    """Write the built-in set, if the spec names one. Raises InputRefused for an unknown name or a folder that cannot be written."""
    if data.builtin and data.builtin not in BUILTIN:
        raise InputRefused(
            f"data.builtin={data.builtin!r} is not known\n    valid values: {', '.join(BUILTIN)}, or '' to use your own files"
        )
    if not data.builtin:
        return
    try:
        BUILTIN[data.builtin].write(Path(data.root))
    except OSError as error:
        fix = "free disk space there, make the folder writable, or set cluster.root to another folder"
        raise InputRefused(f"data.root={data.root}: cannot write the built-in set {data.builtin}: {error}\n    {fix}") from error


def resolve(data: DataSpec) -> DataPaths:
    """Relative paths start at `data.root`."""
    root = Path(data.root)
    known = BUILTIN.get(data.builtin)
    train = data.train or (known.train if known else "")
    evaluation = data.evaluation or (known.evaluation if known else "")
    images = data.images or (known.images if known else "")
    return DataPaths(
        train=root / train if train else None,
        evaluation=root / evaluation if evaluation else None,
        images=root / images if images else None,
    )


def needed(spec: TrainSpec, paths: DataPaths) -> tuple[Path, ...]:
    """The annotation files that the stage reads. Raises InputRefused when a required one is not configured."""
    files: list[Path] = []
    for key, required in files_of(spec.stage):
        file: Path | None = getattr(paths, key)
        if file is None and required:
            fix = f"set data.{key} to an annotation file, or use data=digits"
            raise InputRefused(f"stage {spec.stage.name} needs data.{key}, which is empty\n    {fix}")
        files += [file] if file else []
    return tuple(files)


def files_of(stage: StageSpec) -> tuple[tuple[str, bool], ...]:
    """(key, required) of the annotation files that a stage reads. The input of an inference is not among them: stage infer checks it itself."""
    if stage.kind == "train":
        return (("train", True), ("evaluation", False))
    if stage.quantization is not None:
        return (("train", True),) * bool(stage.quantization.calibration) + (("evaluation", True),) * stage.quantization.compare
    return (("evaluation", True),) if stage.kind == "evaluate" else ()


def find_count_problems(spec: TrainSpec, rows: int) -> Iterator[DataProblem]:
    """Of a file to train on: fewer rows than a batch, in which rows would be repeated; and another number than the steps were planned for. A
    rerun repeats what its record did, and so does a resumed run, unless other data was accepted for it."""
    data, batch = spec.data, spec.batch
    repeats = spec.expects is not None and "data" not in spec.accepted_changes
    if spec.stage.kind != "train" or data.builtin or repeats:
        return
    if rows < batch.global_batch:
        ranks = spec.device.world_size
        size = rows - rows % ranks
        fix = f"set stage.global_batch={size} or less" if size else f"add rows, or use fewer devices: each of {ranks} ranks needs one"
        problem = f"has {rows:,} rows, fewer than stage.global_batch={batch.global_batch}: a step would train on the same row twice"
        yield DataProblem(file=data.train, row=0, field="", problem=problem, fix=fix)
    if data.rows and rows != data.rows:
        problem = f"has {rows:,} rows, but run.epochs was turned into {spec.steps:,} steps for {data.rows:,} rows"
        yield DataProblem(file=data.train, row=0, field="", problem=problem, fix=f"launch it again with data.rows={rows}")


# ------------------------------------------------------------------------------------------------------------------- report


def distinct(read: dict[Path, Read]) -> tuple[Sample, ...]:
    """Every sample once, even if its rows are repeated."""
    return tuple({(sample.file, sample.row, sample.part): sample for samples, _ in read.values() for sample in samples}.values())


def measure_whole(samples: tuple[Sample, ...], wrong: tuple[DataProblem, ...], images: dict[Path, Examined], spec: TrainSpec) -> Lengths:
    """Lengths of the samples without problems."""
    if spec.data.builtin:
        return Lengths(unmeasured="the rows of a built-in set are a few words long")
    bad = {(problem.file, problem.row) for problem in wrong}
    whole = [sample for sample in samples if (sample.file, sample.row) not in bad]
    return (
        measure(whole, {path: image.size for path, image in images.items()}, spec)
        if whole
        else Lengths(unmeasured="every row has a problem")
    )


def in_order(problems: Iterable[DataProblem]) -> tuple[DataProblem, ...]:
    """Grouped by file, in the order in which the files first appear; by row within a file."""
    listed = list(problems)
    files = {file: number for number, file in enumerate(dict.fromkeys(problem.file for problem in listed))}
    return tuple(sorted(listed, key=lambda problem: (files[problem.file], problem.row)))


def bound(problems: tuple[DataProblem, ...]) -> tuple[DataProblem, ...]:
    """At most KEPT_PROBLEMS, followed by one entry with the number of the others."""
    kept, others = problems[:KEPT_PROBLEMS], problems[KEPT_PROBLEMS:]
    if not others:
        return kept
    fix = f"fix these and check again; {DATA_PROBLEMS_FILE} in the run's folder has all of them"
    return (*kept, DataProblem(file=others[0].file, row=0, field="", problem=f"{len(others)} more problems", fix=fix))


def hash_annotations(read: dict[Path, Read]) -> dict[Path, str]:
    """The hash of each annotation file, and of the files that a meta file lists; '' for a missing file."""
    parts = {part for file, (samples, _) in read.items() for part in (file, *(Path(sample.file) for sample in samples))}
    return {part: hash_file(part) if part.is_file() else "" for part in parts}


def hash_data(read: dict[Path, Read], hashes: dict[Path, str]) -> str:
    """SHA-256 over the hashes of each annotation file and of the images of its rows, in order. Independent of the paths."""
    digest = hashlib.sha256()
    for file, (samples, _) in read.items():
        for part in dict.fromkeys((file, *(Path(sample.file) for sample in samples))):
            digest.update(hashes[part].encode())
        for sample in samples:
            for path in sample.images:
                digest.update(hashes[path].encode())
    return digest.hexdigest()
