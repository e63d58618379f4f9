"""Another type for every weight: what each tensor loses is named, what does not survive stays float32 or stops it all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import TINY
from tests.trainer.product import run_program, stage_spec, write_adapter, write_model
from trainer.contract import Conversion, InputRefused, ModelSpec, Precision, TrainResult, WeightsLineage
from trainer.contract.weight_files import PICKLED, WEIGHTS
from trainer.models import find_family
from trainer.programs.convert import REPORT_FILE
from trainer.tensor.cast_error import measure_cast_error
from trainer.tensor.fp32_exceptions import FLOAT32_TENSORS
from trainer.tensor.stream import open_tensors
from trainer.train.model import load_or_create

pytestmark = pytest.mark.usefixtures("process_group")
HALF = Precision(name="fp16", weights="float16", compute="float16", optimizer="float16", gradients="float16")
PLANTED = {  # name in the files -> (place, value)
    "language_model.model.layers.0.mlp.up_proj.weight": ((3, 4), 1e5),
    "language_model.model.layers.1.mlp.up_proj.weight": ((1, 2), 1e-6),
    "multi_modal_projector.linear_1.bias": ((5,), float("nan")),
    "vision_tower.pre_layrnorm.bias": ((0,), 1e-12),
}


def convert(model: ModelSpec, checkpoint: Path, output: Path, **options: Any) -> TrainResult:
    return run_program(stage_spec("convert", model, checkpoint, output, conversion=Conversion(**options)))


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: source.read_whole() for name, source in open_tensors(folder).items()}


def report_of(output: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["tensors"]
    return {one["name"]: one for one in found}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path]:
    folder = tmp_path_factory.mktemp("plain") / "base"
    return write_model("tiny_llava", folder), folder


@pytest.fixture(scope="module")
def planted(plain: tuple[ModelSpec, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path]:
    """A tiny LLaVA in float32 with values that float16 has not."""
    model, base = plain
    folder = tmp_path_factory.mktemp("planted") / "base"
    find_family("llava").load(base, model, torch.float32).save_pretrained(folder)
    find_family("llava").load_processor(base, model).save(folder)
    tensors = load_file(folder / WEIGHTS)
    for name, (place, value) in PLANTED.items():
        tensors[name][place] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return model, folder


# ------------------------------------------------------------------------------------------------------------ each to each


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_every_tensor_is_rounded_once_and_the_family_opens_the_result(name: str, dtype: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "base")
    result = convert(model, tmp_path / "base", tmp_path / "run", dtype=dtype, shard_bytes=300_000)
    folder = tmp_path / "run" / result.checkpoint
    before, after = values_of(tmp_path / "base"), values_of(folder)
    kind = getattr(torch, dtype)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key].to(kind)) for key in before)
    assert 1e-7 < result.evaluation["logit_error"] < 0.05 and result.evaluation["kept"] == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == dtype and dtype in json.dumps(config) and "float32" not in json.dumps(config).replace(FLOAT32_TENSORS, "")
    loaded = find_family(model.family).load(folder, model, kind)
    assert {parameter.dtype for parameter in loaded.parameters()} == {kind}


def test_bfloat16_comes_back_from_float32_to_the_bit(tmp_path: Path) -> None:
    model = write_model("tiny_llava", tmp_path / "base", torch.bfloat16)
    wide = tmp_path / "wide" / convert(model, tmp_path / "base", tmp_path / "wide", dtype="float32").checkpoint
    narrow = tmp_path / "narrow" / convert(model, wide, tmp_path / "narrow", dtype="bfloat16").checkpoint
    before, after = values_of(tmp_path / "base"), values_of(narrow)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert all(tensor.dtype == torch.float32 for tensor in values_of(wide).values())


def test_bin_files_become_safetensors_without_a_pickle(plain: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    model, base = plain
    folder = tmp_path / "base"
    find_family("llava").load_processor(base, model).save(folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save(load_file(base / WEIGHTS), folder / PICKLED)
    result = convert(model, folder, tmp_path / "run", dtype="float32", probes=0)
    made = tmp_path / "run" / result.checkpoint
    assert not list(made.glob("*.bin")) and values_of(made).keys() == values_of(base).keys()
    assert all(torch.equal(tensor, values_of(base)[key]) for key, tensor in values_of(made).items())


def test_code_in_a_bin_file_is_never_run(plain: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    model, base = plain
    folder, proof = tmp_path / "base", tmp_path / "proof"
    find_family("llava").load_processor(base, model).save(folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save({"weight": Planted(proof)}, folder / PICKLED)
    with pytest.raises(InputRefused, match=r"not a file of tensors"):
        convert(model, folder, tmp_path / "run")
    assert not proof.exists()


class Planted:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


# -------------------------------------------------------------------------------------------------------- what does not fit


def test_an_overflow_a_denormal_a_nan_and_a_zero_are_each_named(
    planted: tuple[ModelSpec, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = planted
    result = convert(model, base, tmp_path / "run", dtype="float16", probes=0)
    overflow, denormal, nan, zero = (report_of(tmp_path / "run")[name] for name in PLANTED)
    assert (overflow["overflow"], overflow["unfit"]) == (1, True)
    assert denormal["denormal"] >= 1 and not denormal["unfit"]
    assert (nan["nan"], nan["unfit"]) == (1, False) and zero["underflow"] == 1
    said = capsys.readouterr().out
    assert "layers.0.mlp.up_proj.weight: 1 overflow" in said and "kept in float32" in said
    assert "multi_modal_projector.linear_1.bias: " in said and "1 NaN in the source" in said and "pre_layrnorm.bias: 1 vanish" in said
    assert result.evaluation["overflow"] == 1 and result.evaluation["nan"] == 1 and result.evaluation["kept"] == 1


def test_unfit_tensors_stop_it_before_anything_is_written(planted: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    model, base = planted
    with pytest.raises(InputRefused, match=r"float16 cannot hold .*up_proj.weight \(1 overflow.*NaN in the source.*Nothing was written"):
        convert(model, base, tmp_path / "run", dtype="float16", unfit="refuse")
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "run" / REPORT_FILE).is_file()


def test_a_tensor_whose_values_all_vanish_is_unfit_and_a_few_of_them_are_not(tmp_path: Path) -> None:
    values = torch.full((4096,), 1e-9)
    save_file({"all": values, "few": torch.cat((torch.ones(4096), values[:4]))}, tmp_path / WEIGHTS)
    found = {name: measure_cast_error(name, source, torch.float16) for name, source in open_tensors(tmp_path).items()}
    assert found["all"].unfit and found["all"].underflow == 4096 and found["all"].loss == 1
    assert not found["few"].unfit and found["few"].underflow == 4 and found["few"].loss < 1e-8


def test_what_is_kept_computes_in_float32_among_16_bits(plain: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    """transformers alone makes an infinity of it; the trainer reads it again."""
    model, base = plain
    large = tmp_path / "base"
    find_family("llava").load_processor(base, model).save(large)
    (large / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors, name = load_file(base / WEIGHTS), "language_model.model.layers.0.input_layernorm.weight"
    tensors[name][7] = 1e5
    tensors["language_model.model.embed_tokens.weight"][:, 7] *= 1e-3  # so that what comes out of it is within float16
    save_file(tensors, large / WEIGHTS, metadata={"format": "pt"})
    spec = stage_spec("convert", model, large, tmp_path / "run", conversion=Conversion(dtype="float16", probes=0))
    folder = tmp_path / "run" / run_program(spec).checkpoint
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))[FLOAT32_TENSORS] == [name]
    alone = find_family("llava").load(folder, model, torch.float16).model.language_model.layers[0].input_layernorm.weight
    assert alone.dtype == torch.float16 and alone.isinf().any()
    ours, _ = load_or_create(replace(spec, precision=HALF), find_family("llava"), WeightsLineage(path=str(folder)))
    weight = ours.model.language_model.layers[0].input_layernorm.weight
    assert weight.dtype == torch.float32 and float(weight.detach()[7]) == 1e5
    wide = find_family("llava").load(large, model, torch.float32)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        found, wanted = ours.eval()(input_ids=ids).logits, wide.eval()(input_ids=ids).logits
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert (found.float() - wanted).abs().max() < 0.03 * wanted.abs().max()
    trained = replace(spec, precision=HALF, stage=replace(spec.stage, kind="train", trainable=("lm",)))
    with pytest.raises(InputRefused, match=r"1 of its tensors do not fit into float16 and are float32"):
        load_or_create(trained, find_family("llava"), WeightsLineage(path=str(folder)))


def test_an_adapter_is_merged_before_it_is_converted(plain: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    model, base = plain
    write_adapter(model, base, tmp_path / "adapter")
    with pytest.raises(InputRefused, match=r"is an adapter, and convert needs full weights. Merge it first: .*stage=merge"):
        convert(model, tmp_path / "adapter", tmp_path / "run")
