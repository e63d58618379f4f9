from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.models.conftest import CONF, TINY, model_spec
from trainer.contract import InputRefused, Template
from trainer.models.registry import find_family
from trainer.models.tiny import main, read_model, write_checkpoint
from trainer.models.tiny_tokenizer import tiny_tokenizer

VICUNA = Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>")
TEXT = "USER: <image><image>\nWhich digit is this, 是什么? ASSISTANT: 7</s>\x00 é"


def test_the_tokenizer_fits_the_vocabulary() -> None:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    assert len(tokenizer) == 323 <= 384
    assert max(tokenizer(TEXT)["input_ids"]) < len(tokenizer)


def test_special_tokens() -> None:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.image_token) == ("</s>", "<pad>", None, "<image>")
    assert tokenizer.padding_side == "right"
    assert tokenizer("<image></s>")["input_ids"] == [tokenizer.image_token_id, tokenizer.eos_token_id]


def test_any_text_is_decoded_unchanged() -> None:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_the_ids_never_change() -> None:
    """Golden: the weights of a tiny model belong to these ids."""
    assert tiny_tokenizer("<image>", VICUNA)("USER: <image>\nWhich digit is this? ASSISTANT: 7</s>")["input_ids"] == [
        269,
        25,
        220,
        322,
        198,
        54,
        296,
        317,
        307,
        259,
        273,
        30,
        277,
        25,
        220,
        22,
        320,
    ]


@pytest.mark.parametrize(("image_token", "end_mark"), [("<image>", "</s>"), ("<|image_pad|>", "<|im_end|>")])
def test_a_saved_tokenizer_has_the_same_ids(tmp_path: Path, image_token: str, end_mark: str) -> None:
    template = Template(user="{content}", assistant_open="", end_mark=end_mark)
    tokenizer = tiny_tokenizer(image_token, template)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{TEXT}{image_token}{end_mark}"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == tiny_tokenizer(image_token, template)(text)["input_ids"]
    assert (again.eos_token, again.pad_token, again.padding_side) == (end_mark, "<pad>", "right")
    assert again.image_token == image_token


def test_further_special_tokens_do_not_change_the_others() -> None:
    plain, more = tiny_tokenizer("<image>", VICUNA), tiny_tokenizer("<image>", VICUNA, {"turn_token": "<|im_start|>"})
    assert more(TEXT)["input_ids"] == plain(TEXT)["input_ids"]
    assert more("<|im_start|>")["input_ids"] == [more.turn_token_id] == [323]


@pytest.mark.parametrize("name", TINY)
def test_the_family_loads_the_written_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = CONF / f"{name}.yaml", tmp_path / name
    assert replace(read_model(file), architecture={}) == replace(model_spec(name), architecture={})
    assert main([str(file), str(folder)]) == 0
    assert f"model.source.path={folder}" in capsys.readouterr().out
    model = model_spec(name)
    family = find_family(model.family)
    torch.manual_seed(0)
    made = family.create(model)
    assert all(
        torch.equal(ours, its) for ours, its in zip(made.parameters(), family.load(folder, model, torch.float32).parameters(), strict=True)
    )
    assert family.load_processor(folder, model).span((32, 32), 0) == family.create_processor(model).span((32, 32), 0)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("name: [", encoding="utf-8")
    with pytest.raises(InputRefused, match=r"other\.yaml: not a model file of conf/model"):
        write_checkpoint(tmp_path / "other.yaml", tmp_path / "new")
    with pytest.raises(InputRefused, match="is not empty"):
        write_checkpoint(CONF / "tiny_llava.yaml", tmp_path)
    assert main([]) == main([str(tmp_path / "none.yaml"), str(tmp_path / "new")]) == 2
    assert "usage" in capsys.readouterr().err
