"""ms-swift's objects, and boxes in texts, in the coordinates of each family."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer.data.conftest import with_data
from tests.trainer.models.conftest import model_spec
from trainer.contract import DataProblem, InputRefused
from trainer.data.check import needed, resolve
from trainer.data.examination import DataExamination
from trainer.data.grounding.box_form import find_form
from trainer.data.grounding.placement import Placement, find_box_problems
from trainer.data.length import LengthTally
from trainer.data.rows.sample import Sample, read_samples
from trainer.models import find_family

Read = Callable[..., tuple[tuple[Sample, ...], tuple[DataProblem, ...]]]
SIZES = ((200, 100), (50, 50))


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads one row: a question with its images, and an answer."""

    def make(answer: str, objects: object = None, *, question: str = "Find the <ref-object>.", images: int = 1) -> Any:
        for number, size in enumerate(SIZES[:images]):
            Image.new("RGB", size).save(tmp_path / f"{number}.png")
        row = {
            "messages": [{"role": "user", "content": "<image>" * images + question}, {"role": "assistant", "content": answer}],
            "images": [f"{number}.png" for number in range(images)],
        } | ({"objects": objects} if objects is not None else {})
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return read_samples(tmp_path / "rows.jsonl", tmp_path)

    return make


def place(sample: Sample, family: str, boxes: str = "as_written") -> tuple[str, str]:
    placement = Placement(form=find_form(family), boxes=boxes, scaled=lambda size: (2 * size[0] + 24, 2 * size[1] - 4))
    placed = placement.place(sample, SIZES[: len(sample.images)])
    assert placed.objects is None and placement.place(placed, SIZES[: len(sample.images)]) is placed, "never twice"
    return placed.messages[0].content.replace("<image>", ""), placed.messages[-1].content


# family -> the question and the answer of a row with one name and one box, and a point, of an image of 200x100 pixels
WRITTEN = {
    "qwen2_5_vl": ("Find the <|object_ref_start|>dog<|object_ref_end|>.", "<|box_start|>(21,20),(106,59)<|box_end|>", "<|box_start|>(212,98)<|box_end|>"),
    "qwen2_5_omni": ("Find the <|object_ref_start|>dog<|object_ref_end|>.", "<|box_start|>(21,20),(106,59)<|box_end|>", "<|box_start|>(212,98)<|box_end|>"),
    "qwen2_vl": ("Find the <|object_ref_start|>dog<|object_ref_end|>.", "<|box_start|>(50,100),(250,300)<|box_end|>", "<|box_start|>(500,500)<|box_end|>"),
    "internvl": ("Find the <ref>dog</ref>.", "<box>[[50, 100, 250, 300]]</box>", "<box>[[500, 500]]</box>"),
    "minicpm_v_2_6": ("Find the dog.", "[(50,100),(250,300)]", "[(500,500)]"),
    "llava": ("Find the dog.", "[(50,100),(250,300)]", "[(500,500)]"),
}  # fmt: skip


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("norm1", [False, True])
def test_objects_are_written_as_the_family_does(read: Read, family: str, norm1: bool) -> None:
    boxes = [[0.05, 0.1, 0.25, 0.3], [0.5, 0.5]] if norm1 else [[10, 10, 50, 30], [100, 50]]
    (sample,), problems = read("<bbox> and <bbox>", {"ref": ["dog"], "bbox": boxes} | ({"bbox_type": "norm1"} if norm1 else {}))
    question, box, point = WRITTEN[family]
    assert problems == () and place(sample, family) == (question, f"{box} and {point}")


def test_each_box_belongs_to_its_image(read: Read) -> None:
    (sample,), _ = read("<bbox><bbox>", {"bbox": [[10, 10, 20, 20], [10, 10, 20, 20]], "image_id": [1, 0]}, images=2, question="Where?")
    assert place(sample, "internvl")[1] == "<box>[[200, 200, 400, 400]]</box><box>[[50, 100, 100, 200]]</box>"


