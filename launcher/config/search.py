"""`omnilaunch options --search WORD`: where a word occurs among keys, values, meanings, and the words of other tools."""

from collections.abc import Mapping
from pathlib import Path

from launcher.config.axis_value import describe_values
from launcher.config.conf_folder import ConfFolder
from launcher.config.key import list_settings
from launcher.config.official_name import find_official
from launcher.config.setting import load_meanings
from launcher.config.synonym import Synonym, Typed, load_synonyms, write_answer
from launcher.config.variable import load_variables
from launcher.errors import join_or, plain


def search(word: str, conf: Path | ConfFolder) -> dict[str, dict[str, str]]:
    """Section -> what was found -> one line. A word that another tool uses is found as it is, before keys that merely contain it."""
    meanings, wanted = load_meanings()["keys"], word.strip().lower()
    table = load_synonyms()
    return {
        "keys": {key: meanings.get(key, "") for key in list_settings() if matches(wanted, f"{key} {meanings.get(key, '')}")},
        "values": find_values(wanted, conf),
        "words": {name: answer(row) for name, row in find_words(table.keys, wanted).items()}
        | {f"{axis}={name}": answer(row) for axis, rows in table.values.items() for name, row in find_words(rows, wanted).items()},
        "variables": {
            name: f"write {row.write}".replace("{name}", name).replace("{}", "VALUE") if row.write else row.says
            for row in load_variables()
            for name in row.names
            if not row.kept and matches(wanted, name)
        },
        "verbs": {
            name: "; ".join(filter(None, (join_or(row.write) if row.write else "", row.says)))
            for name, row in find_words(table.verbs, wanted).items()
        },
    }


def find_values(word: str, conf: Path | ConfFolder) -> dict[str, str]:
    found: dict[str, str] = {}
    for axis, lines in describe_values(conf).items():
        official = find_official(axis, word, conf) if axis in ("model", "hardware") else ()
        found |= {f"{axis}={name}": title for name, title in lines.items() if name in official or matches(word, f"{name} {title}")}
    return found


def find_words(rows: Mapping[str, Synonym], wanted: str) -> dict[str, Synonym]:
    """Word -> row, for the words that contain the one that is wanted."""
    return {word: row for row in dict.fromkeys(rows.values()) for word in row.words if plain(wanted) and plain(wanted) in plain(word)}


def answer(row: Synonym) -> str:
    if row.axis and not row.write:
        return f"write {row.axis}=NAME"
    return write_answer(row.write, row, Typed())


def matches(word: str, text: str) -> bool:
    return word in text.lower() or (len(plain(word)) > 2 and plain(word) in plain(text))
