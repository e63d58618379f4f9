"""Statistics of a data set: rows, images and lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.contract import DataSummary
from trainer.data.length import Lengths
from trainer.data.media.image import Examined
from trainer.data.rows.sample import Sample


def summarise(samples: Sequence[Sample], images: Mapping[Path, Examined], lengths: Lengths) -> DataSummary:
    """`lengths`: of the samples that could be measured."""
    sizes = sorted((image.size for image in images.values() if not image.problem), key=lambda size: size[0] * size[1])
    conversions = Counter(word for image in images.values() for word in image.conversions)
    adjustments = Counter(word for sample in samples for word in sample.adjustments)
    ordered = sorted(lengths.tokens)
    return DataSummary(
        rows=len(samples),
        rows_with_images=sum(bool(sample.images) for sample in samples),
        smallest=sizes[0] if sizes else (),
        largest=sizes[-1] if sizes else (),
        conversions=dict(sorted(conversions.items())),
        length_p50=percentile(ordered, 50),
        length_p95=percentile(ordered, 95),
        length_max=ordered[-1] if ordered else 0,
        tokens=sum(ordered),
        image_tokens=sum(lengths.image_tokens),
        unmeasured=lengths.unmeasured,
        adjustments=dict(sorted(adjustments.items())),
        trained_tokens=lengths.trained,
    )


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that `percent` percent of the values do not exceed (nearest rank); 0 for an empty sequence."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0
