"""The words of other tools and of daily speech, and what they are called here: `synonyms.yaml` is the table, this module answers from it.
`synonyms_absent.yaml` has those that have no counterpart, and what a word is about as its parts tell.

An answer is a part of an error's text: `write stage.optimizer.lr=1e-4`, with a formula where the value has to be converted; or why there is
no such thing, and what is nearest. Nothing is ever applied by itself.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.written import quote, read_number
from launcher.errors import digits, find_near, join_or, plain

FILE = Path(__file__).with_name("synonyms.yaml")
ABSENT_FILE = Path(__file__).with_name("synonyms_absent.yaml")
HOLE = "{}"
UNFILLED = "VALUE"
OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)*=\S*")
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "null")
PART_OF_FILE = re.compile(r"(.+)#(\d+)")  # ms-swift: the first rows of a data set
DATA_FILE = "=files data."
ON_A_HUB = re.compile(r"[\w-]+/[\w-]+")
NUMBER = re.compile(r"[-+.\d]*")
ABSENT = "not available"
ONE_DEVICE = re.compile(r"(\w+):(\d+(?:,\d+)*)")  # cuda:0
FILLERS = ("run", "model", "cmd", "script", "job", "my")  # parts of a verb that do not tell two apart
NEAR_VERB, VERY_NEAR = 0.85, 0.93  # of a verb that ends something
NEAR_PART, NEAR_JOINED, LONG = 0.81, 0.95, 4  # of one part of a word, of a word with another number of parts; letters that it must have
SHORTEST_REST = 3  # letters of a word without its beginning
NEAR = 0.91  # of a typing error in a word of another tool: these are many, and some differ in two letters

# (override) -> why it would be refused, '' = it would not.
Judge = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, eq=False)  # a row is itself alone, and can be counted once
class Synonym:
    """A row of the table, whose head explains the fields. `values`: value in lower case -> alternatives or a sentence. `group`: of weights,
    that the word trains or, with `frozen`, does not."""

    words: tuple[str, ...]
    tools: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    axis: str = ""
    is_list: bool = False
    says: str = ""
    group: str = ""
    frozen: bool = False
    leaves: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)  # a module's name as `plain` makes it -> its group


@dataclass(frozen=True, kw_only=True)
class Synonyms:
    """Rows by their words as `plain` makes them. `values`: axis -> rows. `tools`: code -> name. `families`: the beginning of words -> row.
    `sections`: of the nested config files of other tools. `generic`: last parts of a dotted key that say nothing without the others.
    `topics`: (what a part of a word matches, row), the first one counts. `additions`: beginnings of a word that do not change what it means;
    `negations`: those that turn it round."""

    tools: Mapping[str, str]
    families: Mapping[str, Synonym]
    keys: Mapping[str, Synonym]
    sections: Mapping[str, Synonym]
    generic: frozenset[str]
    values: Mapping[str, Mapping[str, Synonym]]
    verbs: Mapping[str, Synonym]
    topics: Sequence[tuple[re.Pattern[str], Synonym]]
    additions: tuple[str, ...]
    negations: tuple[str, ...]


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

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    given, absent = (yaml.load(file.read_text(encoding="utf-8"), loader) for file in (FILE, ABSENT_FILE))
    families = (*given["families"], *absent["families"])
    return Synonyms(
        tools=given["tools"],
        families={prefix: read_row({**row, "words": row["prefixes"]}) for row in families for prefix in row["prefixes"]},
        keys=by_word((*given["keys"], *absent["keys"])),
        sections=by_word(given["sections"]),
        generic=frozenset(map(plain, given["generic"])),
        values={axis: by_word(rows) for axis, rows in given["values"].items()},
        verbs=by_word(given["verbs"]),
        topics=[(match_parts(row["parts"]), read_row({**row, "words": row["parts"]})) for row in absent["topics"]],
        additions=tuple(absent["additions"]),
        negations=tuple(absent["negations"]),
    )


def match_parts(parts: Sequence[str]) -> re.Pattern[str]:
    """Of a word in lower case with '_' between its parts. `optim*` begins a part, `cuda_graph` is two of them. A
    beginning of three letters or less is followed by a number at most."""
    inner = "|".join(re.escape(part).replace(r"\*", "[a-z0-9]*" if len(part) > LONG else "[0-9]*s?") for part in parts)
    return re.compile(rf"(?:^|[_.])(?:{inner})(?:$|[_.])")


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
        group=row.get("group", ""),
        frozen=row.get("frozen", False),
        leaves=tuple(map(plain, row.get("leaves", ()))),
        modules={plain(name): group for group, names in row.get("modules", {}).items() for name in names},
    )


def texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


# ------------------------------------------------------------------------------------------------------------- answers


def answer_key(row: Synonym, typed: Typed, explain: Callable[[str, str], str]) -> str:
    """What a row says of a key of another tool. `explain`: (axis, value) -> what to write for it."""
    if chosen := translate(row, typed.value):
        return write_answer(chosen, row, typed)
    if row.axis:
        return "; ".join(part for part in (explain(row.axis, typed.value.strip().strip("'\"")), row.says) if part)
    return answer_file(row, typed) if any(DATA_FILE in text for text in row.write) else write_answer(row.write, row, typed)


def answer_file(row: Synonym, typed: Typed) -> str:
    """`data.jsonl#500` is the first 500 rows for ms-swift, and several data sets are mixed there."""
    value = typed.value.strip().strip("[]'\"")
    several, found = re.split(r"[\s,]+", value), PART_OF_FILE.fullmatch(value)
    fewer = (
        "fewer steps with run.steps" if "data.train=" in str(row.write) else f"fewer answers with run.evaluation.limit={found and found[2]}"
    )
    notes = [f"#{found[2]} is not available: give a shorter file, or {fewer}"] if found else []
    value = found[1] if found else value
    if len(several) > 1 and all("." in name for name in several):
        value, notes = "FILE.json", [f"one file: put the rows of these {len(several)} into it"]
    if ON_A_HUB.fullmatch(value) and "images" not in str(row.write):
        value, notes = "FILE.json", [*notes, f"a data set of a hub is not read: download {value}, and write its rows as docs/data.md says"]
    return "; ".join((write_answer(row.write, row, replace(typed, value=value) if notes else typed), *notes))


def find_key(key: str, rest: str) -> Synonym | None:
    """The row of a key of another tool, which may be dotted: `fp16.enabled`. The whole path decides, then the section that it is in, and its
    last part only where that says what is meant. `rest`: the key without a beginning that exists here."""
    table, parts = load_synonyms(), rest.split(".")
    sections = [section for parent in reversed(parts[:-1]) if (section := table.sections.get(plain(parent)) or find_family(parent))]
    if row := find_path(key, whole=any(section.says.startswith(ABSENT) for section in sections)) or find_path(rest, whole=True):
        return row
    leaf = plain(parts[-1])
    if section := next((section for section in sections if leaf not in section.leaves), None):
        return section
    return table.keys.get(leaf) if decides(rest) else None


def find_path(key: str, *, whole: bool) -> Synonym | None:
    """The row of a dotted key, or with `whole` false of an end of at least two parts."""
    table, parts = load_synonyms(), key.split(".")
    for start in range(min(1, len(parts) - 1) if whole else len(parts) - 1):
        row = table.keys.get(plain("".join(parts[start:])))
        if row and (plain(parts[-1]) not in table.generic or is_written(row, parts[start:])):
            return row
    return None


def is_written(row: Synonym, parts: Sequence[str]) -> bool:
    """Whether the row has this dotted word, and not only one with the same letters."""
    return any("." in word and plain(word) == plain("".join(parts)) for word in row.words)


def decides(rest: str) -> bool:
    """Whether the last part of a key says by itself what is meant: `trainer.max_steps` does, `monitor.enabled` does not."""
    return "." not in rest or plain(rest.rpartition(".")[2]) not in load_synonyms().generic


def answer_value(axis: str, text: str, names: Sequence[str], typed: Typed) -> str:
    """The answer to a value of an axis as people say it; '' where the table has none."""
    table = load_synonyms().values.get(axis, {})
    row = table.get(plain(text)) or table.get(plain(last_part(text)))
    if row is not None:
        return write_answer(row.write, row, typed)
    if axis == "hardware" and (found := ONE_DEVICE.fullmatch(text.strip())):
        answer = f"write hardware={found[1].lower()}" if found[1].lower() in names else answer_value(axis, found[1], names, typed)
        return f"{answer}; cluster.nodes.0.devices=[{found[2]}] chooses the device" if answer.startswith("write ") else answer
    same = [name for name in names if plain(name) == plain(last_part(text))]
    return write_answer(tuple(f"{axis}={name}" for name in same), Synonym(words=()), typed) if same else ""


def answer_verb(word: str, verbs: Collection[str] = ()) -> str:
    """The command that does what a verb of another tool does; '' where the table has none. `verbs`: those that exist, of which it may be a
    typing error."""
    table = load_synonyms().verbs
    row = table.get(plain(word)) or find_compound(table, word)
    if row is None and not find_near(word, verbs):
        row = find_close(table, word, NEAR_VERB)
        row = find_close(table, word, VERY_NEAR) if row and ends_something(row) else row
    if row is None:
        return ""
    return "; ".join(part for part in (f"write {join_or(row.write)}" if row.write else "", row.says) if part)


def find_compound(table: Mapping[str, Synonym], word: str) -> Synonym | None:
    """The row of `train_sft` or `run-eval`, of which each part is a verb of another tool; none that ends something."""
    parts = re.split(r"[-_ ]", word)
    rows = dict.fromkeys(table.get(plain(part)) for part in parts if plain(part) not in FILLERS)
    start = table.get("train")
    left = [row for row in rows if row is not start] or list(rows)
    return left[0] if len(parts) > 1 and len(left) == 1 and left[0] and not ends_something(left[0]) else None


def ends_something(row: Synonym) -> bool:
    return not row.write or any(text.startswith("omnilaunch stop") for text in row.write)


def find_row(table: Mapping[str, Synonym], word: str) -> Synonym | None:
    """The row of a word, of the only word that it may be a typing error of, or of its family."""
    row = table.get(plain(word)) or find_close(table, word, NEAR)
    return row or (find_family(word) if table is load_synonyms().keys else None)


def find_close(table: Mapping[str, Synonym], word: str, least: float) -> Synonym | None:
    near = {
        id(table[name]): table[name]
        for name in find_near(plain(word), table, least=least)
        if least < NEAR or is_near_row(word, table[name])
    }
    return next(iter(near.values())) if len(near) == 1 and len(plain(word)) > 4 else None


def is_near_row(word: str, row: Synonym) -> bool:
    """Whether it is a typing error of one of the row's words: `module` and `unfreeze_llm` are none, though others begin or end so."""
    return any(is_typing_error(word, each) for each in row.words)


