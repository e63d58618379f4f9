"""How an override is written: Hydra's syntax for its text, and the forms and numbers of people that are offered in another form.

`stage ＝ lora`, `HARDWARE=H200` and `run.steps=1k` are refused with the form that is taken. Nothing is rewritten silently: the value of a key
that is text may hold any of these characters.
"""

import re
import shlex
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from launcher.errors import ConfigRefused

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

UNREADABLE = "cannot be parsed; write KEY=VALUE, and quote a value with commas, brackets or quotes: \"KEY='a, b'\""
# Punctuation of East Asian and of word processors that NFKC leaves as it is.
PUNCTUATION = str.maketrans("“”„‘’【】〔〕「」、。—–−‐‑", '"""\'\'[][][],.-----')
HARMLESS = re.compile(r"[\w.,:=/@+-]*")  # no shell changes a word of these
CURLY = ("“", "”", "‘", "’", "「", "」")
SEPARATED = re.compile(r"\s*[,，;；、]\s*(?=[A-Za-z_][\w.]*\s*[=＝])")  # between two overrides
SPACED = re.compile(r"\s*([^\s=]+)\s*=\s*(.*?)\s*", re.DOTALL)
MAKE = {"hw": "hardware", "exp": "experiment"}  # variables of the Makefile that are shorter than the axis

NUMBER = re.compile(
    r"(\d{1,3}(?:[,，]\d{3})+|\d[\d_]*(?:\.\d+)?)(?:e\+?(\d{1,2}))?\s*(k|m|g|b|w|千|万|亿)?i?\s*(?:b|tokens?|steps?|epochs?|px|pixels?|gpus?|npus?|cards?|[卡张块个步轮条])?",
    re.IGNORECASE,
)
PRODUCT = re.compile(r"\d+(\s*([x*×])\s*\d+)+", re.IGNORECASE)
TIMES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "w": 10**4, "千": 10**3, "万": 10**4, "亿": 10**8}
BINARY = {"k": 2**10, "m": 2**20, "g": 2**30}
# Keys whose k is 1,024: lengths in tokens, as people name those of models, and sizes in bytes.
POWERS_OF_TWO = re.compile(r"(max_length|max_new_tokens|\.context|_bytes)$")
OUTSIDE_BRACES = re.compile(r",(?![^{]*\})")  # commas between the items of a list of sections


# ------------------------------------------------------------------------------------------------------------ syntax


def read_text(text: str, *, listed: bool = False) -> str:
    """A text in Hydra's syntax, quoted where the user did not quote it: it may contain what is syntax for Hydra, or look like a number, as
    the revision 12345e6 does. Null, lists and sections stay what they are, and are refused by their type, unless the key takes one (`listed`).
    Raises ConfigRefused for quotes that are none for a shell."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = text.strip()
    if text[:1] in CURLY and text[-1:] in CURLY and len(text) > 1:
        raise ConfigRefused(f"has the quotes of a word processor; write it as {shlex.quote(text.strip(''.join(CURLY)))}")
    text = quote_items(text) if listed else text
    parsed = parse(f"text={text}") if text[:1] in tuple("'\"[{") or text == "null" else None
    return text if parsed and not parsed.is_sweep_override() else QuotedString(text=text, quote=Quote.single).with_quotes()


def quote_items(text: str) -> str:
    """A list with its plain texts in quotes: `[a.json#500,{file: b.json}]`, where # begins a comment for Hydra. Any other text as it is. Raises
    ConfigRefused for a list that is none for Hydra."""
    if text[:1] != "[" or text[-1:] != "]":
        return text
    if not set(text) & set("'\"\\"):
        items = [item.strip() for item in OUTSIDE_BRACES.split(text[1:-1]) if item.strip()]
        text = "[" + ",".join(item if item[:1] == "{" else f"'{item}'" for item in items) + "]"
    if parse(f"text={text}") is None:
        raise ConfigRefused("a list that cannot be parsed; write \"['a.json#500', {file: 'b.json', repeat: 2}]\", with quotes around texts")
    return text


def read_value(key: str, text: str) -> str:
    """Raises ConfigRefused for text that is not one value of Hydra's grammar."""
    parsed = parse(f"{key}={text}")
    if parsed is None:
        raise ConfigRefused(UNREADABLE)
    if parsed.is_sweep_override():
        raise ConfigRefused(f"give one value; a list is written {key}=[{text}]")
    return text


def parse(override: str) -> "Override | None":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([override])[0]
    except (HydraException, ValueError, RecursionError):  # ValueError: a number of more than 4,300 digits
        return None


# ------------------------------------------------------------------------------------------------------------- forms


def restate(override: str, refuse: Callable[[str], str], groups: Mapping[str, Sequence[str]]) -> str:
    """What to write in place of an override of which only the form is wrong, or why what it means is refused; '' where its form is right.
    `refuse`: why an override is refused, '' = it is not."""
    written, forms = override, list[str]()
    for form, change in (("in half-width characters", to_ascii), ("without spaces", close_up), ("in lower case", partial(lower, groups))):
        if (changed := change(written)) != written:
            written, forms = changed, [*forms, form]
    if not forms:
        key, _, text = override.partition("=")
        whole, number = drop_commas(override), read_number(key, text)
        if whole and not refuse(whole):
            return f"write {whole}, without commas"
        return offer_number(key, text) if number and not refuse(f"{key}={number[0]}") else ""
    return refuse(written) or f"write {quote(written)}, {' and '.join(forms)}"


