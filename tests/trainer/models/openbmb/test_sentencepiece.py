"""sentencepiece models of type BPE, written here field by field."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from trainer.contract import InputRefused
from trainer.models.openbmb.sentencepiece import BPE_MODEL, BYTE, NORMAL, UNKNOWN, USER, Piece, find_merges, open_pieces, read_pieces

CONTROL = 3
LETTERS = "abcdef 一丁丂"


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A message of sentencepiece_model.proto: field numbers with a varint, a float or bytes."""
    made = b""
    for number, value in fields:
        if isinstance(value, bytes):
            made += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            made += varint(number << 3 | 5) + struct.pack("<f", value) if isinstance(value, float) else varint(number << 3) + varint(value)
    return made


def write(folder: Path, pieces: tuple[Piece, ...], *, kind: int = BPE_MODEL, prefix: int = 1, squeeze: int = 0) -> None:
    own = [(1, message((1, piece.text.encode()), (2, piece.score), (3, piece.kind))) for piece in pieces]
    content = message(*own, (2, message((3, kind))), (3, message((1, b"identity"), (3, prefix), (4, squeeze))))
    (folder / "tokenizer.model").write_bytes(content)


def make_pieces(count: int, *user: str) -> tuple[Piece, ...]:
    """In the order of Llama: three special pieces, `user`, the bytes, merged pieces by decreasing score, single characters."""
    random = np.random.default_rng(3)
    merged, parts = [], ["▁", *LETTERS.replace(" ", "")]
    while len(merged) < count:
        left, right = (parts[place] for place in random.integers(0, len(parts), 2))
        if "▁" not in right and left + right not in parts and len(left + right) < 12:
            merged.append(left + right)
            parts.append(left + right)
    special = [Piece(text="<unk>", score=0.0, kind=UNKNOWN), *(Piece(text=text, score=0.0, kind=CONTROL) for text in ("<s>", "</s>"))]
    own = [Piece(text=text, score=0.0, kind=USER) for text in user]
    raw = [Piece(text=f"<0x{byte:02X}>", score=0.0, kind=BYTE) for byte in range(256)]
    words = [Piece(text=text, score=-float(place), kind=NORMAL) for place, text in enumerate((*merged, "▁", *LETTERS.replace(" ", "")))]
    return (*special, *own, *raw, *words)


def texts() -> list[str]:
    random = np.random.default_rng(4)
    return ["".join(random.choice(list(LETTERS), 50)).lstrip() for _ in range(200)] + ["é", "", "a  b", "Which digit?\n"]


def test_ids_equal_those_of_transformers_conversion(tmp_path: Path) -> None:
    """For texts that do not start with a space (transformers then adds none) and contain no user-defined piece."""
    pieces = make_pieces(2000)
    write(tmp_path, pieces)
    vocabulary = {piece.text: place for place, piece in enumerate(pieces)}
    theirs = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary))
    ours = open_pieces(tmp_path)
    assert find_merges(pieces) == [pair for pair in generate_merges(vocabulary) if not pair[0].startswith("<")]
    for text in texts():
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == text
    assert ours("ab")["input_ids"][0] == ours.bos_token_id == 1


def test_user_defined_pieces(tmp_path: Path) -> None:
    """As sentencepiece 0.2.3 encodes them: a space is added before the text, but not after each piece."""
    write(tmp_path, make_pieces(50, "<AI>", "<AI>x"))
    ours = open_pieces(tmp_path)
    assert ours.convert_ids_to_tokens(ours("é<AI>a<AI>x b", add_special_tokens=False)["input_ids"])[:5] == [
        "▁",
        "<0xC3>",
        "<0xA9>",
        "<AI>",
        "a",
    ]
    assert ours.convert_ids_to_tokens(ours("<AI>x<AI>", add_special_tokens=False)["input_ids"]) == ["▁", "<AI>x", "<AI>"]


@pytest.mark.parametrize(
    ("prefix", "squeeze", "text", "read"), [(1, 0, " a  b", "▁▁a▁▁b"), (0, 0, " a", "▁a"), (1, 1, "  a   b ", "▁a▁b"), (0, 1, " a", "a")]
)
def test_spaces(prefix: int, squeeze: int, text: str, read: str, tmp_path: Path) -> None:
    write(tmp_path, make_pieces(50), prefix=prefix, squeeze=squeeze)
    ours = open_pieces(tmp_path)
    assert "".join(ours.convert_ids_to_tokens(ours(text, add_special_tokens=False)["input_ids"])) == read


def test_special_tokens_are_those_of_the_config_and_are_saved(tmp_path: Path) -> None:
    write(tmp_path, make_pieces(50, "<image>"))
    known = {"259": {"content": "<new>", "special": True}, "3": {"content": "<image>", "special": True, "lstrip": False}}
    config = {"add_bos_token": False, "eos_token": {"content": "</s>", "__type": "AddedToken"}, "added_tokens_decoder": known}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = open_pieces(tmp_path)
    ids = ours("<image>a<new></s>")["input_ids"]
    assert (ids[0], ids[-1], ours.convert_tokens_to_ids("<image>")) == (3, 2, 3) and 1 not in ids
    ours.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert all(again(text)["input_ids"] == ours(text)["input_ids"] for text in (*texts(), "<image>a<new></s>"))


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_pieces(50), kind=1)
    with pytest.raises(InputRefused, match=r"tokenizer\.model: not a sentencepiece model of type BPE\n    use the published file"):
        open_pieces(tmp_path)
    write(tmp_path, make_pieces(50))
    file = tmp_path / "tokenizer.model"
    for content in (file.read_bytes()[:-3], b"version https://git-lfs.github.com/spec/v1", b"\x0a\x03\x10"):
        file.write_bytes(content)
        with pytest.raises(InputRefused, match=r"tokenizer\.model: not a sentencepiece model"):
            read_pieces(file)
