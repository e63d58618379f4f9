"""Boxes of a sample in the coordinates and the form of the model: objects are filled in, boxes in texts are converted where data.boxes asks for it.

It needs the sizes of the images, so it is done where they are known: in the check, and when a sample is encoded.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.contract import DataProblem, InputRefused, TrainSpec
from trainer.data.grounding.box_form import PLAIN, THOUSAND, BoxForm, Size, find_form, rescale
from trainer.data.grounding.box_text import JSON_KEYS, Numbers, boxes_of, replace_boxes
from trainer.data.grounding.objects import BOX, REF, find_fault
from trainer.data.media.image import read_whole_size
from trainer.data.media.large import MAX_PIXELS
from trainer.data.rows.sample import Sample

MARKS = re.compile(f"{BOX}|{REF}")
AS_WRITTEN = "as_written"
CONVERTED = "boxes in the text, converted from {} to the form of the model"
NAMES = {"original": "pixels of the image file", "norm1": "0 to 1", "norm1000": "thousandths"}
SIZES_OF_UNITS = {"norm1": (1, 1), "norm1000": THOUSAND}
Scale = Callable[[Size], Size]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`boxes`: data.boxes. `scaled`: from the size of an image to that of the processor's; needed for forms in scaled pixels."""

    form: BoxForm
    boxes: str = AS_WRITTEN
    scaled: Scale | None = None

    def wanted(self, sample: Sample) -> bool:
        return not sample.placed and (sample.objects is not None or (self.boxes != AS_WRITTEN and bool(sample.images)))

    def place(self, sample: Sample, sizes: Sequence[Size]) -> Sample:
        """The sample with boxes as the model writes them. `sizes`: of its images as they are read. Raises InputRefused for boxes outside of
        their image."""
        if not self.wanted(sample):
            return sample
        problems = tuple(find_box_problems(sample, sizes, self.boxes))
        if problems:
            raise InputRefused("\n".join(map(str, problems)))
        plain = any(JSON_KEYS.search(message.content) for message in sample.messages)
        whole = whole_sizes(sample, sizes)
        texts = [self._convert(message.content, sizes, whole) for message in sample.messages]
        texts = self._fill(sample, texts, sizes, whole, plain=plain) if sample.objects else texts
        messages = tuple(replace(message, content=text) for message, text in zip(sample.messages, texts, strict=True))
        return replace(sample, messages=messages, objects=None, placed=True)

    def target(self, size: Size) -> Size:
        """What the numbers of a box at the right and lower border of an image are."""
        return self.scaled(size) if self.form.unit == "scaled pixels" and self.scaled else THOUSAND

    def _convert(self, text: str, sizes: Sequence[Size], whole: Sequence[Size]) -> str:
        if self.boxes == AS_WRITTEN or not sizes:
            return text
        source = SIZES_OF_UNITS.get(self.boxes, whole[0])
        target = self.target(sizes[0])

        def write(numbers: Numbers, plain: bool) -> str:
            scaled = rescale(numbers, source, target)
            return str(list(scaled)) if plain else self.form.write(scaled)

        return replace_boxes(text, write)

    def _fill(self, sample: Sample, texts: list[str], sizes: Sequence[Size], whole: Sequence[Size], *, plain: bool) -> list[str]:
        objects, form = sample.objects, replace(self.form, box=PLAIN, ref="{}") if plain else self.form
        assert objects is not None
        sources = ((1, 1) if objects.norm1 else whole[image] for image in objects.images)
        boxes = iter(
            form.write(rescale(box, source, self.target(sizes[image])))
            for box, image, source in zip(objects.boxes, objects.images, sources, strict=False)
        )
        refs = iter(form.ref.replace("{}", ref) for ref in objects.refs)
        return [MARKS.sub(lambda mark: next(boxes if mark[0] == BOX else refs, mark[0]), text) for text in texts]


def make_placement(spec: TrainSpec, scaled: Scale | None) -> Placement:
    return Placement(form=find_form(spec.model.family), boxes=spec.data.boxes, scaled=scaled)


def whole_sizes(sample: Sample, sizes: Sequence[Size]) -> tuple[Size, ...]:
    """The sizes of the image files, upright. A file above MAX_PIXELS is read at half of its sides, but its boxes count its own pixels."""
    return tuple(
        read_whole_size(path) if 4 * (size[0] + 1) * (size[1] + 1) > MAX_PIXELS else size
        for path, size in zip(sample.images, sizes, strict=True)
    )


def find_box_problems(sample: Sample, sizes: Sequence[Size], boxes: str) -> Iterator[DataProblem]:
    """What is wrong with the boxes of a sample, once the sizes of its images are known. `boxes`: data.boxes."""

    def problem(field: str, fault: tuple[str, str]) -> DataProblem:
        return DataProblem(file=sample.file, row=sample.row, field=field, problem=fault[0], fix=fault[1])

    if sample.placed or not (sample.objects or boxes != AS_WRITTEN):
        return
    whole = whole_sizes(sample, sizes)
    if sample.objects and not sample.objects.norm1:
        for place, (box, image) in enumerate(zip(sample.objects.boxes, sample.objects.images, strict=False)):
            if fault := find_fault(box, whole[image]):
                yield problem(f"objects.bbox[{place}]", fault)
    if boxes == AS_WRITTEN or not sample.images:
        return
    for number, message in enumerate(sample.messages, start=1):
        found = boxes_of(message.content)
        if found and len(sample.images) > 1:
            yield problem(
                "", (f"message {number} has boxes, and the row has {len(sample.images)} images", "write them as objects with image_id")
            )
            continue
        for box in found:
            if fault := find_fault(box, SIZES_OF_UNITS.get(boxes, whole[0])):
                yield problem("", (f"message {number}: {fault[0]} by data.boxes={boxes}", fault[1]))


def name_conversion(sample: Sample, boxes: str) -> tuple[str, ...]:
    """What is counted as an adjustment of the row."""
    converted = boxes != AS_WRITTEN and sample.images and any(boxes_of(message.content) for message in sample.messages)
    return (CONVERTED.format(NAMES[boxes]),) if converted else ()
