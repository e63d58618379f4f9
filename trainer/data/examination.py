"""One pass over all rows of a data check, some hundred at a time: what it keeps is small, and grows by the images and by a digest of each row."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.contract import DataProblem, TrainSpec
from trainer.contract.annotation_file import count_repeated
from trainer.data.containers.annotation import Position
from trainer.data.learning_facts import FactTally
from trainer.data.left_out import LeftOutTally, Use
from trainer.data.length import LengthTally
from trainer.data.media.image import Examined
from trainer.data.rows.row_rules import rules_of
from trainer.data.rows.sample import Conversation, Sample, stream_source
from trainer.data.sample_check import examine_images, find_moved_boxes, find_problems
from trainer.data.sources.source import AnnotationSource, find_sources
from trainer.data.summary import SampleTally

CHUNK = 512  # rows at a time
REPORT_S = 10.0  # between two lines that report the progress
BUILT_IN = "the rows of a built-in set are a few words long"


class SourceTally:
    """What the hash of the data needs of a source: the number of its samples, and the hashes of their images, in order. `times`: how often its rows
    are used. `read`: conversations, those of rows that are left out too."""

    def __init__(self, file: Path, times: int) -> None:
        self.file, self.times, self.samples, self.read = file, times, 0, 0
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
        self.tallies: dict[Path, list[SourceTally]] = {}
        self.seen: dict[Path, set[tuple[int, int]]] = {}  # samples of files that are read more than once
        self.folders: dict[str, Path] = {}  # annotation file -> the folder that its image paths start at
        self.held_out_rows: int | None = None  # of a file that is also trained on

    def read(self, training: Path | None, held_out: Path | None, images_of: Callable[[Path], Path]) -> None:
        files = tuple(dict.fromkeys(file for file in (training, held_out) if file))
        found = {file: find_sources(file, images_of(file), rules_of(self.spec.data)) for file in files}
        read = [source.file for sources, _ in found.values() for source in sources]
        self.seen = {file: set() for file, count in Counter(read).items() if count > 1}
        self.folders = {str(source.file): source.images for sources, _ in found.values() for source in sources}
        progress = ReadingProgress(self.say, read)
        for file, (sources, problems) in found.items():
            self.row_problems += problems
            self.tallies[file] = [self._read_source(source, file == training, progress) for source in sources]
        if held_out is not None and held_out == training:
            self.held_out_rows = sum(self._read_held_out(source) for source in found[held_out][0])

    def count(self, file: Path) -> int:
        """The samples of a file, repeated ones included."""
        return sum(tally.samples * tally.times for tally in self.tallies.get(file, ()))

    def count_held_out(self, file: Path) -> int:
        return self.count(file) if self.held_out_rows is None else self.held_out_rows

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        return (*self.row_problems, *self.wrong, *self.lengths.problems, *self.moved)

    def _read_source(self, source: AnnotationSource, training: bool, progress: "ReadingProgress") -> SourceTally:
        tally, use = SourceTally(source.file, max(1, int(source.repeat))), "train" if training else "evaluation"
        if not training:
            self.left_out.take_over(str(source.file))
        for found in in_chunks(stream_source(source, progress.begin())):
            self.row_problems += self.left_out.sort_out((problem for each in found for problem in each.problems), use)
            used = used_part(found, source, tally)
            samples = self._examine([each.sample for each in used if each.sample is not None], source.file, use=use, times=tally.times)
            tally.samples += len(samples)
            tally.pictures += (self.images[path].sha256 for sample in samples for path in sample.images)
            progress.add(len(found))
        progress.end()
        return tally

    def _examine(self, samples: list[Sample], file: Path, *, use: Use, times: int) -> list[Sample]:
        """Returns the samples that are used."""
        samples = self.left_out.without(samples, use)
        new = dict.fromkeys(path for sample in samples for path in sample.images if path not in self.images)
        if new:
            self.images |= examine_images(new)
        seen, model = self.seen.get(file), self.spec.model
        fresh = samples if seen is None else [sample for sample in samples if (sample.row, sample.part) not in seen]
        if seen is not None:
            seen.update((sample.row, sample.part) for sample in samples)
        wrong = list(find_problems(fresh, self.images, model.template, model.image_token))
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

    def _tally(self, samples: list[Sample], fresh: list[Sample], *, use: Use, times: int) -> list[Sample]:
        for sample in samples:
            add = self.facts.add_training if use == "train" else self.facts.add_held_out
            add(sample, self.images, times)
        for sample in fresh:
            self.samples.add(images=bool(sample.images), adjustments=sample.adjustments)
        self.left_out.list_adjusted(samples, use)
        return samples

    def _read_held_out(self, source: AnnotationSource) -> int:
        """Of a file that is also trained on: the number of its samples."""
        self.left_out.take_over(str(source.file))
        tally, times = SourceTally(source.file, 1), max(1, int(source.repeat))
        for found in in_chunks(stream_source(source)):
            self.left_out.sort_out((problem for each in found for problem in each.problems), "evaluation")
            samples = [each.sample for each in used_part(found, source, tally) if each.sample is not None]
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


def used_part(found: Sequence[Conversation], source: AnnotationSource, tally: SourceTally) -> Sequence[Conversation]:
    """Those of the part of a source that is used, as `trainer.data.rows.sample.chosen_samples`."""
    before = tally.read
    tally.read += sum(each.row > 0 for each in found)
    if source.repeat >= 1:
        return found
    if tally.wanted is None:
        tally.wanted = count_repeated(sum(each.row > 0 for each in stream_source(source)), source.repeat)
    return [each for each in found if each.row][: max(0, tally.wanted - before)]


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
