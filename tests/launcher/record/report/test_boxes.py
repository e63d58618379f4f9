"""Boxes of answers, drawn over their image."""

from pathlib import Path

from launcher.record.report.answers import ImageBudget, choose_samples
from launcher.record.report.page import render_html
from launcher.record.run_files import read_run_files
from tests.launcher.record.report.test_page import EVIL, answers, copy_run, picture, set_value


def test_boxes_are_drawn_over_their_image(tmp_path: Path) -> None:
    """Of an image that is there; values that are not numbers from 0 to 1 are left out."""
    picture(tmp_path / "a.png", (80, 40))
    boxes = {
        "expected": [[0.05, 0.1, 0.25, 0.3], [0.5, 0.5]],
        "got": [[0.06, 0.11, 0.26, 0.31], [2, 0, 3, 1], [EVIL, 0, 1, 1], EVIL, [0, 0, True, 1], [0.5] * 3],
    }
    listed = [
        {"row": 1, "got": "x", "images": ["a.png"], "boxes": boxes},
        {"row": 2, "got": "x", "images": ["a.png", "a.png"], "boxes": boxes},
        {"row": 3, "got": "x", "images": ["a.png"], "boxes": EVIL},
        {"row": 4, "got": "x", "images": ["a.png"], "boxes": {"expected": EVIL, "got": [[0.5, 0.5, 0.1, 0.1]] * 999}},
        {"row": 5, "got": "x", "images": ["gone.png"], "boxes": boxes},
    ]
    run = read_run_files(copy_run(tmp_path, "r", answers(listed), set_value("plan.json", "spec.data.root", str(tmp_path))))
    shown = choose_samples(run, ImageBudget())
    assert [(box.kind, box.x, box.y, box.width, box.height) for box in shown[0].boxes] == [
        ("expected", 5.0, 10.0, 20.0, 20.0), ("expected", 48.0, 48.0, 4.0, 4.0), ("got", 6.0, 11.0, 20.0, 20.0),
    ]  # fmt: skip
    assert [len(sample.boxes) for sample in shown] == [3, 0, 0, 0, 3]
    page = render_html([run], None, "")
    assert page.count('<rect class="expected"') == 2 and page.count('<rect class="got"') == 1, "of the image that is there"
    assert '<rect class="got" x="6.0" y="11.0" width="20.0" height="20.0"/>' in page and EVIL not in page
