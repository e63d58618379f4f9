"""Composing: which overrides and files are accepted, which are refused, and with which texts."""

from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from launcher.config.compose import compose, options
from launcher.config.schema import AXES, Config
from launcher.errors import ConfigRefused

CONF = Path(__file__).parents[3] / "conf"


def refusal(*overrides: str, conf: Path = CONF) -> str:
    with pytest.raises(ConfigRefused) as caught:
        compose(overrides, conf)
    return str(caught.value)


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cc"))))
def test_any_text_is_accepted_as_it_is_typed(text: str) -> None:
    """Except what cannot be meant as text: already quoted, a list, a section, null, an interpolation."""
    assume(not text.strip().startswith(("'", '"', "[", "{")) and text.strip() not in ("null", "???") and "${" not in text)
    assert compose([f"data.train={text}"], CONF).data.train == text.strip()


def test_defaults() -> None:
    config = compose([], CONF)
    names = {axis: getattr(config, axis).name for axis in AXES}
    assert names == {
        "hardware": "cpu",
        "model": "tiny_llava",
        "stage": "full",
        "precision": "fp32",
        "strategy": "auto",
        "data": "digits",
        "cluster": "local",
    }


@pytest.mark.parametrize(
    ("overrides", "runtime"),
    [
        ([], "process"),
        (["hardware=ascend910b"], "docker"),
        (["hardware=p4"], "docker"),
        (["cluster.runtime=auto", "cluster=example"], "docker"),  # other machines, the CPU's too
        (["cluster.nodes.0.host=gpu1"], "docker"),
        (["cluster.nodes.0.port=2222"], "docker"),  # another machine behind this port
        (["cluster.runtime=docker"], "docker"),
        (["cluster.runtime=process", "hardware=h200"], "process"),
        (["cluster.runtime=process", "cluster=example"], "process"),  # which a rule refuses
        (["hardware.accelerator=cuda"], "docker"),
    ],
)
def test_the_runtime_follows_the_hardware_unless_it_is_given(overrides: list[str], runtime: str) -> None:
    assert compose(overrides, CONF).cluster.runtime == runtime


def test_a_measured_cell_is_used_and_can_be_overridden_or_omitted() -> None:
    tuned = compose([], CONF)
    assert (tuned.run.steps, tuned.stage.global_batch, tuned.stage.optimizer.warmup) == (300, 64, 20)
    assert tuned.stage.trainable == ("vision", "projector", "lm", "head")
    assert compose(["hardware=p4"], CONF).stage == tuned.stage
    assert compose(["run.steps=7"], CONF).run == replace(tuned.run, steps=7)
    assert compose(["tune=null"], CONF).stage.trainable == ("projector", "lm", "head")
    assert compose(["stage=evaluate"], CONF).run.steps == 1000


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        (["hardware=cpu"], "fp32"),
        (["hardware=p4"], "fp16"),
        (["hardware=rtx3090"], "bf16"),
        (["hardware=h200"], "bf16"),
        (["hardware=ascend910b"], "bf16"),
        (["hardware=ascend910c"], "bf16"),
        (["hardware=p4", "precision=fp32"], "fp32"),
        (["precision=bf16", "hardware=p4"], "bf16"),
    ],
)
def test_hardware_sets_a_precision_that_the_user_can_override(overrides: list[str], precision: str) -> None:
    assert compose(overrides, CONF).precision.name == precision


