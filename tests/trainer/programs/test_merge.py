"""Merging file by file: equal to peft's own merge in every family, the same answers as base and adapter, and every misfit refused."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import TINY
from tests.trainer.product import run_program, stage_spec, write_adapter, write_model
from trainer.checkpoint.adapter import add_low_rank
from trainer.checkpoint.checkpoint import require_whole
from trainer.contract import InputRefused, Merging, ModelSpec, RunFailed, TrainResult
from trainer.contract.checkpoint_files import newest_checkpoint
from trainer.contract.weight_files import INDEX, WEIGHTS
from trainer.models import find_family
from trainer.tensor.stream import open_tensors

pytestmark = pytest.mark.usefixtures("process_group")


def merge(model: ModelSpec, adapter: Path, output: Path, **options: Any) -> TrainResult:
    return run_program(stage_spec("merge", model, adapter, output, merging=Merging(**options)))


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: source.read_whole() for name, source in open_tensors(folder).items()}


def merge_by_peft(model: ModelSpec, base: Path, adapter: Path, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    loaded = find_family(model.family).load(base, model, dtype)
    PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload().save_pretrained(folder)
    return values_of(folder)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a disk that is full does to a writer: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path, Path]:
    """Spec, base, adapter."""
    root = tmp_path_factory.mktemp("llava")
    spec = write_model("tiny_llava", root / "base")
    write_adapter(spec, root / "base", root / "adapter")
    return spec, root / "base", root / "adapter"


# ----------------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_what_peft_merges_and_the_rest_is_the_base_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "base", dtype)
    write_adapter(model, tmp_path / "base", tmp_path / "adapter", dtype=dtype)
    result = merge(model, tmp_path / "adapter", tmp_path / "run", shard_bytes=300_000)
    merged, base = values_of(tmp_path / "run" / result.checkpoint), values_of(tmp_path / "base")
    wanted = merge_by_peft(model, tmp_path / "base", tmp_path / "adapter", dtype, tmp_path / "peft")
    assert merged.keys() == wanted.keys() == base.keys()
    assert all(torch.equal(merged[key], wanted[key]) and merged[key].dtype == base[key].dtype for key in merged)
    changed = {key for key in merged if not torch.equal(merged[key], base[key])}
    assert 10 < len(changed) < len(merged) / 2
    least = 0 if dtype == torch.float32 else 1e-4  # rounding is seen, and stays within what it may do
    assert least < result.evaluation["logit_error"] <= result.evaluation["logit_bound"] < 0.03
    assert result.evaluation["probes"] == 4
    if dtype == torch.float32:
        assert result.evaluation["logit_bound"] == 1e-5


@pytest.mark.parametrize(
    "options",
    (
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r".*layers\.1\..*down_proj": 8}, "alpha_pattern": {"q_proj": 5, "k_proj": 2}},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": r".*language_model.*\.fc_none|.*multi_modal_projector\.linear_[12]", "whole": False},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "whole": False},
    ),
    ids=("rslora", "patterns", "bias", "lora_bias", "embeddings"),
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # peft 0.21.2 takes lora_bias for a shard of a factor
def test_variants_that_peft_merges_too(options: dict[str, Any], llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, _ = llava
    write_adapter(model, base, tmp_path / "adapter", **options)
    result = merge(model, tmp_path / "adapter", tmp_path / "run")
    merged = values_of(tmp_path / "run" / result.checkpoint)
    wanted = merge_by_peft(model, base, tmp_path / "adapter", torch.float32, tmp_path / "peft")
    assert all(torch.equal(merged[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(tensor, merged[key]) for key, tensor in values_of(base).items())


def test_rows_of_a_large_tensor_are_merged_a_few_at_a_time(
    llava: tuple[ModelSpec, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, adapter = llava
    monkeypatch.setattr("trainer.checkpoint.adapter.PIECE_ELEMENTS", 500)
    monkeypatch.setattr("trainer.tensor.stream.PIECE_ELEMENTS", 500)
    merged = values_of(tmp_path / "run" / merge(model, adapter, tmp_path / "run").checkpoint)
    wanted = merge_by_peft(model, base, adapter, torch.float32, tmp_path / "peft")
    assert all(torch.allclose(merged[key], wanted[key], rtol=0, atol=1e-7) for key in wanted)  # a product of few rows adds in another order


def test_an_adapter_with_the_names_of_the_files_is_merged_as_well(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    """As transformers 4 named the modules of LLaVA when it was trained."""
    model, _, adapter = llava
    old = tmp_path / "adapter"
    shutil.copytree(adapter, old)
    tensors = load_file(old / "adapter_model.safetensors")
    lm, head, rest = "base_model.model.model.language_model.", "base_model.model.lm_head.", "base_model.model.model."
    renames = (
        (lm, "base_model.model.language_model.model."),
        (head, "base_model.model.language_model.lm_head."),
        (rest, "base_model.model."),
    )
    named = {}
    for key, tensor in tensors.items():
        before, after = next(pair for pair in renames if key.startswith(pair[0]))
        named[after + key.removeprefix(before)] = tensor
    save_file(named, old / "adapter_model.safetensors")
    result = merge(model, old, tmp_path / "run", probes=0)
    again = merge(model, adapter, tmp_path / "again", probes=0)
    merged, wanted = (values_of(tmp_path / place / result.checkpoint) for place in ("run", "again"))
    assert again.weights_sha256 == result.weights_sha256 and merged.keys() == wanted.keys()
    assert result.evaluation == {}  # no probes were asked for


def test_the_result_is_a_checkpoint_that_later_stages_open(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, adapter = llava
    result = merge(model, adapter, tmp_path / "run", shard_bytes=200_000)
    state, folder = newest_checkpoint(tmp_path / "run"), tmp_path / "run" / result.checkpoint
    assert state is not None and state.weights_sha256 == result.weights_sha256 and state.run_id == "run"
    assert state.spec["stage.name"] == "merge" and state.spec["model.family"] == "llava" and state.base == ""
    require_whole(folder, "stage.checkpoint")
    assert not list(folder.glob("adapter_*")) and not list(folder.parent.glob(".*"))
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 3 and not any("lora_" in name for name in index["weight_map"])
    assert all((folder / file.name).is_file() for file in base.iterdir() if file.name != WEIGHTS)
    loaded = find_family("llava").load(folder, model, torch.float32)  # transformers' own class
    merged = values_of(folder)
    assert torch.equal(loaded.lm_head.weight, merged["language_model.lm_head.weight"])
    find_family("llava").load_processor(folder, model)
    assert {peak.phase for peak in result.peaks} == {"load", "saving", "evaluation"}


# ----------------------------------------------------------------------------------------------------------- what is wrong


def change_config(adapter: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"use_dora": True}, "use_dora is set, and there is no magnitude"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters is"),
        ({"some_variant_to_come": 3}, "some_variant_to_come is 3"),
    ),
)
def test_a_variant_of_other_sums_is_refused_by_name(
    changes: dict[str, Any], said: str, llava: tuple[ModelSpec, Path, Path], tmp_path: Path
) -> None:
    model, _, adapter = llava
    with pytest.raises(InputRefused, match=said):
        merge(model, change_config(adapter, tmp_path / "adapter", **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_adapter_of_another_base_is_refused_with_what_does_not_fit(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, _, adapter = llava
    other = write_model("tiny_qwen2_5_vl", tmp_path / "base")
    with pytest.raises(InputRefused, match=r"\d+ tensors of the adapter .* without a module in its base: .*stage\.base"):
        merge(other, change_config(adapter, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base")), tmp_path / "run")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
    narrow = change_config(adapter, tmp_path / "narrow")
    save_file({**tensors, key: tensors[key][:-1].clone()}, narrow / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match=r"q_proj.weight is \[96, 96\], not \[95, 96\]"):
        merge(model, narrow, tmp_path / "run")


def test_the_base_of_an_adapter_that_is_gone_is_named(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, _, adapter = llava
    with pytest.raises(InputRefused, match=r"its base .*nowhere is not there. Name the folder that has it now: stage\.base=FOLDER"):
        merge(model, change_config(adapter, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "nowhere")), tmp_path / "run")


def test_whole_weights_have_nothing_to_merge(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, _ = llava
    with pytest.raises(InputRefused, match=r"holds full weights and no adapter: there is nothing to merge"):
        merge(model, base, tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ),
    ids=("embeddings", "head", "whole-head"),
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft says as much, and goes on
def test_a_tied_head_gets_its_own_weights_where_one_of_the_two_changes(settings: dict[str, Any], tmp_path: Path) -> None:
    model = write_model("tiny_minicpm_v_4_6", tmp_path / "base")
    write_adapter(model, tmp_path / "base", tmp_path / "adapter", whole=False, **settings)
    result = merge(model, tmp_path / "adapter", tmp_path / "run")
    folder = tmp_path / "run" / result.checkpoint
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not config["tie_word_embeddings"] and not config["text_config"].get("tie_word_embeddings")
    merged, base = values_of(folder), values_of(tmp_path / "base")
    assert merged.keys() - base.keys() == {"lm_head.weight"}, "and every other tensor has the name that it had"
    assert result.evaluation["logit_error"] <= result.evaluation["logit_bound"] == 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dora_is_merged_as_peft_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_model("tiny_qwen2_5_vl", tmp_path / "base", dtype)
    write_adapter(model, tmp_path / "base", tmp_path / "adapter", dtype=dtype, use_dora=True)
    merged = values_of(tmp_path / "run" / merge(model, tmp_path / "adapter", tmp_path / "run").checkpoint)
    wanted = merge_by_peft(model, tmp_path / "base", tmp_path / "adapter", dtype, tmp_path / "peft")
    bound = 1e-6 if dtype == torch.float32 else 2**-7  # peft takes the length of a row in the base's dtype
    assert all(torch.allclose(merged[key].float(), wanted[key].float(), rtol=bound, atol=bound) for key in wanted)
    assert any(not torch.equal(tensor, merged[key]) for key, tensor in values_of(tmp_path / "base").items())


def test_an_adapter_that_did_nothing_is_not_merged(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, adapter = llava
    idle = change_config(adapter, tmp_path / "idle")
    tensors = {key: tensor * (0 if "lora_B" in key else 1) for key, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file({key: tensor for key, tensor in tensors.items() if "lora_" in key}, idle / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match=r"did nothing: B A is zero in all"):
        merge(model, idle, tmp_path / "run")
    values = values_of(base)  # the projector was trained whole, and is what it was
    same = {
        key: tensor if "lora_" in key else values[key.removeprefix("base_model.model.model.")].clone() for key, tensor in tensors.items()
    }
    save_file(same, idle / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match=r"did nothing: the logits of 4 probes are those of its base"):
        merge(model, idle, tmp_path / "again")
    assert not list((tmp_path / "again").glob("checkpoints/*"))


@pytest.mark.parametrize("harm", ("missing", "cut", "other revision"))
def test_a_shard_that_is_not_whole_is_named(harm: str, llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, adapter = llava
    broken = tmp_path / "base"
    find_family("llava").load(base, model, torch.float32).save_pretrained(broken, max_shard_size="200KB")
    find_family("llava").load_processor(base, model).save(broken)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    if harm == "missing":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        save_file({"another": torch.zeros(1)}, shard)
    with pytest.raises(InputRefused, match=shard.name if harm != "other revision" else "another revision than the index"):
        merge(model, change_config(adapter, tmp_path / "adapter", base_model_name_or_path=str(broken)), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_disk_that_is_full_leaves_nothing_half_done_and_says_what_it_needs(llava: tuple[ModelSpec, Path, Path], tmp_path: Path) -> None:
    model, base, adapter = llava
    before = {file.name: file.stat().st_size for file in base.iterdir()}
    with largest_file(400_000), pytest.raises(RunFailed, match=r"File too large.*The incomplete folder was removed.*GiB.*cluster.root"):
        merge(model, adapter, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert {file.name: file.stat().st_size for file in base.iterdir()} == before
    assert merge(model, adapter, tmp_path / "run").status == "finished"  # as soon as there is room


def test_merged_weights_that_answer_otherwise_are_not_kept(
    llava: tuple[ModelSpec, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, adapter = llava

    def wrong(*arguments: Any) -> Any:
        yield from (piece * 1.01 for piece in add_low_rank(*arguments))

    monkeypatch.setattr("trainer.checkpoint.adapter.add_low_rank", wrong)
    with pytest.raises(RunFailed, match=r"differ from those of base and adapter by .* the bound 1.00e-05"):
        merge(model, adapter, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
