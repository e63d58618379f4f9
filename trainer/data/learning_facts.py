"""What a model will learn from a data set: its answers, their lengths, and rows that occur twice. One pass over rows that are read already."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.contract import CommonAnswer, LearningFacts
from trainer.data.media.image import Examined
from trainer.data.rows.parsed_row import shorten
from trainer.data.rows.sample import Sample
from trainer.data.summary import percentile

COMMON = 5  # answers that are listed
SHOWN = 60  # characters of each
SIDES = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)

Content = tuple[tuple[str, ...], tuple[str, ...]]


def collect_facts(train: Sequence[Sample], held_out: Sequence[Sample], images: Mapping[Path, Examined]) -> LearningFacts:
    """Of the rows that could be read."""
    answers = Counter(
        message.content.strip() for sample in train for message in sample.messages if message.role == "assistant" and message.in_loss
    )
    lengths = sorted(length for answer, count in answers.items() for length in [len(answer)] * count)
    rows = [content_of(sample, images) for sample in train]
    known, pictures = set(rows), {digest for digests, _ in rows for digest in digests}
    others = [content_of(sample, images) for sample in held_out]
    return LearningFacts(
        answers=sum(answers.values()),
        distinct=len(answers),
        common=tuple(CommonAnswer(text=shorten(" ".join(text.split()), SHOWN), count=count) for text, count in answers.most_common(COMMON)),
        characters_p50=percentile(lengths, 50),
        characters_p95=percentile(lengths, 95),
        characters_max=lengths[-1] if lengths else 0,
        repeated_rows=len(rows) - len(known),
        shared_rows=sum(content in known for content in others),
        shared_images=len(pictures & {digest for digests, _ in others for digest in digests}),
        sided_rows=sum(any(SIDES.search(message.content) for message in sample.messages) for sample in train),
    )


def content_of(sample: Sample, images: Mapping[Path, Examined]) -> Content:
    """Equal for rows with the same images and messages, under whatever names the images are saved."""
    pictures = tuple(images[path].sha256 or str(path) if path in images else str(path) for path in sample.images)
    return pictures, tuple(text for message in sample.messages for text in (message.role, message.content))