def test_json_keeps_its_form(read: Read) -> None:
    """As ms-swift with QWENVL_BBOX_FORMAT=new, and the cookbook of Qwen2.5-VL."""
    answer = '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"point_2d": <bbox>, "label": "<ref-object>"}]'
    (sample,), _ = read(answer, {"ref": ["a dog", "a {cat}"], "bbox": [[10, 10, 50, 30], [100, 50]]}, question="Find both.")
    written = place(sample, "qwen2_5_vl")[1]
    assert json.loads(written) == [{"bbox_2d": [21, 20, 106, 59], "label": "a dog"}, {"point_2d": [212, 98], "label": "a {cat}"}]


def test_rounding_is_that_of_the_published_code(read: Read) -> None:
    """int(round(x / width * 1000)): half to even."""
    (sample,), _ = read("<bbox>", {"bbox": [[0.1, 0.05, 0.3, 0.25]]}, question="Where?")
    assert place(sample, "internvl")[1] == "<box>[[0, 0, 2, 2]]</box>"


@pytest.mark.parametrize("text", ["<bbox> is a tag", "a <ref-object> here"])
def test_marks_without_objects_are_a_problem(read: Read, text: str) -> None:
    samples, (problem,) = read(text, question="Say it.")
    assert samples == () and "objects" in f"{problem.problem} {problem.fix}"


def place_unchanged(sample: Sample) -> bool:
    return Placement(form=find_form("internvl")).place(sample, SIZES[:1]) is sample


def test_objects_without_marks_say_nothing(read: Read) -> None:
    (sample,), problems = read("A dog.", {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}, question="What?")
    assert problems == () and sample.objects is None


def test_names_without_their_mark_are_not_filled_in(read: Read) -> None:
    (sample,), problems = read("<bbox>", {"ref": ["dog"], "bbox": [[10, 10, 50, 30]]}, question="Where?")
    assert problems == () and place(sample, "llava") == ("Where?", "[(50,100),(250,300)]")


