"""Statistics of a data set: rows, images and lengths."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from trainer.contract import DataSummary
from trainer.data.length import Lengths
from trainer.data.media.image import Examined

MOST_KEYS, OTHER_KEYS = 100, "other keys"  # that are named: a table may have thousands of columns


class SampleTally:
    """Counts samples that are added one at a time."""

    def __init__(self) -> None:
        self.rows = self.rows_with_images = 0
        self.adjustments: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def add(self, *, images: bool, adjustments: Sequence[str], ignored: Sequence[str] = (), warnings: Sequence[str] = ()) -> None:
        self.rows += 1
        self.rows_with_images += images
        self.adjustments.update(adjustments)
        self.warnings.update(warnings)
        if ignored:
            self.ignored.update(key if key in self.ignored or len(self.ignored) < MOST_KEYS else OTHER_KEYS for key in ignored)


def summarise(samples: SampleTally, images: Collection[Examined], lengths: Lengths) -> DataSummary:
    """`lengths`: of the samples that could be measured."""
    sizes = sorted((image.size for image in images if not image.problem), key=lambda size: size[0] * size[1])
    conversions = Counter(word for image in images for word in image.conversions)
    ordered = np.sort(np.asarray(lengths.tokens, dtype=np.int64))
    return DataSummary(
        rows=samples.rows,
        rows_with_images=samples.rows_with_images,
        smallest=sizes[0] if sizes else (),
        largest=sizes[-1] if sizes else (),
        conversions=dict(sorted(conversions.items())),
        length_p50=percentile(ordered, 50),
        length_p95=percentile(ordered, 95),
        length_max=int(ordered[-1]) if len(ordered) else 0,
        tokens=int(ordered.sum()),
        image_tokens=sum(lengths.image_tokens),
        unmeasured=lengths.unmeasured,
        adjustments=dict(sorted(samples.adjustments.items())),
        ignored_keys=dict(sorted(samples.ignored.items())),
        warnings=dict(sorted((samples.warnings + Counter(lengths.warnings)).items())),
        trained_tokens=lengths.trained,
        estimated_lengths=lengths.estimated,
    )


def percentile(ordered: Sequence[int] | np.ndarray, percent: int) -> int:
    """The smallest value that `percent` percent of the values do not exceed (nearest rank); 0 for an empty sequence."""
    return int(ordered[-(-len(ordered) * percent // 100) - 1]) if len(ordered) else 0


def counted_percentile(counts: Mapping[int, int], percent: int) -> int:
    """The same of values that are given with their counts."""
    rank = -(-sum(counts.values()) * percent // 100)
    for value in sorted(counts):
        rank -= counts[value]
        if rank <= 0:
            return value
    return 0
