"""The files of conf/ checked against each other, against the classes that they configure, and by their own arithmetic."""

import re
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_load

from launcher.config.compose import compose, options
from launcher.config.schema import AXES, GROUPS, Hardware, Model
from launcher.image.stack import load_stacks

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
LLAVA = ("tiny_llava", "llava_1_5_7b")
LATER: tuple[str, ...] = ()


@cache
def hardware(name: str) -> Hardware:
    return compose([f"hardware={name}"], CONF).hardware


@cache
def model(name: str) -> Model:
    return compose([f"model={name}"], CONF).model


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis in AXES for name in options(CONF)[axis]])
def test_every_file_has_its_own_name(axis: str, name: str) -> None:
    assert safe_load((CONF / axis / f"{name}.yaml").read_text(encoding="utf-8"))["name"] == name
    assert getattr(compose([f"{axis}={name}"], CONF), axis).name == name


def test_cells_of_tune_name_files_that_exist() -> None:
    groups = options(CONF)
    cells = {f"{model}_{stage}" for model in groups["model"] for stage in groups["stage"]}
    assert set(groups["tune"]) <= cells


# --------------------------------------------------------------------------------------------------------------- hardware


@pytest.mark.parametrize("name", options(CONF)["hardware"])
def test_the_stack_of_the_hardware_is_built_for_it(name: str) -> None:
    chip, stack = hardware(name), load_stacks(ROOT / "images")[hardware(name).stack]
    assert stack.covers(chip.architecture)
    assert set(chip.host_architectures) <= set(stack.host_architectures)
    assert chip.driver.kind == stack.driver_kind


@pytest.mark.parametrize("name", options(CONF)["hardware"])
def test_every_peak_has_a_source(name: str) -> None:
    chip = hardware(name)
    assert all(peak.source and peak.tflops > 0 for peak in chip.peaks)
    assert len({peak.dtype for peak in chip.peaks}) == len(chip.peaks)
    assert bool(chip.peaks) == (chip.accelerator != "cpu")
    assert {peak.confidence for peak in chip.peaks} == {"computed"} or chip.accelerator != "npu"


def test_ascend_peaks_are_the_product_that_their_source_names() -> None:
    flops_per_cycle = 8192  # of one core, as the source string says
    for name, cores, clock_ghz in (("ascend910b", 24, 1.8), ("ascend910c", 24, 1.85)):
        peaks = {peak.dtype: peak.tflops for peak in hardware(name).peaks}
        assert isclose(peaks["bfloat16"], cores * flops_per_cycle * clock_ghz / 1000, rel_tol=1e-3)
        assert peaks["int8"] == 2 * peaks["bfloat16"]


def test_a_p4_has_no_bfloat16_and_a_driver_that_still_supports_pascal() -> None:
    p4 = hardware("p4")
    assert (p4.capability.bf16, p4.capability.compile, p4.driver.maximum, p4.architecture) == ("none", False, "580", "sm_61")
    assert "bfloat16" not in {peak.dtype for peak in p4.peaks}
    assert p4.environment["DS_ALLOW_DEPRECATED_FP16"] == "1"


@pytest.mark.parametrize("name", ["ascend910b", "ascend910c"])
def test_hccl_times_out_before_its_event_timeout_and_before_torch(name: str) -> None:
    environment = hardware(name).environment
    event_timeout_s = 1868  # HCCL_EVENT_TIMEOUT, its default
    connect_s, execute_s = int(environment["HCCL_CONNECT_TIMEOUT"]), int(environment["HCCL_EXEC_TIMEOUT"])
    assert 120 <= connect_s <= 7200 and connect_s < execute_s < event_timeout_s < compose([], CONF).run.collective_timeout_s
    assert not {"PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"} <= set(environment)  # both at once abort


def test_no_chip_name_belongs_to_two_kinds_of_hardware() -> None:
    names = [chip for name in options(CONF)["hardware"] for chip in hardware(name).chips]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("name", options(CONF)["model"])
def test_parameters_add_up(name: str) -> None:
    parameters = model(name).parameters
    assert sum(getattr(parameters, group) for group in GROUPS) + parameters.other == parameters.total


