"""Read a tokenizer.model of sentencepiece as a tokenizer of the `tokenizers` library, without the package sentencepiece.

Byte-pair encoding by the scores of the pieces (Kudo and Richardson, arXiv 1808.06226; fields as in sentencepiece_model.proto). transformers uses
the index of a piece instead of its score, and treats text after a user-defined piece as the start of a text; here both follow sentencepiece.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.contract import InputRefused

TOKENIZER_FILE = "tokenizer.model"
SPACE = "▁"
NORMAL, UNKNOWN, USER, BYTE = 1, 2, 4, 6  # types of a piece
BPE_MODEL = 2  # model type
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # defaults, if tokenizer_config.json does not have them
Field = int | bytes


@dataclass(frozen=True, kw_only=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """`prefix`: a space is added before every text; `squeeze`: leading, trailing and repeated spaces are removed; `characters`: the table of
    character replacements, empty for none."""

    pieces: tuple[Piece, ...]
    prefix: bool
    squeeze: bool
    characters: bytes


def open_pieces(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`; tokenizer_config.json has its special tokens. Raises InputRefused for an invalid file."""
    found = read_pieces(folder / TOKENIZER_FILE)
    file = folder / "tokenizer_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=build(found),
        add_bos_token=given.get("add_bos_token", True),
        add_eos_token=given.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        **{name: read_token(given.get(name) or token) for name, token in TOKENS.items()},
    )
    known = given.get("added_tokens_decoder", {})
    made.add_tokens([read_token(known[place]) for place in sorted(known, key=int)])
    return made


def read_token(given: str | dict[str, object]) -> AddedToken:
    if isinstance(given, str):
        return AddedToken(given, normalized=False, special=True)
    settings = {key: value for key, value in given.items() if key not in ("__type", "content", "special")}
    return AddedToken(str(given["content"]), special=bool(given.get("special", True)), **settings)  # type: ignore[arg-type]


def build(found: Pieces) -> Tokenizer:
    """Encodes as sentencepiece: replace characters and spaces, split off user-defined pieces, merge the rest."""
    pieces = found.pieces
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    vocabulary = {piece.text: place for place, piece in enumerate(pieces)}
    in_bytes = any(piece.kind == BYTE for piece in pieces)
    # ignore_merges: a word that is itself a piece becomes that piece. User-defined pieces have no merges; others give the same with them.
    model = BPE(vocabulary, find_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=in_bytes, ignore_merges=True)
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(found.characters)] if found.characters else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if found.squeeze else []
    steps += [normalizers.Prepend(SPACE)] if found.prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    own = sorted((piece.text for piece in pieces if piece.kind == USER), key=len, reverse=True)
    if own:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(re.escape(text) for text in own)), "isolated")
    strip = [decoders.Strip(content=" ", left=1)] if found.prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def find_merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a third, ordered by its score, the highest first: O(n log n) for n pieces of bounded length."""
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    found = [
        (-piece.score, place, cut, piece.text)
        for place, piece in enumerate(pieces)
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in normal and piece.text[cut:] in normal
    ]
    return [(text[:cut], text[cut:]) for _, _, cut, text in sorted(found)]


# ------------------------------------------------------------------------------------------------------------- the file


def read_pieces(file: Path) -> Pieces:
    """Raises InputRefused if `file` is not a sentencepiece model of type BPE."""
    try:
        fields = list(read_fields(file.read_bytes()))
        pieces = tuple(read_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
        trainer, normalizer = (dict(read_fields(b"".join(v for n, v in fields if n == place and isinstance(v, bytes)))) for place in (2, 3))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise InputRefused(f"{file}: not a sentencepiece model ({error})\n    use the published file") from error
    if not pieces or trainer.get(3, 1) != BPE_MODEL:
        raise InputRefused(f"{file}: not a sentencepiece model of type BPE\n    use the published file")
    characters = normalizer.get(2, b"")
    assert isinstance(characters, bytes)
    return Pieces(pieces=pieces, prefix=bool(normalizer.get(3, 1)), squeeze=bool(normalizer.get(4, 1)), characters=characters)


def read_piece(content: bytes) -> Piece:
    fields = dict(read_fields(content))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of the wrong type")
    return Piece(text=text.decode("utf-8"), score=struct.unpack("<f", score)[0], kind=kind)


def read_fields(content: bytes) -> Iterator[tuple[int, Field]]:
    """(number, value) of the fields of a protocol buffer (protobuf.dev/programming-guides/encoding): a varint as int, others as bytes."""
    place = 0
    while place < len(content):
        key, place = read_varint(content, place)
        if key & 7 == 0:
            value, place = read_varint(content, place)
            yield key >> 3, value
            continue
        size, place = read_varint(content, place) if key & 7 == 2 else ({1: 8, 5: 4}.get(key & 7, -1), place)
        if size < 0 or place + size > len(content):
            raise ValueError(f"byte {place} does not start a field, or the file is truncated")
        yield key >> 3, content[place : place + size]
        place += size


def read_varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while content[place] & 128:
        value |= (content[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | content[place] << shift, place + 1
