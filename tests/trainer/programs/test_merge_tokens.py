"""Merging an adapter with rows of new tokens: equal to peft's own merge in every family, in a checkpoint that has grown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.trainer.models.conftest import TINY
from tests.trainer.product import run_program, stage_spec, write_model
from trainer.contract import InputRefused, Lora, Merging, ModelSpec, StageSpec
from trainer.contract.weight_files import TOKENIZER_CONFIG, read_added_tokens
from trainer.models import find_family
from trainer.stages.group import apply_stage
from trainer.tensor.stream import PickledTensor, open_tensors
from trainer.tensor.table import TableSource, replace_rows

pytestmark = pytest.mark.usefixtures("process_group")
LORA = StageSpec(name="lora", kind="train", trainable=(), lora=Lora(r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")))
MANY = tuple(f"<l{number}>" for number in range(80))
FEW = MANY[:3]


def write_adapter(spec: ModelSpec, base: Path, folder: Path, scratch: Path) -> None:
    """As a LoRA run saves it, with values that are not those of the start."""
    family = find_family(spec.family)
    model = family.load(base, spec, torch.float32)
    staged = apply_stage(model, replace(stage_spec("train", spec, base, scratch), stage=LORA), family.unused(model)).model
    torch.manual_seed(2)
    trained = {name: parameter for name, parameter in staged.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    staged.peft_config["default"].base_model_name_or_path = str(base)
    staged.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
    family.load_processor(base, spec).save(folder)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["in unused rows", "grown"])
def test_a_merge_is_that_of_peft(name: str, tokens: tuple[str, ...], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    spec = replace(write_model(name, base), add_tokens=tokens)
    write_adapter(spec, base, adapter, tmp_path / "scratch")
    result = run_program(stage_spec("merge", spec, adapter, tmp_path / "run", merging=Merging()))
    assert result.evaluation["logit_error"] <= result.evaluation["logit_bound"], "logits of base and adapter"
    merged, family = tmp_path / "run" / result.checkpoint, find_family(spec.family)
    opened = family.load(merged, replace(spec, add_tokens=()), torch.float32)
    wanted = PeftModel.from_pretrained(family.load(base, spec, torch.float32), str(adapter)).merge_and_unload()
    assert opened.config.get_text_config().vocab_size == len(opened.get_input_embeddings().weight) == (448 if tokens == MANY else 384)
    ids = list(wanted.added_token_ids)
    for own, other in (
        (each(opened), each(wanted)) for each in (lambda m: m.get_input_embeddings().weight, lambda m: m.get_output_embeddings().weight)
    ):
        assert torch.equal(own[ids], other[ids]), "the trained rows"
        assert torch.equal(own[: ids[0]], other[: ids[0]]), "those before them"
    assert read_added_tokens(merged) == tokens
    assert len(family.load_processor(merged, replace(spec, add_tokens=())).tokenizer) == ids[-1] + 1


def test_rows_that_do_not_fit_the_base_are_refused(tmp_path: Path) -> None:
    """The stage was planned without the tokens, and nothing in the adapter's folder names them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    spec = write_model("tiny_llava", base)
    write_adapter(replace(spec, add_tokens=MANY), base, adapter, tmp_path / "scratch")
    (adapter / TOKENIZER_CONFIG).unlink()
    with pytest.raises(InputRefused, match=r"the rows \[323, 324, 325, 326, 327\] of \S+ are \[80, 96\], and the base has \[384, 96\]"):
        run_program(stage_spec("merge", spec, adapter, tmp_path / "run", merging=Merging()))
    config = json.loads((adapter / "adapter_config.json").read_text())
    ids = next(iter(config["trainable_token_indices"].values()))
    config["trainable_token_indices"] = ids[:-1]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=r"are \[80, 96\], and the base has \[448, 96\]"):
        run_program(stage_spec("merge", replace(spec, add_tokens=MANY), adapter, tmp_path / "run2", merging=Merging()))


def test_tokens_in_another_order_than_their_rows_are_refused(tmp_path: Path) -> None:
    """A base without rows for all of them has unused rows, so that the numbers alone would fit."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    spec = write_model("tiny_llava", base)
    write_adapter(replace(spec, add_tokens=FEW), base, adapter, tmp_path / "scratch")
    for tokens in ((), FEW[:2], FEW[::-1], ("<new>", *FEW)):
        with pytest.raises(InputRefused, match=r'other new tokens, or in another order.* Set model\.add_tokens=\["<l0>","<l1>","<l2>"\]'):
            run_program(stage_spec("merge", replace(spec, add_tokens=tokens), adapter, tmp_path / "run", merging=Merging()))
    merged = run_program(stage_spec("merge", replace(spec, add_tokens=(*FEW, "<new>")), adapter, tmp_path / "run", merging=Merging()))
    assert read_added_tokens(tmp_path / "run" / merged.checkpoint)[:3] == FEW


@pytest.mark.parametrize(("start", "count"), [(0, 12), (0, 24), (3, 10), (13, 9), (12, 3), (5, 1), (23, 1)])
def test_any_part_of_a_table_with_more_rows_is_read(start: int, count: int) -> None:
    own = torch.arange(12.0).view(4, 3)
    table = replace_rows(TableSource(base=PickledTensor(tensor=own), rows=8), [1, 6], torch.tensor([[-1.0, -2, -3], [7, 8, 9]]))
    whole = torch.cat([own, own.mean(dim=0).expand(4, -1)])
    whole[1], whole[6] = torch.tensor([-1.0, -2, -3]), torch.tensor([7.0, 8, 9])
    assert torch.equal(table.read(start, count), whole.flatten()[start : start + count])
    assert torch.equal(table.read_whole(), whole) and torch.equal(own, torch.arange(12.0).view(4, 3))


def test_the_tensors_of_a_folder_without_new_rows_are_not_wrapped(tmp_path: Path) -> None:
    write_model("tiny_llava", tmp_path)
    assert not any(isinstance(source, TableSource) for source in open_tensors(tmp_path).values())