def is_typing_error(word: str, name: str) -> bool:
    """Whether every part of a word is nearly the same part of the name."""
    if plain(word) == plain(name) or (len(plain(word)) >= LONG and sorted(plain(word)) == sorted(plain(name))):
        return True
    typed, meant = (re.split(r"[-_.]", text.lower()) for text in (word, name))
    if len(typed) != len(meant):
        return len(plain(word)) >= LONG and measure_likeness(plain(word), plain(name)) >= NEAR_JOINED
    alike = (a[:1] == b[:1] and len(a) >= LONG and measure_likeness(a, b) >= NEAR_PART for a, b in zip(typed, meant, strict=True) if a != b)
    return all(alike)


def measure_likeness(word: str, name: str) -> float:
    """0 to 1; 0 where they differ in a number, which is never a typing error, and 1 for swapped letters."""
    from difflib import SequenceMatcher  # only errors need it

    if digits(word) != digits(name):
        return 0.0
    return 1.0 if sorted(word) == sorted(name) else SequenceMatcher(None, word, name).ratio()


def find_family(word: str) -> Synonym | None:
    name = word.lower().replace("-", "_")
    return next((row for prefix, row in load_synonyms().families.items() if name.startswith(prefix)), None)


def find_topic(word: str) -> Synonym | None:
    """What a word is about, as its parts tell: `moe_router_topk` has to do with experts."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower().replace("-", "_")
    return next((row for pattern, row in load_synonyms().topics if pattern.search(name)), None)


def list_variants(word: str) -> Iterator[tuple[str, bool]]:
    """(the word without a beginning that adds nothing, whether it is turned round): `peft_use_dora` is use_dora, `no_shuffle` is shuffle."""
    table, left = load_synonyms(), [(word.lower().replace("-", "_"), False)]
    while left:
        name, negated = left.pop(0)
        for beginnings, turns in ((table.additions, False), (table.negations, True)):
            rests = ((name.removeprefix(each), negated != turns) for each in beginnings if name.startswith(each))
            for rest, turned in rests:
                if len(rest) >= SHORTEST_REST and plain(rest) not in table.generic:
                    yield rest, turned
                    left.append((rest, turned))


def turn_round(value: str) -> str:
    return "true" if value.strip().lower() in FALSE else "false" if value.strip().lower() in ("", *TRUE) else ""


def last_part(path: str) -> str:
    return path.strip().strip("'\"").rstrip("/").rpartition("/")[2]


def translate(row: Synonym, value: str) -> tuple[str, ...]:
    """What the row has for this value in particular."""
    value = value.strip().strip("'\"").lower()
    if value in row.values:
        return row.values[value]
    same = {plain(key): text for key, text in row.values.items() if not NUMBER.fullmatch(key)}
    if plain(value) in same:  # `-1` is another number than 1
        return same[plain(value)]
    switch = "true" if value in TRUE else "false" if value in FALSE else value
    return row.values.get(switch, ())


def write_answer(alternatives: Sequence[str], row: Synonym, typed: Typed) -> str:
    """`write A or B; says`. What is typed already is left out, and so are alternatives that contradict it."""
    if len(alternatives) == 1 and not is_override(alternatives[0]):
        return alternatives[0]
    chosen = fitting(alternatives, typed.overrides)
    filled, notes = [fill(text, row, typed.value) for text in chosen], list[str]()
    holes = any(HOLE in text for text in chosen)
    if holes and any(judge_parts(text, typed.judge) for text in filled):
        filled, notes = fill_numbers(chosen, row, typed)
    if refused := next((why for text in filled if holes and (why := judge_parts(text, typed.judge))), ""):  # it is wrong here too
        filled, notes = [text.replace(HOLE, UNFILLED) for text in chosen], [refused]
    written = [" ".join(map(quote, left)) for text in filled if (left := [part for part in text.split(" ") if part not in typed.overrides])]
    if chosen and not written:
        return f"you already have {join_or(dict.fromkeys(filled))}: leave it out"
    instead = find_contradicted(chosen, typed.overrides)
    written = [f"{text} in place of {' '.join(instead)}" for text in written] if instead else written
    parts = (f"write {join_or(dict.fromkeys(written))}" if written else "", *notes, row.says)
    return "; ".join(part for part in parts if part)


def fill_numbers(alternatives: Sequence[str], row: Synonym, typed: Typed) -> tuple[list[str], list[str]]:
    """With the value as a whole number, where it is one as people write it, and how each was read."""
    filled, notes = list[str](), list[str]()
    for text in alternatives:
        key = next((part.partition("=")[0] for part in text.split(" ") if HOLE in part), "")
        number, how = read_number(key, typed.value) or (typed.value, "")
        filled.append(fill(text, row, str(number)))
        notes += [f"{number} is {how}"] if how else []
    return filled, list(dict.fromkeys(notes))


def is_override(text: str) -> bool:
    return all(OVERRIDE.fullmatch(part) for part in text.split(" "))


def fitting(alternatives: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Without those that choose another value of an axis than the user did, unless all do."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override and "." not in override.partition("=")[0])
    kept = [text for text in alternatives if all(chosen.get(key, value) == value for key, _, value in map(cut, text.split(" ")))]
    return kept or list(alternatives)


def find_contradicted(alternatives: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The typed choices of an axis that each of the alternatives changes."""
    changed = [{key: value for key, _, value in map(cut, text.split(" ")) if "." not in key} for text in alternatives]
    typed = [(override, *override.split("=", 1)) for override in overrides if "=" in override]
    return [override for override, key, value in typed if changed and all(each.get(key, value) != value for each in changed)]


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
