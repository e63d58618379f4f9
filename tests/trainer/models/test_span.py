"""Token counts from image sizes, compared with transformers' image processors and the figures in the documents of the families."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.trainer.models.conftest import Made, model_spec, read_model
from trainer.models.family import Limit
from trainer.models.registry import find_family
from trainer.models.span import Fixed, Frame, Grid, Slices, Tiles

BIG = ("llava_1_5_7b", "qwen2_5_vl_7b", "qwen2_5_omni_7b", "internvl3_8b", "minicpm_v_4_6", "minicpm_v_2_6")
SIDES = st.integers(1, 4000)


def grid(max_pixels: int) -> Grid:
    return Grid(before=(), image=1, after=(), unit=28, min_pixels=3136, max_pixels=max_pixels)


def tiles(most: int) -> Tiles:
    return Tiles(before=(), image=1, after=(), tokens=256, tile=448, least=1, most=most)


def slices(most: int, unit: int = 56) -> Slices:
    nothing = Frame(before=(), after=())
    return Slices(image=1, overview=nothing, slice=nothing, line=(), number=None, unit=unit, scale=448, most=most)


@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, most=st.sampled_from([3136, 200704, 1003520, 12845056]))
def test_grid(width: int, height: int, most: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": most})
    assert len(grid(most)((width, height), 0)) == processor.get_number_of_image_patches(height, width) // 4


@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, most=st.integers(1, 12))
def test_tiles(width: int, height: int, most: int) -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=most)
    count = processor.get_number_of_image_patches(height, width, {})
    assert len(tiles(most)((width, height), 0)) == 256 * count


@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, most=st.integers(1, 36), mode=st.sampled_from(["16x", "4x"]))
def test_slices(width: int, height: int, most: int, mode: str) -> None:
    """With the methods that its `_preprocess` calls, without pixels."""
    assume(max(width, height) <= 200 * min(width, height))
    processor, size = MiniCPMV4_6ImageProcessorPil(), (height, width)
    chosen = {"scale_resolution": 448, "patch_size": 14, "downsample_mode": mode}
    rows_columns = processor.get_sliced_grid(size, most, 448)
    parts = [processor.find_best_resize(size, allow_upscale=rows_columns is None, **chosen)]
    if rows_columns is not None:
        whole = processor.get_refine_size(size, rows_columns, allow_upscale=True, **chosen)
        parts += [(whole[0] // rows_columns[0], whole[1] // rows_columns[1])] * math.prod(rows_columns)
    unit = {"16x": 56, "4x": 28}[mode]
    wanted = sum((rows // unit) * (columns // unit) for rows, columns in parts)
    assert len(slices(most, unit)((width, height), 0)) == wanted


@pytest.mark.parametrize(
    ("size", "grids", "tiled", "sliced"),
    [
        ((448, 448), (256, 256, 256, 256), (256, 256), (64, 64, 64)),
        ((640, 480), (391, 391, 391, 315), (1792, 3328), (63, 203, 203)),
        ((1024, 768), (999, 999, 540, 315), (1792, 3328), (63, 315, 315)),
        ((1344, 1344), (2304, 1225, 576, 324), (1280, 2560), (64, 640, 640)),
        ((1920, 1080), (2691, 1222, 576, 312), (768, 2304), (66, 578, 822)),
        ((3840, 2160), (10549, 1222, 576, 312), (768, 2304), (66, 578, 2334)),
    ],
)
def test_figures(size: tuple[int, int], grids: tuple[int, ...], tiled: tuple[int, ...], sliced: tuple[int, ...]) -> None:
    """Measured with the processors of transformers 5.23 on images of these sizes."""
    assert tuple(len(grid(most)(size, 0)) for most in (16384 * 784, 1280 * 784, 576 * 784, 512 * 512)) == grids
    assert tuple(len(tiles(most)(size, 0)) for most in (6, 12)) == tiled
    assert tuple(len(slices(most)(size, 0)) for most in (1, 9, 36)) == sliced


def test_spans() -> None:
    made = Slices(
        image=1,
        overview=Frame(before=(2,), after=(3,)),
        slice=Frame(before=(4,), after=(5,)),
        line=(6,),
        number=lambda place: (7, place),
        unit=8,
        scale=16,
        most=4,
    )
    assert made((16, 16), 0) == (7, 0, 2, 1, 1, 1, 1, 3)
    part = (4, 1, 1, 1, 1, 5)
    assert made((32, 32), 1) == (7, 1, 2, 1, 1, 1, 1, 3, *part, *part, 6, *part, *part)
    assert Tiles(before=(2,), image=1, after=(3,), tokens=2, tile=8, least=1, most=2)((16, 8), 5) == (2, 1, 1, 1, 1, 1, 1, 3)
    assert Grid(before=(2,), image=1, after=(3,), unit=4, min_pixels=16, max_pixels=64)((8, 4), 0) == (2, 1, 1, 3)
    assert Fixed(image=1, tokens=3)((8, 4), 0) == (1, 1, 1)
    assert Fixed(before=(2,), image=1, after=(3,), tokens=3)((8, 4), 0) == (2, 1, 1, 1, 3)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (64, 64), (20, 61), (129, 33), (300, 31), (7, 5)])
def test_the_number_of_tokens_equals_that_of_features(tiny: Made, size: tuple[int, int]) -> None:
    """The features are counted in the output of the model."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    features = tiny.processor.image_features(image)
    found: Any = tiny.model.get_image_features(**features)
    pooled = getattr(found, "pooler_output", found)
    tokens = sum(len(part.reshape(-1, part.shape[-1])) for part in pooled)
    span: Any = tiny.processor.span
    assert span(size, 0).count(span.image) == tokens


