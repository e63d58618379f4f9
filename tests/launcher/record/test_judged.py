"""What a comparison judges: the throughput only where the user stated a band, and what runs of different length differ in."""

import math
from pathlib import Path

import pytest

from launcher.record.comparable import find_differences
from launcher.record.comparison import Level
from launcher.record.run_files import bands_of, read_run_files
from launcher.record.verdict import judge_losses
from tests.launcher.planted import copy_run, set_value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("overrides", ["run.bands.throughput=0.05"]),
        ("overrides", ["run.bands={loss: 0.02, throughput: 0.05}"]),
        ("files", ["conf/config.yaml", "/home/me/conf/experiment/mine.yaml"]),
    ],
)
def test_a_band_of_the_throughput_counts_where_the_user_stated_it(tmp_path: Path, key: str, value: list[str]) -> None:
    bands = set_value("plan.json", "config.run.bands", {"loss": 0.02, "throughput": 0.05})
    run = copy_run(tmp_path, "r", bands)
    set_value("plan.json", key, value)(run)
    assert bands_of(read_run_files(run)).throughput == 0.05
    set_value("plan.json", key, ["experiment=cpu_tiny_llava_lora", "conf/experiment/cpu_tiny_llava_lora.yaml"])(run)
    assert bands_of(read_run_files(run)).throughput is None


def test_runs_of_different_length_are_told_so(tmp_path: Path) -> None:
    assert judge_losses([1.0] * 94, [1.0] * 47, (), 0.01) == (None, Level.OUTSIDE, "any band, since one has 94 steps and the other 47")
    assert "not finite" in judge_losses([math.nan], [1.0], (), 0.01)[2]


def test_steps_that_may_differ_may_be_reached(tmp_path: Path) -> None:
    left, right = {"config.run.steps": 94, "result.steps": 94}, {"config.run.steps": 47, "result.steps": 47}
    assert [each.allowed for each in find_differences(left, right, ("config.run.steps",))] == [True, True]
    assert [each.allowed for each in find_differences(left, right, ())] == [False, False]
