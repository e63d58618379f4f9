"""The data check before a run: read all rows, decode all images, count all tokens. Imports torch only if lengths are measured."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from trainer.contract import DATA_PROBLEMS_FILE, SCHEMA, DataProblem, DataReport, DataSpec, InputRefused, LeftOutRow, StageSpec, TrainSpec
from trainer.contract.row_sets.row_set import as_entries, describe_entries
from trainer.data.digits import QUESTIONS, write_digits
from trainer.data.examination import DataExamination, SourceTally
from trainer.data.kept_check import find_check, keep_check, key_of_check
from trainer.data.left_out import count_left_out, hash_left_out
from trainer.data.media.image import hash_file
from trainer.data.media.store import MediaStore, store_of
from trainer.data.missing_root import name_roots
from trainer.data.rows.row_rules import DEFAULT, RowRules, rules_of
from trainer.data.sources.data_set import DataSet, Side, find_data
from trainer.data.summary import summarise

KEPT_PROBLEMS = 50
REUSED = "data: files and rules are unchanged since an earlier check, whose result is used"


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """The paths of the data. `train` and `evaluation` are None when the spec has none, and the first of several. `images` None: image paths start at
    the folder of the file that has them. `rules`: how rows are read. `data`: the options, with the files of a built-in set. `store`: for images that
    are not files."""

    train: Path | None
    evaluation: Path | None
    images: Path | None
    rules: RowRules = DEFAULT
    data: DataSpec | None = None
    store: MediaStore = field(default_factory=MediaStore)

    def images_of(self, file: Path) -> Path:
        """The folder that the image paths of an annotation file start at."""
        return self.images or file.parent

    def rows_of(self, side: Side) -> DataSet | None:
        """The sets of rows that the spec names, None for none. With a split, training rows and held-out rows have the same files."""
        return find_data(self.data, side, self.store) if self.data else None


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


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """`report` has the first KEPT_PROBLEMS of the `problems`. `hashes`: of every file. `left_out`: rows that are not used, or not as written."""

    report: DataReport
    problems: tuple[DataProblem, ...]
    hashes: dict[Path, str]
    left_out: tuple[LeftOutRow, ...] = ()


def examine_data(spec: TrainSpec, say: Callable[[str], None] = print) -> tuple[DataReport, tuple[DataProblem, ...], dict[Path, str]]:
    """The report, the problems and the hashes of `check_data`."""
    found = check_data(spec, say)
    return found.report, found.problems, found.hashes


def check_data(spec: TrainSpec, say: Callable[[str], None] = print) -> DataCheck:
    """Write the built-in set if the spec names one, read both annotation files, decode and hash every image, count the tokens of every text; or
    return the result of an earlier check, if the files and the rules are unchanged since (trainer.data.kept_check).

    `say` gets lines about the progress of a long check. Raises InputRefused for a spec without data.
    """
    prepare(spec.data)
    sets = needed(spec, paths_of(spec))
    began_ns = time.time_ns()
    key = key_of_check(spec, needed(spec, resolve(spec.data)))  # without the store, which names the run
    kept = find_check(spec.data, key)
    if kept is None:
        found = examine_sets(spec, sets, say)
        report = found.report
        if not found.problems and (report.summary.rows == 0 or not report.summary.unmeasured or spec.data.builtin):
            keep_check(spec.data, key, report, found.hashes, found.left_out, began_ns=began_ns)
    else:
        say(REUSED)
        found = DataCheck(report=kept.report, problems=(), hashes=dict(kept.hashes), left_out=kept.left_out)
    problems = found.problems or tuple(find_count_problems(spec, found.report))
    report = replace(found.report, problems=bound(problems), problem_count=len(problems))
    return replace(found, report=report, problems=problems)


def examine_sets(spec: TrainSpec, sets: Mapping[Side, DataSet], say: Callable[[str], None]) -> DataCheck:
    """As `check_data`, without the problems of the number of rows. Raises InputRefused for options that do not fit the rows."""
    examined = DataExamination(spec, say)
    examined.read(sets)
    hashes = hash_annotations(examined.tallies, sets) | {path: image.sha256 for path, image in examined.images.items()}
    listed = tuple(examined.left_out.listed)
    report = DataReport(
        schema=SCHEMA,
        sha256=hash_data(examined.tallies, sets, hashes, hash_left_out(listed)),
        train_rows=examined.count("train"),
        evaluation_rows=examined.count("evaluation"),
        images=len(examined.images),
        summary=summarise(examined.samples, examined.images.values(), examined.lengths.lengths()),
        learning=examined.facts.facts(),
        left_out=count_left_out(listed),
    )
    problems = name_roots(in_order(examined.problems), examined.folders, examined.images)
    return DataCheck(report=report, problems=problems, hashes=hashes, left_out=listed)


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


def paths_of(spec: TrainSpec) -> DataPaths:
    """As `resolve`, with the store of the run: each part of a run keeps embedded images at the same place, and the record names them below it."""
    return replace(resolve(spec.data), store=store_of(spec))


def resolve(data: DataSpec) -> DataPaths:
    """Relative paths start at `data.root`. Embedded images are kept in a folder for temporary files."""
    root, data = Path(data.root), with_builtin(data)
    train, evaluation = (next((root / entry.file for entry in as_entries(files)), None) for files in (data.train, data.evaluation))
    images = root / data.images if data.images else None
    return DataPaths(train=train, evaluation=evaluation, images=images, rules=rules_of(data), data=data)


def with_builtin(data: DataSpec) -> DataSpec:
    """With the files of the built-in set, where the spec names none."""
    known = BUILTIN.get(data.builtin)
    if known is None:
        return data
    evaluation = data.evaluation or ("" if data.split else known.evaluation)
    return replace(data, train=data.train or known.train, evaluation=evaluation, images=data.images or known.images)


def needed(spec: TrainSpec, paths: DataPaths) -> dict[Side, DataSet]:
    """The rows that the stage reads. Raises InputRefused when required ones are not configured."""
    sets: dict[Side, DataSet] = {}
    for side, required in sides_of(spec.stage):
        found = paths.rows_of(side)
        if found is None and required:
            fix = f"set data.{side} to an annotation file, or use data=digits"
            raise InputRefused(f"stage {spec.stage.name} needs data.{side}, which is empty\n    {fix}")
        if found is not None:
            sets[side] = found
    return sets


def sides_of(stage: StageSpec) -> tuple[tuple[Side, bool], ...]:
    """(key, required) of the rows that a stage reads. The input of an inference is not among them: stage infer checks it itself."""
    if stage.kind == "train":
        return (("train", True), ("evaluation", False))
    if stage.quantization is not None:
        return (("train", True),) * bool(stage.quantization.calibration) + (("evaluation", True),) * stage.quantization.compare
    return (("evaluation", True),) if stage.kind == "evaluate" else ()


def find_count_problems(spec: TrainSpec, report: DataReport) -> Iterator[DataProblem]:
    """Of a file to train on: fewer rows than a batch, in which rows would be repeated; and another number than the steps were planned for. A
    rerun repeats what its record did, and so does a resumed run, unless other data was accepted for it. Of any file: no row remains."""
    data, batch, rows = spec.data, spec.batch, report.train_rows
    left = report.left_out.get("train left out", 0)
    without = f" without the {left:,} that are left out" if left else ""
    if not report.evaluation_rows and report.left_out.get("evaluation left out"):
        fix = "correct them: data_left_out.jsonl has the reason of each; or leave data.evaluation empty"
        yield DataProblem(
            file=describe_entries(data.evaluation or data.train),
            row=0,
            field="",
            problem="has no row without those that are left out",
            fix=fix,
        )
    repeats = spec.expects is not None and "data" not in spec.accepted_changes
    if spec.stage.kind != "train" or data.builtin or repeats:
        return
    if rows < batch.global_batch:
        ranks = spec.device.world_size
        size = rows - rows % ranks
        fix = f"set stage.global_batch={size} or less" if size else f"add rows, or use fewer devices: each of {ranks} ranks needs one"
        problem = (
            f"has {rows:,} rows{without}, fewer than stage.global_batch={batch.global_batch}: a step would train on the same row twice"
        )
        yield DataProblem(file=describe_entries(data.train), row=0, field="", problem=problem, fix=fix)
    if data.rows and rows != data.rows:
        problem = f"has {rows:,} rows{without}, but run.epochs was turned into {spec.steps:,} steps for {data.rows:,} rows"
        yield DataProblem(file=describe_entries(data.train), row=0, field="", problem=problem, fix=f"launch it again with data.rows={rows}")


# ------------------------------------------------------------------------------------------------------------------- report


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


def hash_annotations(tallies: Mapping[Side, Sequence[SourceTally]], sets: Mapping[Side, DataSet]) -> dict[Path, str]:
    """The hash of each annotation file, and of the files with samples that a meta file lists; '' for a missing file."""
    return {part: hash_file(part) if part.is_file() else "" for side, found in tallies.items() for part in parts_of(sets[side], found)}


def hash_data(
    tallies: Mapping[Side, Sequence[SourceTally]], sets: Mapping[Side, DataSet], hashes: Mapping[Path, str], left_out: str = ""
) -> str:
    """SHA-256 over the hashes of each annotation file and of the images of its rows, in order, and of the rows that are left out; and over the
    options that choose rows. Independent of the paths."""
    digest = hashlib.sha256()
    for side, found in tallies.items():
        for part in parts_of(sets[side], found):
            digest.update(hashes[part].encode())
        digest.update(sets[side].chosen.encode())
        for tally in found:
            for _ in range(tally.times):
                for picture in tally.pictures:
                    digest.update(picture.encode())
    digest.update(left_out.encode())
    return digest.hexdigest()


def parts_of(found: DataSet, tallies: Sequence[SourceTally]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((*found.listing, *(tally.file for tally in tallies if tally.samples))))
