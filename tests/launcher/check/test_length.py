"""What is refused about rows and lengths: packing where samples would affect each other."""

from pathlib import Path

import pytest

from launcher.check.recipe import leaves_padding_out
from launcher.check.rules import check
from launcher.config.compose import compose
from launcher.image.stack import load_stacks

ROOT = Path(__file__).parents[3]


def judge(*overrides: str) -> list[tuple[str, tuple[str, ...]]]:
    """Keys of the problems, with what would pass. A later override takes the place of an earlier one."""
    last = {override.partition("=")[0]: override for override in overrides}
    verdict = check(compose(tuple(last.values()), ROOT / "conf"), dict(load_stacks(ROOT / "images")))
    return [(problem.key, problem.changes) for problem in verdict.problems]


@pytest.mark.parametrize("model", ["tiny_llava", "tiny_qwen2_5_vl", "tiny_qwen2_5_omni", "tiny_internvl"])
def test_most_families_can_be_packed(model: str) -> None:
    assert judge(f"model={model}", "data.packing=true") == judge(f"model={model}", "data.padding_free=true") == []


@pytest.mark.parametrize("key", ["data.packing", "data.padding_free"])
def test_linear_attention_cannot(key: str) -> None:
    model = "model=tiny_minicpm_v_4_6"
    ((found, changes),) = judge(model, f"{key}=true")
    assert found == key
    for change in changes:
        assert judge(model, f"{key}=true", *change.split()) == []


def test_packing_has_no_windows() -> None:
    ((key, changes),) = judge("data.packing=true", "data.length_aware=window")
    assert key == "data.length_aware"
    for change in changes:
        assert judge("data.packing=true", "data.length_aware=window", change) == []
    assert judge("data.length_aware=window") == judge("data.length_aware=step") == []


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ((), True),
        (("data.packing=true",), False),
        (("model=tiny_minicpm_v_4_6",), False),
        (("hardware=h200",), False),
        (("hardware=h200", "data.padding_free=true"), True),
        (("data.padding_free=false",), False),
        (("data.padding_free=null",), True),
    ],
)
def test_padding_is_left_out_by_default_where_that_was_measured(overrides: tuple[str, ...], left_out: bool) -> None:
    assert leaves_padding_out(compose(overrides, ROOT / "conf")) is left_out
