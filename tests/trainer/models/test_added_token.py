"""New tokens: their ids, the rows of embeddings and head, and the files, in every family."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer.models.conftest import OURS, Made
from trainer.contract import InputRefused, ModelSpec
from trainer.contract.weight_files import ADDED_TOKENS, read_added_tokens
from trainer.models.added_token import MULTIPLE, grown_rows, with_rows, write_tokens

FEW = ("<loc>", "</loc>", "<位置>")
MANY = tuple(f"<l{number}>" for number in range(80))  # more than the 50 unused rows of the tiny models


def with_tokens(made: Made, tokens: tuple[str, ...]) -> ModelSpec:
    return replace(made.spec.model, add_tokens=tokens)


@pytest.mark.parametrize(("tokens", "rows"), [(FEW, 384), (MANY, 448)], ids=["in unused rows", "grown"])
def test_new_rows_start_as_the_mean_and_all_others_stay(tiny: Made, tokens: tuple[str, ...], rows: int) -> None:
    spec, used = with_tokens(tiny, tokens), len(tiny.processor.tokenizer)
    model = tiny.family.load(tiny.folder, spec, torch.float32)
    ids = [*range(used, used + len(tokens))]
    assert model.added_token_ids == tuple(ids)
    before, after = (each.get_input_embeddings().weight for each in (tiny.model, model))
    heads = [each.get_output_embeddings().weight for each in (tiny.model, model)]
    assert (heads[1] is after) == (heads[0] is before), "a tied head stays tied"
    for old, new in ((before, after), heads):
        assert new.shape == (rows, old.shape[1]) and rows % MULTIPLE == 0
        torch.testing.assert_close(new[ids], old[:used].mean(dim=0).expand(len(ids), -1))
        assert torch.equal(new[:used], old[:used])
        kept = slice(used + len(tokens), len(old))
        assert torch.equal(new[kept], old[kept]), "unused rows that get no token"
    assert model.config.get_text_config().vocab_size == rows
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == rows


def test_each_token_is_one_id_that_is_read_back(tiny: Made) -> None:
    tokenizer = tiny.family.load_processor(tiny.folder, with_tokens(tiny, FEW)).tokenizer
    first = len(tiny.processor.tokenizer)
    ids = tokenizer("a<loc>b</loc><位置>", add_special_tokens=False)["input_ids"]
    assert [place for place in ids if place >= first] == [first, first + 1, first + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<loc>b</loc><位置>", "answers show them"
    plain = "Which digit is this?"
    assert tokenizer(plain)["input_ids"] == tiny.processor.tokenizer(plain)["input_ids"]


def test_a_checkpoint_keeps_its_rows_and_gets_further_ones(tiny: Made, tmp_path: Path) -> None:
    spec = with_tokens(tiny, MANY)
    model = tiny.family.load(tiny.folder, spec, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    model.save_pretrained(tmp_path)
    tiny.family.load_processor(tiny.folder, spec).save(tmp_path)
    assert read_added_tokens(tmp_path) == MANY
    kind = PreTrainedTokenizerFast if tiny.spec.model.family in OURS else AutoTokenizer  # the first config names code
    opened = kind.from_pretrained(tmp_path, local_files_only=True)
    assert opened.convert_tokens_to_ids(list(MANY)) == list(model.added_token_ids), "transformers opens the tokenizer"
    for tokens in (MANY, (), (*MANY, *FEW)):
        again = tiny.family.load(tmp_path, with_tokens(tiny, tokens), torch.float32)
        wanted, found = (each.get_input_embeddings().weight for each in (model, again))
        kept = torch.tensor(
            [row for row in range(len(wanted)) if row not in set(again.__dict__.get("added_token_ids", ())) - set(model.added_token_ids)]
        )
        assert torch.equal(found[kept], wanted[kept])
        assert len(tiny.family.load_processor(tmp_path, with_tokens(tiny, tokens)).tokenizer) == len(opened) + len(tokens[80:])


def test_on_the_meta_device_the_shapes_are_the_same(tiny: Made) -> None:
    spec = with_tokens(tiny, MANY)
    shapes = [
        {name: p.shape for name, p in tiny.family.load(tiny.folder, spec, torch.float32, on_meta=meta).named_parameters()}
        for meta in (True, False)
    ]
    assert shapes[0] == shapes[1]


def test_without_tokens_nothing_changes(tiny: Made) -> None:
    model = tiny.family.load(tiny.folder, tiny.spec.model, torch.float32)
    wanted = tiny.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items()) and not hasattr(model, "added_token_ids")


def test_a_token_that_is_there_is_refused(make_tiny: Callable[[str], Made]) -> None:
    tiny = make_tiny("tiny_llava")
    for token in ("a", "<pad>", "<image>"):
        with pytest.raises(InputRefused, match=f"the tokenizer has '{token}' \\(id \\d+\\) already"):
            tiny.family.load_processor(tiny.folder, with_tokens(tiny, ("<new>", token)))
        with pytest.raises(InputRefused, match="already"):
            tiny.family.load(tiny.folder, with_tokens(tiny, (token,)), torch.float32)


def test_a_token_that_the_tokenizer_cannot_write_is_refused(make_tiny: Callable[[str], Made]) -> None:
    tiny = make_tiny("tiny_llava")
    with pytest.raises(InputRefused, match="does not write '<über>' back as it is"):
        tiny.family.load_processor(tiny.folder, with_tokens(tiny, ("<loc>", "<über>")))


def test_files_that_were_copied_unchanged_get_the_tokens(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    """Those of MiniCPM-V 2.6, whose published code transformers 5 does not write for."""
    tiny = make_tiny("tiny_minicpm_v_2_6")
    tokenizer = tiny.family.load_processor(tiny.folder, with_tokens(tiny, FEW)).tokenizer
    tiny.processor.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<unk>": 0}')
    write_tokens(tokenizer, tmp_path)
    ids = tokenizer.convert_tokens_to_ids(list(FEW))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True).convert_tokens_to_ids(list(FEW)) == ids
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<unk>": 0, **dict(zip(FEW, ids, strict=True))}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())[ADDED_TOKENS] == list(FEW)


@pytest.mark.parametrize(("rows", "tokens", "grown"), [(384, 384, 384), (384, 385, 448), (100, 90, 100), (100, 101, 128), (128, 129, 192)])
def test_rows_grow_only_where_they_are_too_few(rows: int, tokens: int, grown: int) -> None:
    assert grown_rows(rows, tokens) == grown


def test_the_mean_is_computed_in_float32_and_rounded() -> None:
    weight = torch.nn.Parameter(torch.full((3, 2), 1.0, dtype=torch.bfloat16))
    weight.data[0] = 256.0
    grown = with_rows(weight, 64, 3, [])
    assert grown.dtype == torch.bfloat16 and grown[63, 0] == torch.tensor(86.0, dtype=torch.bfloat16)
