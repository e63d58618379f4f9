"""One pass over all rows of a data check, some hundred at a time: what it keeps is small, and grows by the images and by a digest of each row."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trainer.contract import DataProblem, TrainSpec
from trainer.contract.annotation_file import count_repeated
from trainer.data.chat.system_choice import choose_system
from trainer.data.containers.found import Position
from trainer.data.grounding.placement import name_conversion
from trainer.data.learning_facts import FactTally
from trainer.data.left_out import LeftOutTally, Use
from trainer.data.length import LengthTally
from trainer.data.media.image import Examined
from trainer.data.rows.row_choice import choose_rows
from trainer.data.rows.sample import Conversation, Sample, stream_source
from trainer.data.rows.selection import Numbers, RowSelection
from trainer.data.sample_check import examine_images, find_moved_boxes, find_problems, find_wrong_boxes
from trainer.data.sources.data_set import DataSet, Side
from trainer.data.sources.source import AnnotationSource
from trainer.data.summary import SampleTally

CHUNK = 512  # rows at a time
REPORT_S = 10.0  # between two lines that report the progress
Times = Callable[[Sample], int]

BUILT_IN = "the rows of a built-in set are a few words long"


class SourceTally:
    """What the hash of the data needs of a source: the number of its samples, and the hashes of their images, in order. `times`: how often its rows
    are used, 1 where each has a number of its own; `uses`: of all its samples together. `read`: conversations, those of rows that are left out too."""

    def __init__(self, file: Path, times: int) -> None:
        self.file, self.times, self.samples, self.read, self.uses = file, times, 0, 0, 0
        self.wanted: int | None = None  # conversations of a part of the file
        self.pictures: list[str] = []


class DataExamination:
    """`read` all annotation files once, first that of the training rows. A sample that occurs in several places is examined once."""

    def __init__(self, spec: TrainSpec, say: Callable[[str], None]) -> None:
        self.spec, self.say, self.images = spec, say, dict[Path, Examined]()
        self.samples, self.facts = SampleTally(), FactTally()
        self.lengths = LengthTally(spec, unmeasured=BUILT_IN if spec.data.builtin else "")
        self.row_problems: list[DataProblem] = []
        self.wrong: list[DataProblem] = []
        self.moved: list[DataProblem] = []
        self.left_out = LeftOutTally(skips=spec.data.bad_rows == "skip")
        self.tallies: dict[Side, list[SourceTally]] = {}
        self.seen: dict[Path, set[tuple[int, int]]] = {}  # samples of files that are read more than once
        self.folders: dict[str, Path] = {}  # annotation file -> the folder that its image paths start at
        self.held_out_rows: int | None = None  # of files that are also trained on, all of them

    def read(self, sets: Mapping[Side, DataSet]) -> None:
        """First the training rows."""
        training, held_out = sets.get("train"), sets.get("evaluation")
        same = training is not None and held_out is not None and is_same(training, held_out)
        chosen = {side: choose_rows(found) for side, found in sets.items()}
        read = [source.file for side, found in sets.items() if side == "train" or not same for source in found.sources]
        self.seen = {file: set() for file, count in Counter(read).items() if count > 1}
        self.folders = {str(source.file): source.images for found in sets.values() for source in found.sources}
        progress = ReadingProgress(self.say, read)
        for side, found in sets.items():
            if side == "train" or not same:
                self.row_problems += found.problems
                parts = divide(chosen[side], found.sources)
                self.tallies[side] = [self._read_source(*each, side, progress) for each in zip(found.sources, parts, strict=True)]
        if same and held_out is not None:
            self.held_out_rows = sum(map(self._read_held_out, held_out.sources))

    def count(self, side: Side) -> int:
        """The samples of a side, repeated ones included."""
        if side == "evaluation" and self.held_out_rows is not None:
            return self.held_out_rows
        return sum(tally.uses for tally in self.tallies.get(side, ()))

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        return (*self.row_problems, *self.wrong, *self.lengths.problems, *self.moved)

    def _read_source(self, source: AnnotationSource, uses: Numbers | None, side: Side, progress: "ReadingProgress") -> SourceTally:
        """`uses`: how often each conversation is used; None: as the source says."""
        tally = SourceTally(source.file, max(1, int(source.repeat)) if uses is None else 1)
        if side == "evaluation" and uses is None:  # else each row is on one side
            self.left_out.take_over(str(source.file))
        for found in in_chunks(stream_source(source, progress.begin())):
            used = used_part(found, source, tally, uses)
            judged = [each for each, _ in used] if uses is not None else found
            self.row_problems += self.left_out.sort_out((problem for each in judged for problem in each.problems), side)
            times, system = times_of(used), self.spec.data.system
            kept = [choose_system(each.sample, system) for each, _ in used if each.sample is not None]
            samples = self._examine(kept, source.file, use=side, times=times)
            tally.samples += len(samples)
            tally.uses += sum(map(times, samples))
            tally.pictures += (self.images[path].sha256 for sample in samples for path in sample.images)
            progress.add(len(found))
        progress.end()
        return tally

    def _examine(self, samples: list[Sample], file: Path, *, use: Use, times: Times) -> list[Sample]:
        """Returns the samples that are used."""
        samples = self.left_out.without(samples, use)
        new = dict.fromkeys(path for sample in samples for path in sample.images if path not in self.images)
        if new:
            self.images |= examine_images(new, truncated=self.spec.data.truncated_images == "read")
        seen = self.seen.get(file)
        fresh = samples if seen is None else [sample for sample in samples if (sample.row, sample.part) not in seen]
        if seen is not None:
            seen.update((sample.row, sample.part) for sample in samples)
        template = self.lengths.find_template() if fresh else None
        wrong = list(find_problems(fresh, self.images, template, self.spec.model.image_token))
        wrong += find_wrong_boxes(fresh, self.images, self.spec.data.boxes)
        moved = list(find_moved_boxes(samples, self.spec.data.augmentation)) if use == "train" else []
        bad = {(problem.file, problem.row) for problem in wrong}
        self.wrong += self.left_out.sort_out(wrong, use)
        self.moved += self.left_out.sort_out(moved, use, always=False)
        whole = [sample for sample in self.left_out.without(fresh, use) if (sample.file, sample.row) not in bad]
        self._measure(whole, use)
        return self._tally(self.left_out.without(samples, use), self.left_out.without(fresh, use), use=use, times=times)

    def _measure(self, samples: list[Sample], use: Use) -> None:
        lengths = self.lengths
        before, cut = len(lengths.problems), len(lengths.cut)
        lengths.add(samples, lambda path: self.images[path].size, training=use == "train")
        lengths.problems[before:] = self.left_out.sort_out(lengths.problems[before:], use)
        self.left_out.leave_out(lengths.too_long, use)
        lengths.too_long.clear()
        self.left_out.list_cut(lengths.cut[cut:])

    def _tally(self, samples: list[Sample], fresh: list[Sample], *, use: Use, times: Times) -> list[Sample]:
        for sample in samples:
            add = self.facts.add_training if use == "train" else self.facts.add_held_out
            add(sample, self.images, times(sample))
        for sample in fresh:
            converted = name_conversion(sample, self.spec.data.boxes)
            adjustments = (*sample.adjustments, *converted)
            self.samples.add(images=bool(sample.images), adjustments=adjustments, ignored=sample.ignored, warnings=sample.warnings)
        self.left_out.list_adjusted(samples, use)
        return samples

    def _read_held_out(self, source: AnnotationSource) -> int:
        """Of a file that is also trained on: the number of its samples."""
        self.left_out.take_over(str(source.file))
        tally, times = SourceTally(source.file, 1), max(1, int(source.repeat))
        for found in in_chunks(stream_source(source)):
            self.left_out.sort_out((problem for each in found for problem in each.problems), "evaluation")
            samples = [each.sample for each, _ in used_part(found, source, tally) if each.sample is not None]
            for sample in self.left_out.without(samples, "evaluation"):
                self.facts.add_held_out(sample, self.images, times)
                tally.samples += 1
        return tally.samples * times


def in_chunks(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    """Some hundred at a time. All conversations of a row are in one part."""
    chunk: list[Conversation] = []
    for each in conversations:
        if len(chunk) >= CHUNK and each.row != chunk[-1].row:
            yield chunk
            chunk = []
        chunk.append(each)
    if chunk:
        yield chunk


def used_part(
    found: Sequence[Conversation], source: AnnotationSource, tally: SourceTally, uses: Numbers | None = None
) -> list[tuple[Conversation, int]]:
    """The conversations that are used, and how often: as `trainer.data.rows.sample.read_set`. Problems of the whole file are among them."""
    before = tally.read
    tally.read += sum(each.row > 0 for each in found)
    if uses is not None:
        times = iter(uses[before : tally.read].tolist())
        return [(each, count) for each in found if (count := next(times, 0) if each.row else 1)]
    if source.repeat >= 1:
        return [(each, tally.times) for each in found]
    if tally.wanted is None:
        tally.wanted = count_repeated(sum(each.row > 0 for each in stream_source(source)), source.repeat)
    return [(each, 1) for each in found if each.row][: max(0, tally.wanted - before)]


def times_of(used: Sequence[tuple[Conversation, int]]) -> Times:
    """How often a sample is used."""
    times = {(each.sample.row, each.sample.part): count for each, count in used if each.sample is not None}
    return lambda sample: times[sample.row, sample.part]


def divide(selection: RowSelection | None, sources: Sequence[AnnotationSource]) -> Iterator[Numbers | None]:
    """How often each conversation of each source is used; None for each without a selection."""
    if selection is None:
        yield from (None for _ in sources)
        return
    times, first = selection.times(), 0
    for rows in selection.sources:
        yield times[first : first + rows]
        first += rows


def is_same(training: DataSet, held_out: DataSet) -> bool:
    """Whether all training rows are held-out rows, too."""
    return training.sources == held_out.sources and training.part == held_out.part == "all" and training.chosen == held_out.chosen


class ReadingProgress:
    """Says how far a long check is, by the bytes of its files."""

    def __init__(self, say: Callable[[str], None], files: Sequence[Path]) -> None:
        self.say, self.total = say, sum(file.stat().st_size for file in files if file.is_file())
        self.before = self.rows = 0
        self.position = Position()
        self.said_at = time.monotonic()

    def begin(self) -> Position:
        self.position = Position()
        return self.position

    def add(self, rows: int) -> None:
        self.rows += rows
        if time.monotonic() - self.said_at >= REPORT_S:
            self.said_at = time.monotonic()
            share = 100 * min(1.0, (self.before + self.position.bytes_read) / (self.total or 1))
            self.say(f"data: {self.rows:,} rows checked, {share:.0f} % of the files")

    def end(self) -> None:
        self.before += self.position.size
