"""Numbers: each has a range, and what is outside of it is refused with a number that passes."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.check.recipe import RANGES, read_numbers
from launcher.check.rules import RULES, check
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.image.stack import Stack, load_stacks
from trainer.contract import Conversion, Inference, Merging, Quantization, Serving

ROOT = Path(__file__).parents[3]
LLAVA = ("model=llava_1_5_7b", "tune=null")


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


AFTER = {"merging": Merging, "conversion": Conversion, "quantization": Quantization, "inference": Inference, "serving": Serving}


@cache
def with_numbers() -> Config:
    """A config in which no optional number is left out."""
    optional = (
        "cluster.devices_per_node=8",
        "strategy.micro_batch=1",
        "hardware.host_memory_gib=1000",
        "cluster.nodes.0.port=22",
        "run.stop_timeout_s=60",
    )
    config = compose(["hardware=h200", *LLAVA, "stage=lora", *optional], ROOT / "conf")
    counted = {"full_attention_interval": 1, "linear_num_key_heads": 1, "linear_key_head_dim": 1, "linear_num_value_heads": 1}
    text = replace(config.model.architecture.text, head_dim=128, options=counted)
    model = replace(config.model, architecture=replace(config.model.architecture, text=text))
    after = {name: kind() for name, kind in AFTER.items()}
    return replace(config, model=model, stage=replace(config.stage, **after), run=replace(config.run, epochs=1.0))


def test_ranges_name_numbers_that_exist() -> None:
    assert set(RANGES) <= {re.sub(r"\.\d+", "", key) for key, _ in read_numbers(with_numbers())}


def number_keys() -> list[str]:
    """Those that `put` can reach: not the ones inside tuples."""
    return sorted(key for key, _ in read_numbers(with_numbers()) if not key.startswith(("cluster.nodes", "hardware.peaks")))


@pytest.mark.parametrize("key", number_keys())
def test_no_number_may_be_negative_or_infinite(key: str) -> None:
    for value in (-1, float("nan"), float("inf")):
        problems = check(put(with_numbers(), key.split("."), value), stacks()).problems
        assert key in [problem.key for problem in problems], value
        (refused,) = (problem for problem in problems if problem.key == key and "out of range" in problem.what)
        for text in (change.removeprefix(f"{key}=") for change in refused.changes):
            better = put(with_numbers(), key.split("."), int(text) if text.isdecimal() else float(text))
            assert f"{text} is out of range" not in str(check(better, stacks()).problems)
            assert key not in INTEGERS or text.isdecimal()


INTEGERS = {key for key, value in read_numbers(with_numbers()) if isinstance(value, int)}


def put(section: Any, path: list[str], value: float) -> Any:
    free = isinstance(section, dict)
    inner = value if len(path) == 1 else put(section[path[0]] if free else getattr(section, path[0]), path[1:], value)
    return {**section, path[0]: inner} if free else replace(section, **{path[0]: inner})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_zero_everywhere_breaks_no_rule(rule: Any) -> None:
    config = with_numbers()
    for key in number_keys():
        config = put(config, key.split("."), 0)
    list(rule(config, stacks()))
    list(rule(replace(config, cluster=replace(config.cluster, nodes=())), {}))