@pytest.mark.parametrize("name", options(CONF)["model"])
def test_groups_are_regexes_of_the_groups(name: str) -> None:
    groups = model(name).groups
    assert set(GROUPS) <= set(groups)
    assert all(re.compile(pattern).pattern.startswith("^") for pattern in groups.values())


@pytest.mark.parametrize("name", options(CONF)["model"])
def test_a_model_is_ready_or_names_what_is_pending(name: str) -> None:
    assert model(name).ready == (name not in LATER)
    assert bool(model(name).pending) != model(name).ready


@pytest.mark.parametrize("name", options(CONF)["model"])
def test_templates_contain_the_content_once(name: str) -> None:
    template = model(name).template
    assert template.user.count("{content}") == 1
    assert template.end_mark and template.assistant_open
    adjustment = pytest.importorskip("trainer.data.rows.adjustment", reason="the trainer's packages are not installed in this environment")
    assert template.end_mark.strip() in adjustment.END_MARKS, "rows that end with it are accepted"


def test_resampler_arithmetic_of_the_12b() -> None:
    """query (64 D), kv_proj (1792 D), attention (4 D² + 4 D), three LayerNorms (6 D), proj (D²), with D = 4096. Its positions are fixed."""
    width, queries = 4096, 64
    assert model("omnilmm_12b").parameters.projector == queries * width + 1792 * width + 4 * width**2 + 4 * width + 6 * width + width**2


@pytest.mark.parametrize("name", LLAVA)
def test_image_tokens_are_the_patches(name: str) -> None:
    vision, tokens = model(name).architecture.vision, model(name).image_tokens
    assert vision.image_size == tokens.unit
    assert tokens.tokens == (tokens.unit // vision.patch_size) ** 2


@pytest.mark.parametrize("name", LLAVA)
def test_architecture_is_the_one_of_transformers(name: str) -> None:
    """Parameter counts by group, exactly, of transformers' own class without weights."""
    module = build_llava(name)
    counts = dict.fromkeys(GROUPS, 0)
    for parameter, tensor in module.named_parameters():
        (group,) = [group for group, pattern in model(name).groups.items() if re.search(pattern, parameter)]
        counts[group] += tensor.numel()
    stated = model(name).parameters
    assert stated.exact and counts == {group: getattr(stated, group) for group in GROUPS}


@pytest.mark.parametrize("name", LLAVA)
def test_lora_targets_are_layers_of_the_decoder(name: str) -> None:
    from torch.nn import Linear

    module = build_llava(name)
    pattern = model(name).groups["lm"]
    linears = {
        inner.rsplit(".", 1)[-1] for inner, layer in module.named_modules() if isinstance(layer, Linear) and re.search(pattern, inner)
    }
    lora = compose(["stage=lora"], CONF).stage.lora
    assert lora is not None and linears == set(lora.targets)


@cache
def build_llava(name: str) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    architecture = model(name).architecture
    vision, text = (vars(section) | section.options for section in (architecture.vision, architecture.text))
    vision.pop("options")
    text.pop("options")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        tie_word_embeddings=architecture.text.tie_word_embeddings,
        **architecture.options,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


# -------------------------------------------------------------------------------------------------------- other sections


def test_pure_bf16_is_bfloat16_throughout() -> None:
    precision = compose(["precision=pure_bf16"], CONF).precision
    assert {precision.weights, precision.compute, precision.optimizer, precision.gradients} == {"bfloat16"}


@pytest.mark.parametrize("name", options(CONF)["precision"])
def test_only_float16_is_scaled(name: str) -> None:
    precision = compose([f"precision={name}"], CONF).precision
    assert (precision.loss_scaling == "dynamic") == (precision.compute == "float16")


def test_example_cluster_has_only_documentation_addresses() -> None:
    cluster = compose(["cluster=example"], CONF).cluster
    assert len(cluster.nodes) == 2 and cluster.runtime == "docker"
    assert all(node.host.startswith("192.0.2.") and node.address == node.host for node in cluster.nodes)


def test_files_contain_only_data() -> None:
    for file in CONF.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        assert "_target_" not in text and not re.search(r"/(root|work|tmp|home)/", text), file
