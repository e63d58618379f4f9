"""What a model will learn from a data set: its answers, their lengths, and rows that occur twice. One pass over rows."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from trainer.contract import CommonAnswer, LearningFacts
from trainer.data.media.image import Examined
from trainer.data.rows.image_form import name_form
from trainer.data.rows.parsed_row import shorten
from trainer.data.rows.sample import Sample
from trainer.data.summary import counted_percentile

COMMON = 5  # answers that are listed
SHOWN = 60  # characters of each
SIDES = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)
SIDE_WORDS = ("left", "right", "左", "右")


class FactTally:
    """Counts the facts of rows that are added one at a time. Texts are kept as digests, so that it stays small: about 200 bytes for each row that
    occurs once."""

    def __init__(self) -> None:
        self.answers: Counter[bytes] = Counter()
        self.texts: dict[bytes, str] = {}  # the beginnings of answers that may be among the common ones
        self.lengths: Counter[int] = Counter()
        self.rows: Counter[bytes] = Counter()
        self.forms: Counter[str] = Counter()
        self.pictures: set[str] = set()
        self.shared_pictures: set[str] = set()
        self.shared_rows = self.sided_rows = 0

    def add_training(self, sample: Sample, images: Mapping[Path, Examined], times: int = 1) -> None:
        """`times`: how often the row is used."""
        for message in sample.messages:
            if message.role == "assistant" and message.in_loss:
                self.add_answer(message.content.strip(), times, told_apart_by=objects_of(sample))
            if message.role == "user" and (form := name_form(message.content)):
                self.forms[form] += times
        self.rows[digest_of(sample, images)] += times
        self.pictures.update(pictures_of(sample, images))
        self.sided_rows += times * any(names_side(message.content) for message in sample.messages)

    def add_answer(self, text: str, times: int, told_apart_by: str) -> None:
        key = hash_text(f"{text}{told_apart_by}")
        self.answers[key] += times
        self.lengths[len(text)] += times
        if key not in self.texts and (self.answers[key] > 1 or len(self.answers) <= COMMON):
            self.texts[key] = shorten(" ".join(text.split()), SHOWN)

    def add_held_out(self, sample: Sample, images: Mapping[Path, Examined], times: int = 1) -> None:
        """After all training rows."""
        self.shared_rows += times * (digest_of(sample, images) in self.rows)
        self.shared_pictures.update(self.pictures.intersection(pictures_of(sample, images)))

    def facts(self) -> LearningFacts:
        total = sum(self.lengths.values())
        return LearningFacts(
            answers=total,
            distinct=len(self.answers),
            common=tuple(CommonAnswer(text=self.texts[key], count=count) for key, count in self.answers.most_common(COMMON)),
            characters_p50=counted_percentile(self.lengths, 50),
            characters_p95=counted_percentile(self.lengths, 95),
            characters_max=max(self.lengths, default=0),
            repeated_rows=sum(self.rows.values()) - len(self.rows),
            shared_rows=self.shared_rows,
            shared_images=len(self.shared_pictures),
            sided_rows=self.sided_rows,
            image_forms=dict(self.forms.most_common()),
        )


def names_side(text: str) -> bool:
    """The plain search first: it takes a tenth of the time of the other, and most texts name no side."""
    lower = text.lower()
    return any(word in lower for word in SIDE_WORDS) and SIDES.search(text) is not None


def digest_of(sample: Sample, images: Mapping[Path, Examined]) -> bytes:
    """Equal for rows with the same images and messages, under whatever names the images are saved."""
    texts = [text for message in sample.messages for text in (message.role, message.content)]
    if sample.tools or any(message.reasoning or message.calls for message in sample.messages):
        texts += [repr((sample.tools, [(message.reasoning, message.calls) for message in sample.messages]))]
    return hash_text("\0".join((*pictures_of(sample, images), "", *texts)) + objects_of(sample))


def objects_of(sample: Sample) -> str:
    """What the texts hold once their `<bbox>` are filled in, by which rows of the same words differ. '' for a row without objects."""
    return f"\0{sample.objects!r}" if sample.objects else ""


def hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def pictures_of(sample: Sample, images: Mapping[Path, Examined]) -> tuple[str, ...]:
    return tuple(images[path].sha256 or str(path) if path in images else str(path) for path in sample.images)
