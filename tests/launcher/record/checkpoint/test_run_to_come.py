"""The memory of a stage whose checkpoint is still to come."""

import re
from pathlib import Path

import pytest

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.memory.states import GIB
from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint

CONF = Path(__file__).resolve().parents[4] / "conf"
TO_COME = "stage.checkpoint=omnilmm_12b-nf4"


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(ConfigRefused, match="there is no folder and no run of this name") as found:
        compose_from_checkpoint(words, CONF, folder)
    return str(found.value)


def test_a_stage_is_judged_before_its_weights_are_there(tmp_path: Path) -> None:
    """The way by NF4 could not be planned to its end before a download of 23 GB."""
    said = refusal(tmp_path, "hardware=p4", "model=omnilmm_12b", "stage=infer", "stage.inference.prompt=x", TO_COME)
    peaks = re.findall(r"weights in (\w+).*: ([\d.]+) GiB on each device of ([\d.]+): it (fits|does not fit)", said)
    assert [kind for kind, *_ in peaks] == ["float16", "NF4", "NF4"]
    assert peaks[0][3] == "does not fit" and float(peaks[0][1]) > 20 > float(peaks[1][1]) > 8 > float(peaks[2][1])


def test_a_stage_that_trains_is_judged_for_full_weights(tmp_path: Path) -> None:
    words = ("hardware=h200", "model=qwen2_5_vl_7b", "stage=lora")
    said = refusal(tmp_path, *words, "stage.checkpoint=to-come")
    memory = resolve(compose(words, CONF)).memory
    assert memory is not None and memory.limit_bytes is not None and "NF4" not in said
    assert f"{memory.total_bytes / GIB:.1f} GiB on each device of {memory.limit_bytes / GIB:g}: it fits" in said


@pytest.mark.parametrize("words", [("stage=infer",), ("model=tiny_llava", "stage=merge")])
def test_nothing_is_said_of_a_model_that_is_not_known_and_of_files(words: tuple[str, ...], tmp_path: Path) -> None:
    assert "still to come" not in refusal(tmp_path, *words, "stage.checkpoint=to-come")
