"""No key can be set that the run ignores: every key of the schema is walked through."""

import typing
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

from launcher.config.compose import compose, compose_over, find_type
from launcher.config.fact import find_row, load_facts, may_set
from launcher.config.key import list_keys, list_settings
from launcher.config.schema import Config
from launcher.config.setting import read
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import LocalContext, make_plan

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"
LOCAL = LocalContext(project=ROOT, here=Path("/work"), interpreter="python", user="1:1")
CHECKPOINT = "stage.checkpoint=/weights"
# The stage and the hardware on which a key is read.
BASES: dict[str, tuple[str, ...]] = {
    "stage.lora": ("stage=lora", CHECKPOINT),
    "stage.merging": ("stage=merge", CHECKPOINT),
    "stage.conversion": ("stage=convert", CHECKPOINT),
    "stage.quantization": ("stage=quantize", CHECKPOINT),
    "stage.inference": ("stage=infer", CHECKPOINT),
    "stage.serving": ("stage=serve", CHECKPOINT),
    "data.max_pixels": ("model=tiny_qwen2_5_vl",),
    "data.max_tiles": ("model=tiny_internvl",),
    "hardware.stack": ("hardware=h200",),
    "cluster.devices_per_node": ("hardware=h200",),
    "cluster.ascend_runtime": ("hardware=ascend910b", "cluster=example"),
    "cluster": ("cluster=example",),
}
OTHERS = {"hardware.stack": ("cuda126", "cuda130"), "cluster.nodes": ("[{host: a}, {host: b}]",)}


def others(key: str, value: Any) -> tuple[str, ...]:
    """Values that differ from `value`; the run must notice one of them."""
    kind = find_type(key, CONF)
    if type(None) in typing.get_args(kind):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    origin = typing.get_origin(kind)
    if key in OTHERS or key == "hardware.peaks":
        return OTHERS.get(key, ("[]",))
    if origin is Literal:
        return tuple(str(each) for each in typing.get_args(kind) if each != value)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        return (*(f"[{each}]" for each in typing.get_args(item)), "[]") if typing.get_origin(item) is Literal else ("[/other]", "[]")
    if origin is dict:
        return ("{OTHER: '1'}", "{vision: 1}")
    if kind in (int, float):
        return (repr(kind(value or 0) + 1), repr(kind(1)))
    return ("true", "false") if kind is bool else ("/other",)


@cache
def planned(*overrides: str) -> tuple[Any, ...]:
    """What the run is given: the trainer's spec, the commands of the nodes, the image."""
    plan = make_plan(compose(overrides, CONF), stacks(), LOCAL, run_id="R", rules=())
    return plan.spec, plan.commands, plan.image, plan.folder


@cache
def stacks() -> dict[str, Any]:
    return dict(load_stacks(ROOT / "images"))


def reaches_the_run(key: str) -> bool:
    base = next((words for prefix, words in BASES.items() if key.startswith(prefix)), ())
    value = read(compose(base, CONF), key)
    for text in others(key, value):
        try:
            if planned(*base, f"{key}={text}") != planned(*base):
                return True
        except ConfigRefused:
            continue
    return False


@pytest.mark.parametrize("section", ["hardware", "model", "stage", "precision", "strategy", "data", "cluster", "run"])
def test_every_key_that_can_be_set_is_read(section: str) -> None:
    """By the trainer or the commands of the nodes; or facts.toml says by what else."""
    read_elsewhere = {key for keys in load_facts()["launcher"].values() for key in keys}
    ignored = []
    for key in list_settings():
        if key.partition(".")[0] != section or find_row("correction", key) or not may_set(key, ""):
            continue
        if any(key == other or key.startswith(f"{other}.") for other in read_elsewhere):
            continue
        ignored += [] if reaches_the_run(key) else [key]
    assert ignored == [], "list it in facts.toml, or let the run read it"


def test_the_table_names_keys_that_exist_and_files_that_read_them() -> None:
    facts, keys = load_facts(), list_keys()
    listed = [key for section in ("fixed", "correction") for row in facts[section] for key in row["keys"]]
    listed += [*facts["instead"], *(key for row in facts["launcher"].values() for key in row)]
    assert [name for name in listed if not any(key == name or key.startswith(f"{name}.") for key in keys)] == []
    for file, names in facts["launcher"].items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [name for name in names if name.rpartition(".")[2] not in text] == [], file


@pytest.mark.parametrize("key", [key for key in list_keys() if not may_set(key, "")])
def test_a_fact_is_refused_with_the_reason(key: str) -> None:
    value = others(key, read(compose(("model=qwen2_5_vl_7b",), CONF), key))[0]
    with pytest.raises(ConfigRefused, match="an override would change the plan and not the run") as caught:
        compose(("model=qwen2_5_vl_7b", f"{key}={value}"), CONF)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.image_tokens.max_pixels=802816", "write data.max_pixels=802816"),
        ("model.image_tokens.maximum=4", "write data.max_tiles=4"),
        ("model.context=4096", "data.max_length limits a sample"),
        ("precision.compute=float32", "choose precision=NAME"),
        ("hardware.peaks=[]", "write a file of conf/hardware"),
        ("stage.kind=evaluate", "choose another one with stage=NAME"),
        ("hardware.capability.bf16=native", "run.force='REASON' overrides a refusal"),
    ],
)
def test_what_has_the_effect_is_offered(override: str, words: str) -> None:
    with pytest.raises(ConfigRefused) as caught:
        compose(("model=qwen2_5_vl_7b", override), CONF)
    assert words in str(caught.value)


def test_all_facts_are_reported_together() -> None:
    with pytest.raises(ConfigRefused, match="2 overrides are wrong"):
        compose(("model=qwen2_5_vl_7b", "model.context=1", "model.architecture.text.num_hidden_layers=2"), CONF)


def test_a_random_start_has_the_architecture_that_the_user_wants() -> None:
    config = compose(("model=qwen2_5_vl_7b", "model.source={kind: random}", "model.architecture.text.num_hidden_layers=2"), CONF)
    assert config.model.architecture.text.num_hidden_layers == 2


def test_a_rerun_cannot_change_a_fact_either() -> None:
    recorded = compose(("model=qwen2_5_vl_7b",), CONF)
    with pytest.raises(ConfigRefused, match=r"data\.max_length limits a sample"):
        compose_over(recorded, ("model.context=9",), CONF)


def test_facts_that_differ_between_machines_can_be_corrected() -> None:
    assert compose(("hardware=ascend910b", "hardware.memory_gib=32"), CONF).hardware.memory_gib == 32


def test_activations_follow_the_weights() -> None:
    precision = compose(("hardware=h200", "precision.weights=float32"), CONF).precision
    assert (precision.weights, precision.compute) == ("float32", "float32")


def test_every_section_of_the_schema_is_walked() -> None:
    config = compose((), CONF)
    assert isinstance(config, Config) and all(is_dataclass(getattr(config, key.partition(".")[0])) for key in list_keys())
