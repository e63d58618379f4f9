"""How each family writes boxes, points and what they show.

The table is what ms-swift (modelscope/ms-swift, commit 3602360a) fills in for `<bbox>` and `<ref-object>`: swift/template/base.py
(normalize_bbox, replace_bbox, replace_ref) and the templates of the families in swift/template/templates/. Qwen2.5-VL counts pixels of the
image that its processor has scaled (Bai et al., arXiv 2502.13923, section 2.1.1); the others count thousandths of width and height.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]  # width, height
THOUSAND = (1000, 1000)


@dataclass(frozen=True, kw_only=True)
class BoxForm:
    """`unit`: of the numbers: pixels of the image that the processor has scaled, or thousandths. `box`, with {pairs} "(x1,y1),(x2,y2)" or {list}
    "[x1, y1, x2, y2]"; a point has one pair. `ref`: around the name of what a box shows."""

    unit: Literal["scaled pixels", "thousandths"]
    box: str
    ref: str = "{}"

    def write(self, numbers: Sequence[int]) -> str:
        return self.box.format(pairs=write_pairs(numbers), list=list(numbers))


QWEN_MARKS = {"box": "<|box_start|>{pairs}<|box_end|>", "ref": "<|object_ref_start|>{}<|object_ref_end|>"}
# Where the text is JSON with bbox_2d or point_2d, as the Qwen team's cookbooks/2d_grounding.ipynb has it: QWENVL_BBOX_FORMAT=new of ms-swift.
PLAIN = "{list}"
DEFAULT = BoxForm(unit="thousandths", box="[{pairs}]")  # ms-swift's own, for families without another
BOX_FORMS = {
    "qwen2_5_vl": BoxForm(unit="scaled pixels", **QWEN_MARKS),
    "qwen2_5_omni": BoxForm(unit="scaled pixels", **QWEN_MARKS),
    "qwen2_vl": BoxForm(unit="thousandths", **QWEN_MARKS),
    "qwen3_vl": BoxForm(unit="thousandths", **QWEN_MARKS),
    "internvl": BoxForm(unit="thousandths", box="<box>[{list}]</box>", ref="<ref>{}</ref>"),
}


def find_form(family: str) -> BoxForm:
    return BOX_FORMS.get(family, DEFAULT)


def write_pairs(numbers: Sequence[int]) -> str:
    return ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))


def rescale(numbers: Sequence[float], source: Size, target: Size) -> tuple[int, ...]:
    """x and y alternately, from an image of the size `source` to `target`; rounded as ms-swift does, half to even."""
    return tuple(round(number / source[place % 2] * target[place % 2]) for place, number in enumerate(numbers))
