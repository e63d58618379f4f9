"""Scores of boxes and points."""

import pytest

from trainer.data.grounding.box_text import boxes_of
from trainer.evaluation.box_metric import as_shares, iou_50, overlap, point_in_box, rate_boxes

# two boxes -> intersection over union
OVERLAPS = {
    ((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0)): 1.0,
    ((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 5.0)): 0.5,
    ((0.0, 0.0, 10.0, 10.0), (5.0, 5.0, 15.0, 15.0)): 25 / 175,
    ((0.0, 0.0, 10.0, 10.0), (10.0, 0.0, 20.0, 10.0)): 0.0,
    ((0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 30.0)): 0.0,
    ((5.0, 5.0, 5.0, 5.0), (5.0, 5.0, 5.0, 5.0)): 0.0,
    ((0.0, 0.0, 10.0, 10.0), (10.0, 10.0, 0.0, 0.0)): 0.0,
}


@pytest.mark.parametrize("boxes", OVERLAPS)
def test_overlap(boxes: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    assert overlap(*boxes) == overlap(*boxes[::-1]) == pytest.approx(OVERLAPS[boxes])


BOX = "<|box_start|>(0,0),(10,10)<|box_end|>"
# answer, accepted answer -> iou_50, point_in_box
SCORES = {
    (BOX, BOX): (1.0, 1.0),
    ("a dog [0, 0, 10, 5]", BOX): (1.0, 1.0),
    ("[0, 0, 10, 4.9]", BOX): (0.0, 1.0),
    ('[{"bbox_2d": [0, 0, 10, 10], "label": "dog"}]', "<box>[[0, 0, 10, 10]]</box>"): (1.0, 1.0),
    ("nothing", BOX): (0.0, 0.0),
    ("", BOX): (0.0, 0.0),
    (BOX, "nothing"): (None, None),
    (f"{BOX} and {BOX}", BOX): (0.5, 1.0),
    (BOX, f"{BOX} and [20, 20, 30, 30]"): (0.5, 1.0),
    ("[20, 20, 30, 30] [0, 0, 10, 10]", f"{BOX} and [20, 20, 30, 30]"): (1.0, 1.0),
    ("<|box_start|>(5,10)<|box_end|>", BOX): (0.0, 1.0),
    ("<point>11 5</point>", BOX): (0.0, 0.0),
    ("[20, 20, 30, 30]", BOX): (0.0, 0.0),
    ("(0,0),(10,10)", BOX): (0.0, 0.0),
}


@pytest.mark.parametrize("texts", SCORES, ids=str)
def test_scores(texts: tuple[str, str]) -> None:
    assert (iou_50(*texts), point_in_box(*texts)) == SCORES[texts]


def test_a_box_is_in_one_pair_only() -> None:
    """The pair that overlaps most is taken first: both boxes are found."""
    wanted, found = "[0, 0, 10, 10] [0, 0, 10, 8]", "[0, 0, 10, 10] [0, 0, 10, 12]"
    assert iou_50(found, wanted) == 1.0
    assert iou_50("[0, 0, 10, 10]", wanted) == 0.5


def test_the_best_accepted_answer_counts() -> None:
    assert rate_boxes("iou_50", BOX, ("[20, 20, 30, 30]", BOX, "no box")) == 1.0
    assert rate_boxes("iou_50", BOX, ("no box",)) is None


# text -> boxes
TEXTS = {
    "<|box_start|>(1,2),(3,4)<|box_end|>": ((1, 2, 3, 4),),
    "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>": ((1, 2, 3, 4), (5, 6, 7, 8)),
    "<box>1 2 3 4</box>": ((1, 2, 3, 4),),
    "<box>(1,2),(3,4)</box>": ((1, 2, 3, 4),),
    "<point>1 2</point>": ((1, 2),),
    '{"point_2d": [1, 2]}': ((1, 2),),
    "[(1,2),(3,4)]": ((1, 2, 3, 4),),
    "[(1, 2)]": ((1, 2),),
    "[0.1, 0.2, .3, 0.4]": (),
    "[1, 2, 3]": (),
    "[1, 2, 3, 4, 5]": (),
    "<box>1 2 3</box>": (),
    "<box></box>": (),
    "1, 2, 3, 4": (),
}


@pytest.mark.parametrize("text", TEXTS)
def test_boxes_of_a_text(text: str) -> None:
    assert boxes_of(text) == TEXTS[text]


def test_shares_for_drawing() -> None:
    assert as_shares("[10, 20, 50, 300] [0.1, 0.2, 0.3, 0.4] [-5, 0, 50, 100]", (100, 200)) == [
        [0.1, 0.1, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.5, 0.5],
    ]  # fmt: skip