def get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part) if is_dataclass(value) else value[int(part) if part.isdigit() else part]
    return value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("strategy.micro_batch=4", 4),
        ("stage.optimizer.beta2=0.95", 0.95),  # only in the dataclass, in no file
        ("stage.optimizer.lr=1", 1.0),
        ("cluster.delivery.accept_licence=true", True),
        ("cluster.nodes.0.port=2222", 2222),
        ("cluster.environment.NCCL_P2P_DISABLE=1", "1"),
        ("hardware.memory_gib=null", None),
        ("model.source.revision=1234567", "1234567"),
        ("model.source.revision=12e4567", "12e4567"),  # a commit that looks like the number inf
        ("cluster.user=1000:1000", "1000:1000"),
        ("data.train=''", ""),
        ("stage.trainable=[lm,head]", ("lm", "head")),
        ("run.force='a reason, with a comma'", "a reason, with a comma"),
        ("cluster.nodes.0.user='ann'", "ann"),
        ("run.force='it\\'s fine'", "it's fine"),
        # Text is accepted as it is, whatever it means to Hydra.
        ('run.force=it\'s fine, "really"', 'it\'s fine, "really"'),
        ("run.force='tis", "'tis"),
        ("run.force= spaced ", "spaced"),
        ("run.force=", ""),
        ("data.train=日本.json", "日本.json"),
        ("data.train=it's.json", "it's.json"),
        ("data.train=a=b.json", "a=b.json"),
        ("data.train=a#b.json", "a#b.json"),
        ("data.train=a,b.json", "a,b.json"),
        ("data.train=glob(*)", "glob(*)"),
        ("data.train=true", "true"),
        ("data.train=[draft].json", "[draft].json"),
        ("data.images=back\\slash\\", "back\\slash\\"),
        ("hardware.environment.A=true", "true"),
        ("hardware.environment.A=$HOME/x", "$HOME/x"),
    ],
)
def test_every_key_of_the_schema_can_be_overridden(override: str, value: Any) -> None:
    got = get(compose([override], CONF), override.split("=")[0])
    assert got == value and type(got) is type(value)


def test_wrong_overrides_are_reported_together() -> None:
    assert refusal("hardware=asend910b", "data.trian=3", "micro_batch=4", "run.seed=1") == (
        "the config is refused, 3 overrides are wrong:\n"
        "  hardware=asend910b: unknown hardware 'asend910b'; did you mean 'ascend910b'? "
        "valid are: ascend910b, ascend910c, cpu, h200, p4, rtx3090\n"
        "  data.trian=3: unknown key 'data.trian' in data; did you mean 'train'? valid are: augmentation, bad_rows, boxes, builtin, evaluation, "
        "image_place, images, info, learn, length_aware, max_length, max_pixels, max_samples, max_tiles, mirror, mixing, mixing_stop, name, packing, "
        "padding_free, question, reasoning, rows, split_seed, system, too_long, train, truncated_images, turns, unmarked, workers\n"
        "  micro_batch=4: unknown key 'micro_batch'; did you mean 'strategy.micro_batch'?"
    )


def test_wrong_values_are_reported_together() -> None:
    assert refusal("run.steps=abc", "data.images=[a.json]", "cluster.delivery.kind=pushh", "stage.trainable=[lm,vison]") == (
        "the config is refused, 4 values are wrong:\n"
        "  stage.trainable.1 (override stage.trainable=[lm,vison]): \"vison\" is not allowed; did you mean 'vision'? "
        "valid are: head, lm, projector, vision\n"
        '  data.images (override data.images=[a.json]): ["a.json"] is not allowed; it must be text; put it in quotes\n'
        '  cluster.delivery.kind (override cluster.delivery.kind=pushh): "pushh" is not allowed; valid are: build, build_on_nodes, pull, ship\n'
        '  run.steps (override run.steps=abc): "abc" is not allowed; it must be a whole number'
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+run.steps=3", "'+' and '~' are refused, since the schema has every key; write run.steps=3"),
        ("++run.steps=3", "'+' and '~' are refused"),
        ("~tune", "'+' and '~' are refused"),
        ("run.steps", "write run.steps=VALUE"),
        ("run.steps=[", "cannot be parsed; write KEY=VALUE"),
        ("", "cannot be parsed; write KEY=VALUE"),
        ("=3", "cannot be parsed; write KEY=VALUE"),
        ("stage.trainable=lm,head", "a list is written stage.trainable=[lm,head]"),
        ("hardware=cpu,p4", "give one value"),
        ("run.seed=${oc.env:HOME}", "interpolations (${...}) are refused"),
        ("hardware=null", "unknown hardware 'null'"),
        ("hardware=[cpu]", "unknown hardware '[cpu]'"),
        ("hardware@model=cpu", "unknown key 'hardware@model'"),
        ("hydra.run.dir=x", "unknown key 'hydra.run.dir'"),
        ("hydra/launcher=basic", "unknown key 'hydra/launcher'"),
        ("run.steps.x=3", "run.steps is a single value"),
        ("cluster.nodes.0.hst=x", "did you mean 'host'?"),
        ("cluster.nodes.first.host=x", "cluster.nodes is a single value"),
        ("run=3", "it must be a section"),
        ("stage.lora.r=8", "stage.lora.alpha (conf/stage/full.yaml): is missing"),
        ("cluster.nodes.4.host=x", "cannot be composed"),
        ("run.seed=1.5", "must be a whole number"),
        ("run.seed=true", "must be a whole number"),
        ("run.deterministic=1", "must be true or false"),
        ("data.train=null", "must be text"),
        ("cluster.delivery={kind: it's}", "cannot be parsed; write KEY=VALUE"),
        ("experiment=none", "unknown experiment 'none'"),
        ("hardware=процессор", "unknown hardware 'процессор'; valid are: ascend910b"),
        ("model.name=another", "model.name is the name of the chosen file; choose another one with model=NAME"),
        ("strategy.name=zero2", "choose another one with strategy=NAME"),
        ("run.steps=" + "9" * 400, "is too large; at most 9223372036854775807"),
        ("run.steps=" + "9" * 5000, "cannot be parsed; write KEY=VALUE"),
        ("hardware.memory_gib=" + "9" * 400, "is too large; at most 9223372036854775807"),
    ],
)
def test_refused(override: str, words: str) -> None:
    assert words in refusal(override)


