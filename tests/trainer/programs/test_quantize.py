"""Weights in 8 bits as compressed-tensors has them: the codes that its own library makes, opened by transformers and by every family, at the
size and with the answers that were promised."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from transformers import LlavaForConditionalGeneration

from tests.trainer.models.conftest import TINY, model_spec
from tests.trainer.product import carry_out, stage_spec, write_adapter, write_model
from trainer.contract import SAMPLES_FILE, DataSpec, InputRefused, ModelSpec, Quantization, TrainResult
from trainer.models import find_family
from trainer.programs.quantize import REPORT_FILE, SAMPLES_BEFORE_FILE, outermost
from trainer.tensor.int8 import choose_scales, describe_format, output_error, pack, round_weight, see_through, unpack
from trainer.tensor.naming import name_in_memory
from trainer.tensor.stream import open_tensors

pytestmark = pytest.mark.usefixtures("process_group")
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def quantize(model: ModelSpec, checkpoint: Path, output: Path, **options: Any) -> TrainResult:
    return carry_out(stage_spec("quantize", model, checkpoint, output, quantization=Quantization(**{"compare": False, **options})))


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: source.read_whole() for name, source in open_tensors(folder).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path, Path]:
    """Spec, base, quantized: a tiny LLaVA in bfloat16."""
    root = tmp_path_factory.mktemp("made")
    model = write_model("tiny_llava", root / "base", torch.bfloat16)
    return model, root / "base", root / "run" / quantize(model, root / "base", root / "run").checkpoint


# ------------------------------------------------------------------------------------------------------------- arithmetic


def test_packing_is_that_of_the_library_and_comes_back() -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-128, 128, (5, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(codes.float()), pack_to_int32(codes.to(torch.int8), 8))
    assert torch.equal(unpack(pack(codes.float()), 11), codes.float())


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    scales = choose_scales(weight, torch.float32)
    difference = (round_weight(weight, scales) * scales - weight).abs()
    assert bool((difference <= scales * 0.5001).all()) and not bool(difference[3].any())


def test_a_scale_that_is_chosen_by_what_comes_in_errs_less_there() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * 0.02
    power = torch.rand(256, generator=generator)
    weight[:, 7], power[7] = 0.2, 1e-6  # large, and nothing ever comes in there
    plain, chosen = choose_scales(weight, torch.float32), choose_scales(weight, torch.float32, power)
    before, after = output_error(weight, plain, power).sum(), output_error(weight, chosen, power).sum()
    assert bool((chosen <= plain).all()) and after < 0.8 * before


def test_layers_are_ignored_by_the_shortest_beginnings_that_hold_none_of_the_others() -> None:
    kept = {"model.visual.blocks.0.fc", "model.visual.merger.mlp", "lm_head", "model.audio.proj"}
    assert outermost(kept, {"model.language.fc"}) == {"model.visual", "model.audio", "lm_head"}
    assert outermost(kept, {"model.language.fc", "model.visual.merger.mlp"} - kept | {"model.visual.merger.up"}) == {
        *("model.visual.blocks", "model.visual.merger.mlp", "model.audio", "lm_head"),
    }


# ------------------------------------------------------------------------------------------------------------------ format


def test_the_codes_and_scales_are_those_of_the_library(made: tuple[ModelSpec, Path, Path]) -> None:
    _, base, folder = made
    before, after = values_of(base)[Q_PROJ], values_of(folder)
    packed, scales, shape = (after[f"{Q_PROJ}_{part}"] for part in ("packed", "scale", "shape"))
    assert packed.dtype == torch.int32 and scales.dtype == torch.bfloat16 and shape.tolist() == [96, 96] and Q_PROJ not in after
    how = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(how.format)
    scheme = how.config_groups["group_0"]
    by_library = compressor.compress({"weight": before.float(), "weight_scale": scales.float()}, scheme)
    assert torch.equal(packed, by_library["weight_packed"])
    assert compressor.can_compress(torch.nn.Linear, scheme)


@pytest.mark.parametrize("name", TINY)
def test_every_family_opens_it_with_numbers_in_the_place_of_codes(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "base")
    result = quantize(model, tmp_path / "base", tmp_path / "run")
    folder, family = tmp_path / "run" / result.checkpoint, find_family(model.family)
    before, after = (family.load(place, model, torch.float32).state_dict() for place in (tmp_path / "base", folder))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) >= 14 and all(key.endswith("proj.weight") or "_proj_" in key for key in changed), changed
    lm = family.load(folder, model, torch.float32, on_meta=True)
    names = name_in_memory(lm, see_through(open_tensors(folder)))
    assert len(names) == len(see_through(open_tensors(folder)))  # each is found again
    for key in changed:
        step = before[key].abs().amax(dim=1, keepdim=True) / 127
        assert bool(((before[key] - after[key]).abs() <= 0.51 * step).all()), key
    assert 1e-5 < result.evaluation["logit_error"] < 0.1 and result.evaluation["size_ratio"] < 0.9


def test_transformers_opens_it_without_us(made: tuple[ModelSpec, Path, Path]) -> None:
    """As it is by default: codes until the first forward pass."""
    model, _, folder = made
    alone = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    ours = find_family("llava").load(folder, model, torch.bfloat16)
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        found, wanted = alone(input_ids=ids).logits, ours(input_ids=ids).logits
    assert torch.equal(found, wanted)


def test_what_stays_is_named_for_both_names_of_a_module(made: tuple[ModelSpec, Path, Path]) -> None:
    model, base, folder = made
    ignore = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["ignore"]
    hollow = find_family("llava").load(base, model, torch.float32, on_meta=True)
    names = name_in_memory(hollow, open_tensors(base))
    linear = {name for name, module in hollow.named_modules() if isinstance(module, torch.nn.Linear)}
    for saved, memory in names.items():
        if memory.removesuffix(".weight") in linear:
            stays = "_packed" not in str([key for key in open_tensors(folder) if key.startswith(saved)])
            for name in (saved, memory):
                assert any(match_name(name.removesuffix(".weight"), pattern) for pattern in ignore) == stays, name
    assert describe_format(ignore)["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_a_model_that_is_mostly_a_decoder_takes_little_more_than_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = model_spec("tiny_llava")
    text = {**wide.architecture["text"], "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4}
    wide = replace(wide, architecture={**wide.architecture, "text": text})
    monkeypatch.setattr("tests.trainer.product.model_spec", lambda _: wide)
    model = write_model("tiny_llava", tmp_path / "base", torch.bfloat16)
    assert quantize(model, tmp_path / "base", tmp_path / "run").evaluation["size_ratio"] <= 0.55


# ----------------------------------------------------------------------------------------------------------------- options


def test_it_is_calibrated_and_compared_on_the_data_of_the_run(tmp_path: Path, digits: Path) -> None:
    model = write_model("tiny_llava", tmp_path / "base")
    options = Quantization(calibration=6, probes=2)
    spec = stage_spec("quantize", model, tmp_path / "base", tmp_path / "run", quantization=options)
    data = DataSpec(name="digits", builtin="digits", root=str(digits), train="", evaluation="", images="", max_length=128, workers=0)
    result = carry_out(replace(spec, data=data))
    assert {"exact_match", "exact_match_before"} <= result.evaluation.keys() and result.evaluation["count"] == 24
    for file in (SAMPLES_FILE, SAMPLES_BEFORE_FILE):
        assert len((tmp_path / "run" / file).read_text(encoding="utf-8").splitlines()) == 24
    report = json.loads((tmp_path / "run" / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["calibration"] == 6 and any(one["clipped"] for one in report["tensors"]) and len(report["tensors"]) == 21


def test_more_groups_than_the_decoder_may_be_quantized(tmp_path: Path) -> None:
    model = write_model("tiny_llava", tmp_path / "base")
    folder = tmp_path / "run" / quantize(model, tmp_path / "base", tmp_path / "run", keep=("vision",)).checkpoint
    packed = {name for name in open_tensors(folder) if name.endswith("_packed")}
    assert {"language_model.lm_head.weight_packed", "multi_modal_projector.linear_1.weight_packed"} <= packed
    find_family("llava").load(folder, model, torch.float32)


def test_what_cannot_be_quantized_is_refused(made: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, folder = made
    with pytest.raises(InputRefused, match=r"no linear layer is left to quantize"):
        quantize(model, base, tmp_path / "none", keep=("vision", "projector", "lm", "head"))
    with pytest.raises(InputRefused, match=r"is quantized already \(compressed-tensors\). Take the weights that it was made of"):
        quantize(model, folder, tmp_path / "twice")
    with pytest.raises(InputRefused, match=r"scheme=nf4: there is not a kernel for it on cpu.*scheme=int8"):
        quantize(model, base, tmp_path / "nf4", scheme="nf4")
    write_adapter(model, base, tmp_path / "adapter")
    with pytest.raises(InputRefused, match=r"is an adapter, and quantize works on whole weights. Merge it first"):
        quantize(model, tmp_path / "adapter", tmp_path / "adapted")
