"""The words of other tools and of daily speech, and what they are called here: `synonyms.yaml` is the table, this module answers from it.

An answer is a part of an error's text: `write stage.optimizer.lr=1e-4`, with a formula where the value has to be converted; or why there is
no such thing, and what is nearest. Nothing is ever applied by itself.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from launcher.errors import find_near, join_or, plain

FILE = Path(__file__).with_name("synonyms.yaml")
HOLE = "{}"
UNFILLED = "VALUE"
OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)*=\S*")
HARMLESS = re.compile(r"[\w.,:=/@+-]*")  # no shell changes a word of these
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "null")
NEAR = 0.91  # of a typing error in a word of another tool: these are many, and some differ in two letters

# (override) -> why it would be refused, '' = it would not.
Judge = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, eq=False)  # a row is itself alone, and can be counted once
class Synonym:
    """A row of the table, whose head explains the fields. `values`: value in lower case -> alternatives or a sentence."""

    words: tuple[str, ...]
    tools: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    axis: str = ""
    is_list: bool = False
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class Synonyms:
    """Rows by their words as `plain` makes them. `values`: axis -> rows. `tools`: code -> name. `families`: the beginning of words -> row."""

    tools: Mapping[str, str]
    families: Mapping[str, Synonym]
    keys: Mapping[str, Synonym]
    values: Mapping[str, Mapping[str, Synonym]]
    verbs: Mapping[str, Synonym]


@dataclass(frozen=True, kw_only=True)
class Typed:
    """What the user typed: the `value` of the word in question, '' = none, and all `overrides`. `judge`: of one override."""

    value: str = ""
    overrides: Sequence[str] = ()
    judge: Judge = lambda _: ""


@cache
def load_synonyms() -> Synonyms:
    """The table. It is read only where an error or the options are printed."""
    import yaml

    given = yaml.load(FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return Synonyms(
        tools=given["tools"],
        families={prefix: read_row({**row, "words": row["prefixes"]}) for row in given["families"] for prefix in row["prefixes"]},
        keys=by_word(given["keys"]),
        values={axis: by_word(rows) for axis, rows in given["values"].items()},
        verbs=by_word(given["verbs"]),
    )


def by_word(rows: Sequence[Mapping[str, Any]]) -> dict[str, Synonym]:
    """Raises ValueError for a word that two rows have."""
    found: dict[str, Synonym] = {}
    for row in map(read_row, rows):
        for word in dict.fromkeys(map(plain, row.words)):
            if word in found:
                raise ValueError(f"{FILE.name}: {word} is in two rows: {found[word].words} and {row.words}")
            found[word] = row
    return found


def read_row(row: Mapping[str, Any]) -> Synonym:
    return Synonym(
        words=tuple(map(str, row["words"])),
        tools=tuple(row.get("tools", ())),
        write=texts(row.get("write", ())),
        values={str(value).lower(): texts(text) for value, text in row.get("values", {}).items()},
        axis=row.get("axis", ""),
        is_list=row.get("list", False),
        says=row.get("says", ""),
    )


def texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


# ------------------------------------------------------------------------------------------------------------- answers


def answer_key(word: str, typed: Typed, explain: Callable[[str, str], str], *, near: bool = False) -> str:
    """The answer to a key of another tool; '' where the table has none. `explain`: (axis, value) -> what to write for it. `near`: also for a
    typing error in such a key."""
    row = find_row(load_synonyms().keys, word) if near else load_synonyms().keys.get(plain(word))
    if row is None:
        return ""
    if chosen := translate(row, typed.value):
        return write_answer(chosen, row, typed)
    if row.axis:
        return "; ".join(part for part in (explain(row.axis, typed.value.strip().strip("'\"")), row.says) if part)
    return write_answer(row.write, row, typed)


def answer_value(axis: str, text: str, names: Sequence[str], typed: Typed) -> str:
    """The answer to a value of an axis as people say it; '' where the table has none."""
    table = load_synonyms().values.get(axis, {})
    row = table.get(plain(text)) or table.get(plain(last_part(text)))
    if row is not None:
        return write_answer(row.write, row, typed)
    same = [name for name in names if plain(name) == plain(last_part(text))]
    return write_answer(tuple(f"{axis}={name}" for name in same), Synonym(words=()), typed) if same else ""


def answer_verb(word: str) -> str:
    """The command that does what a verb of another tool does; '' where the table has none."""
    row = load_synonyms().verbs.get(plain(word))
    if row is None:
        return ""
    return "; ".join(part for part in (f"write {join_or(row.write)}" if row.write else "", row.says) if part)


def find_row(table: Mapping[str, Synonym], word: str) -> Synonym | None:
    """The row of a word, of the only word that it may be a typing error of, or of its family."""
    if row := table.get(plain(word)):
        return row
    near = {id(table[name]): table[name] for name in find_near(plain(word), table, least=NEAR)}
    if len(near) == 1 and len(plain(word)) > 4:
        return next(iter(near.values()))
    name = word.lower().replace("-", "_")
    return next(
        (row for prefix, row in load_synonyms().families.items() if table is load_synonyms().keys and name.startswith(prefix)), None
    )


def last_part(path: str) -> str:
    return path.strip().strip("'\"").rstrip("/").rpartition("/")[2]


def translate(row: Synonym, value: str) -> tuple[str, ...]:
    """What the row has for this value in particular."""
    value = value.strip().strip("'\"").lower()
    if value in row.values:
        return row.values[value]
    same = {plain(key): text for key, text in row.values.items()}
    if plain(value) in same and plain(value):
        return same[plain(value)]
    switch = "true" if value in TRUE else "false" if value in FALSE else value
    return row.values.get(switch, ())


def write_answer(alternatives: Sequence[str], row: Synonym, typed: Typed) -> str:
    """`write A or B; says`. What is typed already is left out, and so are alternatives that contradict it."""
    if len(alternatives) == 1 and not is_override(alternatives[0]):
        return alternatives[0]
    chosen = fitting(alternatives, typed.overrides)
    filled = [fill(text, row, typed.value) for text in chosen]
    holes = any(HOLE in text for text in chosen)
    if refused := next((why for text in filled if holes and (why := judge_parts(text, typed.judge))), ""):  # it is wrong here too
        filled = [text.replace(HOLE, UNFILLED) for text in chosen]
    written = [" ".join(map(quote, left)) for text in filled if (left := [part for part in text.split(" ") if part not in typed.overrides])]
    parts = (f"write {join_or(dict.fromkeys(written))}" if written else "", refused, row.says)
    return "; ".join(part for part in parts if part)


def is_override(text: str) -> bool:
    return all(OVERRIDE.fullmatch(part) for part in text.split(" "))


def fitting(alternatives: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Without those that choose another value of an axis than the user did, unless all do."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override and "." not in override.partition("=")[0])
    kept = [text for text in alternatives if all(chosen.get(key, value) == value for key, _, value in map(cut, text.split(" ")))]
    return kept or list(alternatives)


def cut(override: str) -> tuple[str, str, str]:
    return override.partition("=")


def fill(text: str, row: Synonym, value: str) -> str:
    """The value in place of {}. A part of an override never holds a blank, so that each can be quoted on its own."""
    value = value.strip()
    if not value:
        return text.replace(HOLE, UNFILLED)
    if row.is_list:
        value = ",".join(re.findall(r"[^\s,\[\]'\"]+", value))
    return text.replace(HOLE, value.strip("'\"").replace(" ", "\0"))


def judge_parts(text: str, judge: Judge) -> str:
    return next((why for part in text.split(" ") if (why := judge(part.replace("\0", " ")))), "")


def quote(part: str) -> str:
    part = part.replace("\0", " ")
    return part if HARMLESS.fullmatch(part) else shlex.quote(part)
