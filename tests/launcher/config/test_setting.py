"""Every key and every shipped value has one line, and what is printed of a key is what the config has."""

from pathlib import Path

import pytest

from launcher.config.axis_value import describe_values
from launcher.config.compose import options
from launcher.config.key import list_keys
from launcher.config.search import search
from launcher.config.setting import describe_settings, find_keys, load_meanings
from launcher.errors import ConfigRefused

CONF = Path(__file__).parents[3] / "conf"


def test_every_key_has_a_line_and_every_line_a_key() -> None:
    assert list(load_meanings()["keys"]) == list_keys() or sorted(load_meanings()["keys"]) == sorted(list_keys())
    assert [key for key, text in load_meanings()["keys"].items() if not 3 < len(text) <= 110] == []


def test_every_value_has_a_line() -> None:
    lines = describe_values(CONF)
    assert {axis: tuple(values) for axis, values in lines.items()} == options(CONF)
    assert [name for values in lines.values() for name, text in values.items() if not text or "None" in text] == []
    assert lines["hardware"]["p4"] == "NVIDIA Tesla P4" and lines["precision"]["bf16"] == "weights in bfloat16, optimizer in float32"
    shipped = load_meanings()["values"]
    assert {axis: set(values) for axis, values in shipped.items() if values} == {
        axis: set(lines[axis]) for axis, values in shipped.items() if values
    }


def test_a_file_of_the_users_own_is_described_by_what_it_holds(tmp_path: Path) -> None:
    for axis in options(CONF):
        (tmp_path / axis).mkdir()
    (tmp_path / "cluster" / "lab.yaml").write_text("runtime: docker\nnodes: [{host: gpu1}, {host: gpu2}]\n", encoding="utf-8")
    (tmp_path / "precision" / "mine.yaml").write_text("weights: float16\noptimizer: float32\n", encoding="utf-8")
    (tmp_path / "data" / "mine.yaml").write_text("train: rows.json\n", encoding="utf-8")
    lines = describe_values(tmp_path)
    assert lines["cluster"] == {"lab": "2 nodes, docker: gpu1, gpu2"}
    assert lines["precision"] == {"mine": "weights float16, optimizer float32"} and lines["data"] == {"mine": "rows of rows.json"}


@pytest.mark.parametrize(
    ("key", "overrides", "current", "place"),
    [
        ("stage.optimizer.lr", (), "0.002", "conf/tune/tiny_llava_full.yaml"),
        ("stage.optimizer.lr", ("model=qwen2_5_vl_7b", "stage=lora"), "0.0001", "conf/stage/lora.yaml"),
        ("stage.optimizer.lr", ("stage.optimizer.lr=3e-5",), "3e-05", "override stage.optimizer.lr=3e-5"),
        ("stage.optimizer.beta2", (), "0.999", ""),
        ("run.seed", (), "1", "conf/config.yaml"),
        ("hardware.memory_gib", ("hardware=p4",), "8.0", "conf/hardware/p4.yaml"),
        ("data.train", (), "''", "conf/data/digits.yaml"),
    ],
)
def test_the_current_value_and_the_file_that_sets_it(key: str, overrides: tuple[str, ...], current: str, place: str) -> None:
    (setting,) = describe_settings([key], overrides, CONF)
    assert (setting.current, setting.place) == (current, place)


def test_what_is_said_of_a_key() -> None:
    (schedule,) = describe_settings(["stage.optimizer.schedule"], (), CONF)
    assert {"constant", "linear", "cosine"} <= set(schedule.allowed) and schedule.default == "cosine"
    assert "lr_scheduler_type" in schedule.words and schedule.fixed == ""
    (pixels,) = describe_settings(["model.image_tokens.max_pixels"], ("model=qwen2_5_vl_7b",), CONF)
    assert "data.max_pixels" in pixels.fixed and pixels.kind == "a whole number"
    kinds = {
        key: describe_settings([key], (), CONF)[0].kind
        for key in ("run.force", "strategy.micro_batch", "data.packing", "cluster.mounts", "cluster.environment")
    }
    assert [*kinds.values()] == ["text", "a whole number, or null", "true or false", "a list: text", "names and values"]
    assert "MAX_PIXELS" in describe_settings(["data.max_pixels"], (), CONF)[0].words


def test_a_section_is_its_keys() -> None:
    assert find_keys("run.profile", CONF) == ("run.profile.start", "run.profile.steps", "run.profile.ranks")
    assert find_keys("stage.lora", CONF)[0] == "stage.lora.r" and find_keys("run.seed", CONF) == ("run.seed",)
    with pytest.raises(ConfigRefused, match=r"write stage\.optimizer\.lr=VALUE"):
        find_keys("learning_rate", CONF)


@pytest.mark.parametrize(
    ("word", "section", "name", "line"),
    [
        ("cutoff_len", "words", "cutoff_len", "data.max_length"),
        ("cutoff", "words", "cutoff_len", "data.max_length"),
        ("rank", "keys", "stage.lora.r", "rank of the adapters"),
        ("3090", "values", "hardware=rtx3090", "NVIDIA GeForce RTX 3090"),
        ("Qwen2.5-VL-7B-Instruct", "values", "model=qwen2_5_vl_7b", "Qwen2.5-VL 7B"),
        ("MAX_PIXELS", "variables", "MAX_PIXELS", "write data.max_pixels=VALUE"),
        ("merge-lora", "verbs", "merge-lora", "omnilaunch launch stage=merge"),
        ("sft", "words", "stage=sft", "write stage=lora or stage=full"),
        ("gradient checkpointing", "keys", "strategy.checkpoint_every", "with gradient checkpointing"),
    ],
)
def test_search(word: str, section: str, name: str, line: str) -> None:
    assert line in search(word, CONF)[section][name]


def test_nothing_is_found() -> None:
    assert not any(search("xyzzy", CONF).values())
