"""Adapters of any origin that have trained single rows of embeddings or head: peft's trainable_token_indices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import Made, make_tiny  # noqa: F401
from tests.trainer.peft_adapter import OLDER, assert_equal, load, logits_of, merged_logits, rename, train_by_peft, write_config
from tests.trainer.product import run_program, stage_spec
from trainer.checkpoint.resume import continue_adapter
from trainer.contract import InputRefused, Lora, Merging, StageSpec
from trainer.stages.adapter import merge_adapter
from trainer.stages.adapter_layout import read_layout
from trainer.stages.group import apply_stage

Make = Callable[[str], Made]
TEXT = "What is in this image? Name the colours of the rainbow."  # of the probes
UNUSED = 383  # a row of the tiny models that no token has


def ids_of(made: Made) -> list[int]:
    return sorted(set(made.processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]))


def listed(made: Made, form: str) -> dict[str, Any]:
    """Settings of peft."""
    ids = ids_of(made)
    forms = {
        "embeddings": ids[:6],
        "both": {"embed_tokens": ids[:6], "lm_head": ids[:6]},
        "head": {"lm_head": ids[:6]},
        "other rows of each": {"embed_tokens": ids[:6], "lm_head": ids[4:9]},
    }
    return {"trainable_token_indices": forms[form], "target_modules": ["q_proj", "up_proj"]}


FORMS = ("embeddings", "both", "head", "other rows of each")


@pytest.mark.parametrize("older", (True, False), ids=("older names", "names of today"))
@pytest.mark.parametrize("form", FORMS)
def test_rows_give_the_logits_of_training(form: str, older: bool, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path, **listed(made, form))
    if older:
        rename(tmp_path, *OLDER["tiny_qwen2_5_vl"])
    rows = read_layout(tmp_path, load(made)).rows
    assert {name: len(one.ids) for name, one in rows.items()} == {
        "embeddings": {"model.language_model.embed_tokens.weight": 6},
        "both": {"model.language_model.embed_tokens.weight": 6, "lm_head.weight": 6},
        "head": {"lm_head.weight": 6},
        "other rows of each": {"model.language_model.embed_tokens.weight": 6, "lm_head.weight": 5},
    }[form]
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_tied_head_are_those_of_training(form: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """Merged in memory and from file to file; the head stays tied where both have the same rows."""
    made = make_tiny("tiny_minicpm_v_4_6")
    wanted = train_by_peft(made, tmp_path / "adapter", **listed(made, form))
    merged = merge_adapter(load(made), tmp_path / "adapter")
    assert_equal(logits_of(merged, made), wanted, logits_of(load(made), made))
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # type: ignore[operator]
    assert tied == (form in ("embeddings", "both"))
    result = run_program(stage_spec("merge", made.spec.model, tmp_path / "adapter", tmp_path / "run", merging=Merging()))
    opened = made.family.load(tmp_path / "run" / result.checkpoint, made.spec.model, torch.float32).eval()
    assert torch.allclose(logits_of(opened, made), wanted, atol=2e-4)
    assert (opened.get_input_embeddings().weight is opened.get_output_embeddings().weight) == tied  # type: ignore[operator]


def continued(made: Made, folder: Path, *, targets: tuple[str, ...] = ("q_proj", "up_proj"), tokens: tuple[str, ...] = ()) -> Any:
    lora = Lora(r=4, alpha=8, dropout=0.0, targets=targets)
    model_spec = replace(made.spec.model, add_tokens=tokens)
    stage = StageSpec(name="lora", kind="train", trainable=(), lora=lora, checkpoint=str(folder))
    model = made.family.load(made.folder, model_spec, torch.float32)
    layout = read_layout(folder, model)
    staged = apply_stage(model, replace(made.spec, model=model_spec, stage=stage), made.family.unused(model), layout).model
    continue_adapter(staged, layout)
    return staged.eval()


@pytest.mark.parametrize("targets", (("q_proj", "up_proj"), ("v_proj",)), ids=("its own targets", "other targets"))
@pytest.mark.parametrize("form", FORMS)
def test_a_stage_continues_with_the_rows(form: str, targets: tuple[str, ...], make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    settings = listed(made, form) | {"target_modules": r"(?=^model\.language_model\.).*\.(?:q_proj|up_proj)"}
    wanted = train_by_peft(made, tmp_path / "adapter", **settings)
    model = continued(made, tmp_path / "adapter", targets=targets)
    assert torch.allclose(logits_of(model, made), wanted, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("trainable_tokens_delta" in name for name in trained)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    write_config(tmp_path / "again", base_model_name_or_path=str(made.folder))
    assert torch.allclose(merged_logits(made, tmp_path / "again"), wanted, atol=2e-4)


def test_a_stage_adds_tokens_to_the_rows_of_an_adapter(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """Rows that only the stage has start as those of its model."""
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path, **listed(made, "embeddings"))
    model = continued(made, tmp_path, tokens=("<a>", "<b>"))
    layer = model.get_input_embeddings().token_adapter
    start = made.family.load(made.folder, replace(made.spec.model, add_tokens=("<a>", "<b>")), torch.float32)
    first = len(made.processor.tokenizer)
    assert layer.token_indices["default"] == [first, first + 1, *ids_of(made)[:6]]
    saved = next(value for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "trainable_tokens" in key)
    rows = layer.trainable_tokens_delta["default"]
    assert torch.equal(rows[:2], start.get_input_embeddings().weight[first : first + 2])  # type: ignore[operator]
    assert torch.equal(rows[2:], saved)
    assert torch.allclose(logits_of(model, made)[:, :first], wanted[:, :first], atol=1e-5)


@pytest.mark.usefixtures("process_group")
def test_rows_alone_count_as_training_and_rows_of_the_base_do_not(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """The probes have no token of this row, so that their logits stay."""
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path, trainable_token_indices=[UNUSED], target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert torch.equal(merged_logits(made, tmp_path), logits_of(load(made), made))
    merge = stage_spec("merge", made.spec.model, tmp_path, tmp_path / "run", merging=Merging())
    merged = made.family.load(tmp_path / "run" / run_program(merge).checkpoint, made.spec.model, torch.float32)
    (rows,) = (key for key in tensors if "trainable_tokens" in key)
    assert torch.equal(merged.get_input_embeddings().weight[UNUSED], tensors[rows][0])  # type: ignore[operator]
    save_file({**tensors, rows: load(made).get_input_embeddings().weight[[UNUSED]].detach().clone()}, file)  # type: ignore[operator]
    with pytest.raises(InputRefused, match="did nothing: with and without it the logits"):
        merged_logits(made, tmp_path)
    with pytest.raises(InputRefused, match="did nothing: the logits of"):
        run_program(stage_spec("merge", made.spec.model, tmp_path, tmp_path / "run2", merging=Merging()))


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    (
        ({}, {"trainable_token_indices": [5]}, r"trainable_token_indices is set, and there are no rows"),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": [5]}, r"the rows \[5\] of .* are \[2, 64\], and the base has"),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": [5, 384]}, r"the rows \[5, 384\].*Set model\.add_tokens"),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": [5, -1]}, r"the rows \[5, -1\] of"),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": ["a", "b"]}, r"has no list of numbers for"),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": None}, r"the rows \[\] of"),
    ),
    ids=("no rows", "other number", "too high", "negative", "no numbers", "none"),
)
def test_rows_that_are_not_whole_are_refused(
    settings: dict[str, Any],
    changes: dict[str, Any],
    said: str,
    make_tiny: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path, **{"target_modules": ["q_proj"], **settings})
    write_config(tmp_path, **changes)
    with pytest.raises(InputRefused, match=said):
        merge_adapter(load(made), tmp_path)