# objects -> key, a part of the problem, a part of the fix
WRONG: dict[str, tuple[object, str, str, str]] = {
    "a list": ([{"bbox": [1, 2, 3, 4]}], "objects", "is a list, not an object", '"bbox"'),
    "few boxes": (
        {"ref": ["dog"], "bbox": []},
        "objects.bbox",
        "has 0 entries, and the texts have 1 <bbox> marks",
        "one entry for each <bbox>",
    ),
    "many boxes": ({"ref": ["dog"], "bbox": [[1, 2, 3, 4]] * 2}, "objects.bbox", "has 2 entries", "one entry"),
    "few names": (
        {"ref": [], "bbox": [[1, 2, 3, 4]]},
        "objects.ref",
        "has 0 entries, and the texts have 1 <ref-object> marks",
        "one entry",
    ),
    "one list": ({"ref": ["dog"], "bbox": [1]}, "objects.bbox[0]", "is a number", "[x1, y1, x2, y2]"),
    "three numbers": ({"ref": ["dog"], "bbox": [[1, 2, 3]]}, "objects.bbox[0]", "has 3 numbers", "[x1, y1, x2, y2]"),
    "text": ({"ref": ["dog"], "bbox": [["1", 2, 3, 4]]}, "objects.bbox[0]", "not a number", "[x1, y1, x2, y2]"),
    "true": ({"ref": ["dog"], "bbox": [[True, 2, 3, 4]]}, "objects.bbox[0]", "not a number", "[x1, y1, x2, y2]"),
    "turned": ({"ref": ["dog"], "bbox": [[30, 2, 3, 4]]}, "objects.bbox[0]", "[30, 2, 3, 4] begins right of or below its end", "x1 <= x2"),
    "negative": ({"ref": ["dog"], "bbox": [[-1, 2, 3, 4]]}, "objects.bbox[0]", "outside of the image: negative", "cut it"),
    "norm1": ({"ref": ["dog"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1"}, "objects.bbox[0]", "which is 1x1", "bbox_type"),
    "type": ({"ref": ["dog"], "bbox": [[1, 2, 3, 4]], "bbox_type": "yolo"}, "objects.bbox_type", "is 'yolo'", '"real"'),
    "image": ({"ref": ["dog"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}, "objects.image_id", "1 is not an image of the row", "from 0 to 0"),
    "ref": ({"ref": [3], "bbox": [[1, 2, 3, 4]]}, "objects.ref[0]", "is a number, not a string", "name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_objects(read: Read, name: str) -> None:
    objects, field, problem, fix = WRONG[name]
    samples, problems = read("<bbox>", objects)
    assert samples == () and len(problems) == 1
    assert (problems[0].row, problems[0].field) == (1, field) and problem in problems[0].problem and fix in problems[0].fix


def test_a_box_outside_of_its_image(read: Read) -> None:
    (sample,), _ = read("<bbox>", {"ref": ["dog"], "bbox": [[10, 10, 201, 30]]})
    (problem,) = find_box_problems(sample, SIZES[:1], "as_written")
    assert (problem.row, problem.field) == (1, "objects.bbox[0]")
    assert problem.problem == "[10, 10, 201, 30] is outside of the image, which is 200x100"
    with pytest.raises(InputRefused, match="outside of the image"):
        place(sample, "llava")


# --------------------------------------------------------------------------------------------------------- boxes in texts

# data.boxes, a text -> what Qwen2.5-VL (in an image of 424x196 scaled pixels) and InternVL are trained on
CONVERTED = {
    ("original", "<box>[[10, 10, 50, 30]]</box>"): ("<|box_start|>(21,20),(106,59)<|box_end|>", "<box>[[50, 100, 250, 300]]</box>"),
    ("original", "<|box_start|>(10,10),(50,30)<|box_end|>."): ("<|box_start|>(21,20),(106,59)<|box_end|>.", "<box>[[50, 100, 250, 300]]</box>."),
    ("norm1000", "<box>50 100 250 300</box>"): ("<|box_start|>(21,20),(106,59)<|box_end|>", "<box>[[50, 100, 250, 300]]</box>"),
    ("norm1000", "<box>(50,100),(250,300)</box>"): ("<|box_start|>(21,20),(106,59)<|box_end|>", "<box>[[50, 100, 250, 300]]</box>"),
    ("norm1000", "[(50,100),(250,300)]"): ("<|box_start|>(21,20),(106,59)<|box_end|>", "<box>[[50, 100, 250, 300]]</box>"),
    ("norm1000", "<|box_start|>(500,500)<|box_end|>"): ("<|box_start|>(212,98)<|box_end|>", "<box>[[500, 500]]</box>"),
    ("norm1", "It is at [0.05, 0.1, 0.25, 0.3]."): ("It is at [21, 20, 106, 59].", "It is at [50, 100, 250, 300]."),
    ("original", '{"bbox_2d": [10, 10, 50, 30], "n": 2}'): ('{"bbox_2d": [21, 20, 106, 59], "n": 2}', '{"bbox_2d": [50, 100, 250, 300], "n": 2}'),
    ("original", '{"point_2d": [100, 50]}'): ('{"point_2d": [212, 98]}', '{"point_2d": [500, 500]}'),
    ("original", "Two of [3, 4] and 5."): ("Two of [3, 4] and 5.", "Two of [3, 4] and 5."),
    ("norm1000", "<box>[[50, 100, 250, 300], [500, 500, 1000, 1000]]</box>"): (
        "<|box_start|>(21,20),(106,59)<|box_end|><|box_start|>(212,98),(424,196)<|box_end|>",
        "<box>[[50, 100, 250, 300]]</box><box>[[500, 500, 1000, 1000]]</box>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_boxes_in_texts_are_converted_on_request(read: Read, case: tuple[str, str]) -> None:
    boxes, text = case
    (sample,), _ = read(text, question="Where?")
    assert place_unchanged(sample), "left alone without data.boxes"
    assert tuple(place(sample, family, boxes)[1] for family in ("qwen2_5_vl", "internvl")) == CONVERTED[case]


# data.boxes, a text, images -> a part of the problem
REFUSED = {
    ("norm1", "[10, 10, 50, 30]", 1): "message 2: [10, 10, 50, 30] is outside of the image, which is 1x1 by data.boxes=norm1",
    ("norm1000", "[10, 10, 5000, 30]", 1): "which is 1000x1000 by data.boxes=norm1000",
    ("original", "<|box_start|>(10,10),(500,30)<|box_end|>", 1): "which is 200x100 by data.boxes=original",
    ("original", "[50, 10, 10, 30]", 1): "begins right of or below its end",
    ("original", "[10, 10, 50, 30]", 2): "message 2 has boxes, and the row has 2 images",
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_boxes_that_do_not_fit_are_refused(read: Read, case: tuple[str, str, int]) -> None:
    boxes, text, images = case
    (sample,), _ = read(text, question="Where?", images=images)
    (problem,) = find_box_problems(sample, SIZES[:images], boxes)
    assert REFUSED[case] in problem.problem and problem.row == 1 and problem.fix


# ----------------------------------------------------------------------------------------------------- the check, collate


def test_the_check_reports_boxes_and_counts_conversions(read: Read, spec: Any, tmp_path: Path) -> None:
    read("<bbox>", {"ref": ["dog"], "bbox": [[10, 10, 201, 30]]})
    examined = DataExamination(with_data(spec, train=str(tmp_path / "rows.jsonl")), print)
    examined.lengths = LengthTally(spec, unmeasured="the model of this test has no sizes")
    examined.read(needed(examined.spec, resolve(examined.spec.data)))
    (problem,) = [each for each in examined.problems if each.row]
    assert (problem.row, problem.field) == (1, "objects.bbox[0]")
    read("[10, 10, 50, 30]", question="Where?")
    examined = DataExamination(with_data(spec, train=str(tmp_path / "rows.jsonl"), boxes="original"), print)
    examined.lengths = LengthTally(spec, unmeasured="the model of this test has no sizes")
    examined.read(needed(examined.spec, resolve(examined.spec.data)))
    assert dict(examined.samples.adjustments) == {"boxes in the text, converted from pixels of the image file to the form of the model": 1}


@pytest.mark.parametrize("size", [(200, 100), (31, 77), (640, 480)])
def test_qwen_counts_the_pixels_that_its_processor_makes(size: tuple[int, int]) -> None:
    """transformers' own processor of the image says how many patches there are."""
    model = model_spec("tiny_qwen2_5_vl")
    processor = find_family(model.family).create_processor(model)
    made = processor.image_features(Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)))
    _, rows, columns = made["image_grid_thw"][0].tolist()
    patches, values = made["pixel_values"].shape
    patch = round((values / 3 / 2) ** 0.5)  # 3 colours and 2 frames
    assert processor.scaled is not None and patches == rows * columns
    assert processor.scaled(size) == (columns * patch, rows * patch)


def test_a_sample_of_a_large_image_counts_the_pixels_of_the_file(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at half of its sides."""
    (sample,), _ = read("<bbox>", {"bbox": [[10, 10, 50, 30]]}, question="Where?")
    for module in ("trainer.data.media.large", "trainer.data.grounding.placement"):
        monkeypatch.setattr(f"{module}.MAX_PIXELS", 15_000)
    placed = Placement(form=find_form("internvl")).place(sample, ((100, 50),))
    assert placed.messages[-1].content == "<box>[[50, 100, 250, 300]]</box>"


def test_refs_may_hold_marks(read: Read) -> None:
    (sample,), _ = read("<bbox>", {"ref": ["<bbox> {} \\1"], "bbox": [[10, 10, 50, 30]]})
    assert place(sample, "internvl")[0] == "Find the <ref><bbox> {} \\1</ref>."
    assert replace(sample, placed=True).placed
