from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trainer.contract import Template
from trainer.models.tiny import tiny_tokenizer

VICUNA = Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>")
TEXT = "USER: <image><image>\nWhich digit is this, 是什么? ASSISTANT: 7</s>\x00 é"


def test_it_fits_the_vocabulary_of_the_model() -> None:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    assert len(tokenizer) == 323 <= 384
    assert max(tokenizer(TEXT)["input_ids"]) < len(tokenizer)


def test_special_tokens() -> None:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.image_token) == ("</s>", "<pad>", None, "<image>")
    assert tokenizer.padding_side == "right"
    assert tokenizer("<image></s>")["input_ids"] == [tokenizer.image_token_id, tokenizer.eos_token_id]


def test_any_text_comes_back() -> None:
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
def test_it_opens_again_with_the_same_ids(tmp_path: Path, image_token: str, end_mark: str) -> None:
    template = Template(user="{content}", assistant_open="", end_mark=end_mark)
    tokenizer = tiny_tokenizer(image_token, template)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{TEXT}{image_token}{end_mark}"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == tiny_tokenizer(image_token, template)(text)["input_ids"]
    assert (again.eos_token, again.pad_token, again.padding_side) == (end_mark, "<pad>", "right")
    assert again.image_token == image_token