def separate(override: str) -> str:
    """`data=digits model=tiny_llava` for overrides that a comma separates, ASCII or full-width; '' for anything else."""
    parts = SEPARATED.split(override.strip().rstrip(",，;；、"))
    whole = len(parts) > 1 and all(re.fullmatch(r"[A-Za-z_][\w.]*\s*[=＝]\s*[^\[\]{}'\"\s=]+", part) for part in parts)
    return " ".join(close_up(to_ascii(part)) for part in parts) if whole else ""


def to_ascii(override: str) -> str:
    """In half-width characters. A value with words of another script stays what it is: it may be the name of a file."""
    if override.isascii():
        return override
    key, equals, value = override.replace("＝", "=", 1).partition("=")
    value = value if any(unicodedata.category(letter) == "Lo" for letter in value) else change_width(value)
    inner = value.strip().strip("'\"" + "".join(CURLY))
    return f"{change_width(key)}{equals}{inner if HARMLESS.fullmatch(inner) else value}"


def change_width(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(PUNCTUATION)


def close_up(override: str) -> str:
    """Without the spaces around `=`."""
    found = SPACED.fullmatch(override)
    return f"{found[1]}={found[2]}" if found else override


def lower(groups: Mapping[str, Sequence[str]], override: str) -> str:
    """The key in lower case where it has capitals, and is an axis or a dotted key; the value too where that is a name of the axis."""
    key, equals, value = override.partition("=")
    name = key.lower().strip()
    name = MAKE.get(name, name)
    if not equals or key == name or not (name in groups or "." in name):
        return override
    return f"{name}={value.lower() if value.lower() in groups.get(name, ()) else value}"


# ------------------------------------------------------------------------------------------- the forms of other tools


EQUALS = ("=", "＝")
OPTION = re.compile(r"--?([^\W\d_][\w.-]*)(?:[=\s]\s*(.*))?", re.DOTALL)
YAML_LINE = re.compile(r"([A-Za-z][\w.-]*):(?:\s*([^\s/\\=][^=]*|\s.*))?", re.DOTALL)
BARE = re.compile(r"([A-Za-z][\w.-]*)(?:\s+(.*))?", re.DOTALL)


def read_foreign(override: str) -> tuple[str, str] | None:
    """(word, value) of an override that is written as an option, as a line of YAML, or without `=`; None where it is KEY=VALUE."""
    if found := OPTION.fullmatch(override) or YAML_LINE.fullmatch(override):
        return found[1], (found[2] or "").strip()
    found = BARE.fullmatch(override) if "=" not in override else None
    return (found[1], (found[2] or "").strip()) if found else None


def join_words(overrides: Sequence[str]) -> list[str]:
    """`--lr 1e-4` and `lr: 1e-4` arrive as two words: joined, so that the value is in the answer."""
    joined: list[str] = []
    for word in overrides:
        before = joined[-1] if joined else ""
        is_value = "=" not in word and not word.startswith("-") and not word.endswith(":")
        opens = (before.startswith("--") and "=" not in before) or before.endswith(":") or bool(BARE.fullmatch(before) and before)
        if is_value and opens and (" " not in before or before.startswith("--")):
            joined[-1] = f"{before} {word}"
        elif (word[:1] in EQUALS and BARE.fullmatch(before)) or (is_value and before[-1:] in EQUALS and before):  # stage = lora
            joined[-1] = f"{before} {word}" if before.endswith(" =") or word[:1] in EQUALS else f"{before[:-1]} = {word}"
        else:
            joined.append(word)
    return joined


# ----------------------------------------------------------------------------------------------------------- numbers


def read_number(key: str, text: str) -> tuple[int, str] | None:
    """A whole number as people write it, and how it was read: 32k, 1e3, 1,000, 1280*28*28. None where it is none, or already is written so.
    The k of a length in tokens or of a size in bytes is 1,024, any other 1,000."""
    text = text.strip().strip("'\"")
    if PRODUCT.fullmatch(text):
        factors = [int(part) for part in re.findall(r"\d+", text)]
        return (prod(factors), " x ".join(map(str, factors))) if len(text) < 40 else None
    found = NUMBER.fullmatch(text)
    if found is None or text.isdigit():
        return None
    digits, power, unit = re.sub(r"[_,，]", "", found[1]), int(found[2] or 0), (found[3] or "").lower()
    binary = bool(POWERS_OF_TWO.search(key)) and unit in BINARY
    times = BINARY[unit] if binary else TIMES[unit]
    value = float(digits) * 10**power * times
    if value != int(value) or value > 2**53:
        return None
    return int(value), f"{digits} x {times:,}" if unit and not power else ""


def offer_number(key: str, data: object) -> str:
    """`write KEY=32768, which is 32 x 1,024`, for a value that is no whole number as it is written; '' where it is none at all."""
    read = read_number(key, str(int(data)) + "e0" if isinstance(data, float) and data.is_integer() and abs(data) < 2**53 else str(data))
    if read is None:
        return ""
    return f"write {key}={read[0]}{f', which is {read[1]}' if read[1] else ''}"


def drop_commas(override: str) -> str:
    """`run.steps=1000` for `run.steps=1,000`, which reads as a list; '' for anything else."""
    key, _, text = override.partition("=")
    return f"{key}={text.replace(',', '').strip()}" if re.fullmatch(r"\d{1,3}(,\d{3})+", text.strip()) else ""


def quote(part: str) -> str:
    """For a shell. A NUL stands for a blank of the value."""
    part = part.replace("\0", " ")
    return part if HARMLESS.fullmatch(part) else shlex.quote(part)
