"""`omnilaunch options --search WORD`: where a word occurs among keys, values, meanings, and the words of other tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.config.axis_value import describe_values
from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.config.key import list_settings
from launcher.config.official_name import find_official
from launcher.config.setting import load_meanings
from launcher.config.synonym import NEAR, Synonym, Typed, find_family, find_topic, load_synonyms, write_answer
from launcher.config.variable import load_variables
from launcher.errors import find_near, join_or, plain

NEAR_WORD = 0.8


def search(word: str, conf: Path | ConfFolder) -> dict[str, dict[str, str]]:
    """Section -> what was found -> one line. A word that another tool uses is found as it is, before keys that merely contain it."""
    meanings, wanted = load_meanings()["keys"], word.strip().lower()
    table, groups = load_synonyms(), as_conf_folder(conf).list_groups()
    return {
        "keys": {key: meanings.get(key, "") for key in list_settings() if matches(wanted, f"{key} {meanings.get(key, '')}")},
        "values": find_values(wanted, conf),
        "words": {name: answer(row, groups) for name, row in (find_words(table.keys, wanted) or find_rule(word)).items()}
        | {f"{axis}={name}": answer(row, groups) for axis, rows in table.values.items() for name, row in find_words(rows, wanted).items()},
        "variables": find_variables(wanted),
        "verbs": {
            name: "; ".join(filter(None, (join_or(row.write) if row.write else "", row.says)))
            for name, row in find_words(table.verbs, wanted).items()
        },
    }


def find_variables(wanted: str) -> dict[str, str]:
    """A variable may be in several rows, which hold under different conditions."""
    found: dict[str, list[str]] = {}
    for row in load_variables():
        for name in row.names if not row.kept else ():
            if matches(wanted, name):
                write = f"write {row.write}".replace("{name}", name).replace("{}", "VALUE") if row.write else ""
                says = f"elsewhere {row.says}" if "elsewhere" in row.only else row.says
                found.setdefault(name, []).extend(filter(None, (says, write)))
    return {name: "; ".join(dict.fromkeys(says)) for name, says in found.items()}


def find_meant(word: str, *, least: float = NEAR_WORD) -> tuple[str, ...]:
    """The words that one which is found nowhere may be a typing error of, as in a plan."""
    table = load_synonyms()
    keys = (part for key in list_settings() for part in (key, key.rpartition(".")[2]))
    words = (word for rows in (table.keys, *table.values.values(), table.verbs) for row in rows.values() for word in row.words)
    near = find_near(word.strip(), dict.fromkeys((*keys, *words)), least=least)
    return tuple({plain(each): each for each in near}.values())


def find_values(word: str, conf: Path | ConfFolder) -> dict[str, str]:
    found: dict[str, str] = {}
    for axis, lines in describe_values(conf).items():
        official = find_official(axis, word, conf) if axis in ("model", "hardware") else ()
        found |= {f"{axis}={name}": title for name, title in lines.items() if name in official or matches(word, f"{name} {title}")}
    return found


def find_words(rows: Mapping[str, Synonym], wanted: str) -> dict[str, Synonym]:
    """Word -> row, for the words that contain the one that is wanted, that one first."""
    found = {word: row for row in dict.fromkeys(rows.values()) for word in row.words if plain(wanted) and plain(wanted) in plain(word)}
    return dict(sorted(found.items(), key=lambda item: plain(item[0]) != plain(wanted)))


def find_rule(word: str) -> dict[str, Synonym]:
    """Of a word that no row has, and that is no typing error of one: what its beginning or a part of it says."""
    row = find_family(word) or (find_topic(word) if "_" in word and not find_meant(word, least=NEAR) else None)
    return {word: row} if row else {}


def answer(row: Synonym, groups: Mapping[str, Sequence[str]]) -> str:
    if row.axis and not row.write:
        return "; ".join(filter(None, (f"write {row.axis}=NAME, one of {', '.join(groups[row.axis])}", row.says)))
    if row.group:
        return "; ".join(filter(None, (f"stage.trainable with{'out' if row.frozen else ''} {row.group}", row.says)))
    return write_answer(row.write, row, Typed())


def matches(word: str, text: str) -> bool:
    return word in text.lower() or (len(plain(word)) > 2 and plain(word) in plain(text))
