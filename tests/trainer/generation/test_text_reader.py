import random

import pytest

from trainer.contract import Template
from trainer.generation.text_reader import TextReader
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer("<image>", Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>"))
TEXTS = (
    "It is 7.",
    " 7 ",
    "größer als 数字 七 です",
    "🙂🙃 two faces 👩‍👩‍👧 and a family",
    "a\n\n b\tc  d",
    "",
    "   ",
    "x�y",
)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_are_whole_characters_and_join_to_the_text(text: str) -> None:
    """The tokenizer works on bytes: each non-ASCII character here is several tokens."""
    reader = TextReader(TOKENIZER, ("</s>",))
    parts = [reader.take(token) for token in ids_of(text)]
    whole, rest = reader.finish()
    assert whole == text.strip() == "".join(parts) + rest
    if "�" not in text:
        assert not any("�" in part for part in parts)
    if text.strip():
        assert any(parts), "text is returned as it is generated, not only at the end"


def test_incomplete_characters_are_returned_only_at_the_end() -> None:
    half = ids_of("🙂")[:2]
    reader = TextReader(TOKENIZER, ())
    assert [reader.take(token) for token in (*ids_of("ab"), *half)][-2:] == ["", ""]
    assert reader.finish() == ("ab�", "�")


def test_a_possible_stop_text_is_held_back() -> None:
    reader = TextReader(TOKENIZER, ("STOP", "###"))
    said = ""
    for token in ids_of("one ST two ## three ###four"):
        said += reader.take(token)
        assert not said.endswith(("ST", "S", "#"))
        if reader.ended:
            break
    assert said == "one ST two ## three"
    assert reader.finish() == ("one ST two ## three", "")


def test_random_texts() -> None:
    letters, numbers = "ab 的🙂\n#S", random.Random(4)
    for _ in range(200):
        text = "".join(numbers.choice(letters) for _ in range(numbers.randrange(20)))
        reader = TextReader(TOKENIZER, ("##", "SS"))
        said = "".join(reader.take(token) for token in ids_of(text))
        whole, rest = reader.finish()
        first = min((place for place in (text.find("##"), text.find("SS")) if place >= 0), default=len(text))
        assert said + rest == whole == text[:first].strip()
