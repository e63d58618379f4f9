"""One pass over all rows of a data check, some hundred at a time: what it keeps is small, and grows by the images and by a digest of each row."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from trainer.contract import DataProblem, TrainSpec
from trainer.contract.annotation_file import count_repeated
from trainer.data.chat.system_choice import choose_system
from trainer.data.containers.annotation import Position
from trainer.data.learning_facts import FactTally
from trainer.data.length import LengthTally
from trainer.data.media.image import Examined
from trainer.data.rows.sample import Sample, stream_source
from trainer.data.sample_check import examine_images, find_moved_boxes, find_problems
from trainer.data.sources.source import AnnotationSource, find_sources
from trainer.data.summary import SampleTally

CHUNK = 512  # rows at a time
REPORT_S = 10.0  # between two lines that report the progress
BUILT_IN = "the rows of a built-in set are a few words long"


class SourceTally:
    """What the hash of the data needs of a source: the number of its samples, and the hashes of their images, in order. `times`: how often its rows
    are used."""

    def __init__(self, file: Path, times: int) -> None:
        self.file, self.times, self.samples = file, times, 0
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
        self.tallies: dict[Path, list[SourceTally]] = {}
        self.seen: dict[Path, set[tuple[int, int]]] = {}  # samples of files that are read more than once

    def read(self, training: Path | None, held_out: Path | None, images_of: Callable[[Path], Path]) -> None:
        files = tuple(dict.fromkeys(file for file in (training, held_out) if file))
        found = {file: find_sources(file, images_of(file)) for file in files}
        read = [source.file for sources, _ in found.values() for source in sources]
        self.seen = {file: set() for file, count in Counter(read).items() if count > 1}
        progress = ReadingProgress(self.say, read)
        for file, (sources, problems) in found.items():
            self.row_problems += problems
            self.tallies[file] = [self._read_source(source, file == training, progress) for source in sources]
        if held_out is not None and held_out == training:
            for source in found[held_out][0]:
                for sample in stream_source(source):
                    if isinstance(sample, Sample):
                        self.facts.add_held_out(sample, self.images, max(1, int(source.repeat)))

    def count(self, file: Path) -> int:
        """The samples of a file, repeated ones included."""
        return sum(tally.samples * tally.times for tally in self.tallies.get(file, ()))

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        return (*self.row_problems, *self.wrong, *self.lengths.problems, *self.moved)

    def _read_source(self, source: AnnotationSource, training: bool, progress: "ReadingProgress") -> SourceTally:
        tally = SourceTally(source.file, max(1, int(source.repeat)))
        wanted = count_repeated(count_samples(source), source.repeat) if source.repeat < 1 else sys.maxsize
        for found in in_chunks(stream_source(source, progress.begin())):
            kept = [item for item in found if isinstance(item, Sample)][: wanted - tally.samples]
            samples = [choose_system(sample, self.spec.data.system) for sample in kept]
            self.row_problems += (item for item in found if isinstance(item, DataProblem))
            tally.samples += len(samples)
            self._examine(samples, source.file, training=training, times=tally.times)
            tally.pictures += (self.images[path].sha256 for sample in samples for path in sample.images)
            progress.add(len(found))
        progress.end()
        return tally

    def _examine(self, samples: Sequence[Sample], file: Path, *, training: bool, times: int) -> None:
        new = dict.fromkeys(path for sample in samples for path in sample.images if path not in self.images)
        if new:
            self.images |= examine_images(new)
        for sample in samples:
            add = self.facts.add_training if training else self.facts.add_held_out
            add(sample, self.images, times)
        self.moved += find_moved_boxes(samples, self.spec.data.augmentation) if training else ()
        seen = self.seen.get(file)
        fresh = samples if seen is None else [sample for sample in samples if (sample.row, sample.part) not in seen]
        if seen is not None:
            seen.update((sample.row, sample.part) for sample in samples)
        for sample in fresh:
            self.samples.add(images=bool(sample.images), adjustments=sample.adjustments)
        template = self.lengths.find_template(str(file)) if fresh else None
        wrong = list(find_problems(fresh, self.images, template, self.spec.model.image_token))
        bad = {(problem.file, problem.row) for problem in wrong}
        self.wrong += wrong
        self.lengths.add([sample for sample in fresh if (sample.file, sample.row) not in bad], lambda path: self.images[path].size)


def in_chunks(items: Iterator[Sample | DataProblem]) -> Iterator[list[Sample | DataProblem]]:
    while chunk := list(islice(items, CHUNK)):
        yield chunk


def count_samples(source: AnnotationSource) -> int:
    return sum(isinstance(found, Sample) for found in stream_source(source))


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