@pytest.mark.parametrize(("name", "limit", "counts"), [
    ("tiny_llava", Limit(max_pixels=256, max_tiles=1), (16, 16)),
    ("tiny_qwen2_5_vl", Limit(max_pixels=512), (12, 6)),
    ("tiny_qwen2_5_omni", Limit(max_pixels=512), (12, 6)),
    ("tiny_internvl", Limit(max_tiles=2), (80, 16)),
    ("tiny_minicpm_v_4_6", Limit(max_tiles=1), (75, 15)),
    ("tiny_minicpm_v_2_6", Limit(max_tiles=1), (80, 16)),
])  # fmt: skip
def test_a_limit_is_applied(name: str, limit: Limit, counts: tuple[int, int], make_tiny: Any) -> None:
    """To images of 100 x 70 pixels. A saved processor keeps the limit."""
    made = make_tiny(name)
    image = made.processor.tokenizer.convert_tokens_to_ids(made.spec.model.image_token)
    bounded = made.family.create_processor(made.spec.model, limit)
    again = made.family.load_processor(made.folder, made.spec.model, limit)
    assert tuple(each.span((100, 70), 0).count(image) for each in (made.processor, bounded)) == counts
    assert again.span((100, 70), 0) == bounded.span((100, 70), 0)


def test_a_limit_is_saved(make_tiny: Any, tmp_path: Any) -> None:
    made = make_tiny("tiny_internvl")
    made.model.save_pretrained(tmp_path)
    made.family.create_processor(made.spec.model, Limit(max_tiles=2)).save(tmp_path)
    assert len(made.processor.span((100, 30), 0)) == 66
    assert len(made.family.load_processor(tmp_path, made.spec.model).span((100, 30), 0)) == 50


@pytest.mark.parametrize("name", BIG)
def test_the_rule_in_the_config_file_is_that_of_the_processor(name: str) -> None:
    """image_tokens in conf/model, which a plan uses, is never less than the tokens of a large image."""
    rule, spec = read_model(name).image_tokens, model_spec(name)
    span: Any = find_family(spec.family).create_processor(spec).span
    most = max(span(size, 0).count(span.image) for size in ((8000, 8000), (1280, 784), (9000, 1000), (640, 480)))
    planned = {
        "fixed": rule.tokens,
        "grid": rule.max_pixels // max(1, rule.unit) ** 2,
        "tiles": rule.tokens * (rule.maximum + 1),
        "slices": rule.tokens * (rule.maximum + 1),
    }[rule.rule]
    assert 0.9 * planned <= most <= 1.05 * planned  # slices are scaled to about their nominal size
