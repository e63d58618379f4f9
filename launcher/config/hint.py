"""What is said about a key or a value that the config does not have: the words of other tools, official names, then typing errors.

Nothing is offered that may do something else than what was asked: where it is not clear, the valid names are listed.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from launcher.config.conf_folder import OPTIONAL_GROUPS, ConfFolder
from launcher.config.official_name import find_official
from launcher.config.synonym import Judge, Typed, answer_key, answer_value
from launcher.config.variable import answer_variable
from launcher.errors import find_near, join_or, suggest

MOST_KEYS = 4  # of one last part, such as the four keys that end in .batch
NEAR_LEAF = 0.8
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a hint may offer. `list_keys`: dotted keys that can be set. `groups`: axis -> its names. `judge`: why an override is wrong."""

    list_keys: Callable[[], Sequence[str]]
    groups: Mapping[str, Sequence[str]]
    conf: ConfFolder
    judge: Judge


def explain_key(key: str, section: str, names: Collection[str], typed: Typed, known: Known) -> str:
    """`section`: the part of the key that exists, '' = none; `names`: what it has."""
    leaf, explain = key.rpartition(".")[2], explain_axis(typed, known)
    if answer := answer_variable(key, typed.value) or answer_key(leaf, typed, explain) or name_model(leaf, typed, known):
        return answer
    rest = key.removeprefix(f"{section}.") if section else key
    if ending := [dotted for dotted in known.list_keys() if dotted.endswith(f".{rest}")]:
        return offer_keys(ending)
    part = rest.partition(".")[0]
    if not find_near(part, names) and (answer := answer_key(leaf, typed, explain, near=True)):
        return answer
    if section or find_near(part, names):
        return suggest(part, names)
    leaves: dict[str, list[str]] = {}
    for dotted in known.list_keys():
        leaves.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    near = [dotted for name in find_near(leaf, leaves, least=NEAR_LEAF) for dotted in leaves[name]]
    return offer_keys(near) if near else suggest(part, names)


def offer_keys(keys: Sequence[str]) -> str:
    if len(keys) > MOST_KEYS:
        return f"{len(keys)} keys end so; omnilaunch options --search {keys[0].rpartition('.')[2]} lists them"
    return f"did you mean {join_or(map(repr, keys))}?"


def name_model(word: str, typed: Typed, known: Known) -> str:
    """`qwen2_5_vl_7b=...` or a bare `lora`: the name of a value in place of a key."""
    axes = [axis for axis, names in known.groups.items() if word in names and axis not in OPTIONAL_GROUPS]
    return f"write {join_or(f'{axis}={word}' for axis in axes)}" if axes and typed.value in ("", "true") else ""


def explain_axis(typed: Typed, known: Known) -> Callable[[str, str], str]:
    """(axis, value) -> what to write, for a key of another tool that names a value of an axis here."""

    def explain(axis: str, value: str) -> str:
        names = known.groups.get(axis, ())
        if value in names:
            return f"write {axis}={value}"
        return explain_value(axis, value, names, typed, known) if value else f"write {axis}=NAME; {suggest('', names)}"

    return explain


def explain_value(axis: str, name: str, names: Sequence[str], typed: Typed, known: Known) -> str:
    """What to write in place of an unknown value of an axis."""
    if axis == MODEL and is_path(name):
        return f"that is a folder: write model=NAME model.source.kind=path model.source.path={name}, with one of: {', '.join(published(names))}"
    if axis == "data" and is_path(name):
        return f"that is a file: write data=files data.train={name} data.images=FOLDER"
    if elsewhere := [other for other, others in known.groups.items() if name in others and other not in OPTIONAL_GROUPS]:
        return f"write {join_or(f'{other}={name}' for other in elsewhere)}"
    official = find_official(axis, name, known.conf)
    if len(official) == 1 and "/" in name:
        return f"write {axis}={official[0]}"
    if answer := answer_value(axis, name, names, typed):
        return answer if answer.startswith("write ") else f"{answer}; valid are: {', '.join(names)}"
    if len(official) == 1:
        return f"write {axis}={official[0]}"
    if official:
        return f"which one: {join_or(f'{axis}={each}' for each in official)}?"
    if axis == MODEL and not find_near(name, names) and any(letter.isdigit() for letter in name):
        return f"no file of conf/model describes it; valid are: {', '.join(published(names))}"
    return suggest(name, names)


def is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith((".json", ".jsonl", ".csv", ".parquet", ".tsv"))


def published(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("tiny_")]


# ------------------------------------------------------------------------------------------- the forms of other tools


OPTION = re.compile(r"--?([A-Za-z][\w.-]*)(?:[=\s]\s*(.*))?", re.DOTALL)
YAML_LINE = re.compile(r"([A-Za-z][\w.-]*):(?:\s+(.*))?", re.DOTALL)
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
        else:
            joined.append(word)
    return joined