def test_one_key_with_two_values_is_refused_and_the_same_twice_is_not() -> None:
    assert "hardware is given twice" in refusal("hardware=cpu", "hardware=p4")
    assert "run.steps is given twice" in refusal("run.steps=3", "run.steps=4")
    assert compose(["run.steps=3", "run.steps=3", "experiment=null"], CONF).run.steps == 3


def test_interactive_configs_do_not_leak_into_the_next() -> None:
    compose(["hardware=p4", "run.steps=9"], CONF)
    assert compose([], CONF) == compose([], CONF)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for file in CONF.rglob("*.yaml"):
        copy = tmp_path / "conf" / file.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path / "conf"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "hardware/cpu.yaml",
            "accelerator: cpu",
            "accelerator: gpu",
            'hardware.accelerator (conf/hardware/cpu.yaml): "gpu" is not allowed',
        ),
        ("hardware/cpu.yaml", "title: CPU", "titel: CPU", "hardware.titel (conf/hardware/cpu.yaml): unknown key; did you mean 'title'?"),
        ("hardware/cpu.yaml", "title: CPU", "titel: CPU", "hardware.title (conf/hardware/cpu.yaml): is missing"),
        ("config.yaml", "seed: 1", "seed: one", 'run.seed (conf/config.yaml): "one" is not allowed'),
        ("tune/tiny_llava_full.yaml", "steps: 300", "steps: many", 'run.steps (conf/tune/tiny_llava_full.yaml): "many" is not allowed'),
        (
            "stage/full.yaml",
            "title: fine-tune all",
            "title: ${run.seed} all",
            "stage.title (conf/stage/full.yaml): interpolations (${...}) are refused",
        ),
        ("stage/full.yaml", "title: fine-tune all but the vision tower", "title: ???", "cannot be composed"),
        ("data/digits.yaml", "name: digits", "name: [digits", "cannot be composed"),
        ("config.yaml", "- model: tiny_llava", "- model: tiny", "cannot be composed"),
    ],
)
def test_a_wrong_file_is_named(copied: Path, file: str, old: str, new: str, words: str) -> None:
    text = (copied / file).read_text(encoding="utf-8")
    assert old in text
    (copied / file).write_text(text.replace(old, new), encoding="utf-8")
    assert words in refusal(conf=copied)


def test_an_experiment_overrides_every_axis_and_the_command_line_the_experiment(copied: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /hardware: p4\nrun: {steps: 11, seed: 5}\n"
    (copied / "experiment" / "pinned.yaml").write_text(text, encoding="utf-8")
    config = compose(["experiment=pinned", "run.seed=6"], copied)
    assert (config.hardware.name, config.precision.name, config.run.steps, config.run.seed) == ("p4", "fp16", 11, 6)


def test_options_are_the_files() -> None:
    groups = options(CONF)
    assert set(groups) == {*AXES, "tune", "experiment"}
    assert groups["hardware"] == ("ascend910b", "ascend910c", "cpu", "h200", "p4", "rtx3090")
    assert groups["stage"] == ("convert", "evaluate", "full", "infer", "lm", "lora", "merge", "projector", "quantize", "serve")


def test_an_unknown_cluster_is_answered_with_how_to_write_one() -> None:
    with pytest.raises(ConfigRefused, match=r"valid are: example, local\. Your own is a file: copy conf/cluster/example\.yaml"):
        compose(("cluster=pair",), CONF)
