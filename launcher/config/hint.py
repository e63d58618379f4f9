"""What is said about a key or a value that the config does not have: the words of other tools, official names, then typing errors.

Nothing is offered that may do something else than what was asked: where it is not clear, the valid names are listed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.config.conf_folder import OPTIONAL_GROUPS, ConfFolder
from launcher.config.official_name import LIKE_A_CHIP, find_official, find_relative, read_yaml, shorten_chip, split_cards
from launcher.config.schema import GROUPS
from launcher.config.synonym import (
    FALSE,
    HOLE,
    Judge,
    Synonym,
    Typed,
    answer_key,
    answer_value,
    decides,
    find_key,
    find_row,
    find_topic,
    is_typing_error,
    list_variants,
    load_synonyms,
    translate,
    turn_round,
    write_answer,
)
from launcher.config.variable import answer_variable
from launcher.config.written import offer_number, quote, read_number
from launcher.errors import find_near, join_or, plain, suggest
from launcher.redact import names_a_secret

MOST_KEYS = 4  # of one last part, such as the four keys that end in .batch
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{4,}")  # of the environment
GENERIC_ENDS = (
    "enabled",
    "start",
    "path",
    "steps",
    "ranks",
    "stack",
    "memory",
    "token",
    "weights",
)  # of keys whose sections say what is meant
NEAR_LEAF = 0.8  # of a typing error in the last part of a key
ROWS = re.compile(r"(?!-)[^\s=]+\.jsonl?")  # a bare name of a file
DEVICES = re.compile(r"\d{1,3}(,\d{1,3})+")  # their numbers
COUNT = "cluster.devices_per_node"
MODEL, HARDWARE, DEFAULT_STAGE = "model", "hardware", "full"
CALLED = {"vision": "the vision tower", "projector": "the projector", "lm": "the language model"}


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a hint may offer. `list_keys`: dotted keys that can be set. `groups`: axis -> its names. `judge`: why an override is wrong."""

    list_keys: Callable[[], Sequence[str]]
    groups: Mapping[str, Sequence[str]]
    conf: ConfFolder
    judge: Judge


def explain_key(key: str, section: str, names: Collection[str], typed: Typed, known: Known) -> str:
    """`section`: the part of the key that exists, '' = none; `names`: what it has."""
    leaf, rest = key.rpartition(".")[2], key.removeprefix(f"{section}.") if section else key
    if answer := answer_variable(key, typed.value) or answer_foreign(find_key(key, rest), typed, known):
        return answer
    if answer := name_model(leaf, typed, known) if "." not in rest else "":
        return answer
    if ending := [dotted for dotted in known.list_keys() if dotted.endswith(f".{rest}")]:
        return offer_keys(ending, typed)
    part, decisive = rest.partition(".")[0], decides(rest)
    if decisive and (answer := answer_variant(leaf, typed, known)):
        return answer
    if decisive and not near_keys(part, names) and (answer := answer_foreign(find_row(load_synonyms().keys, leaf), typed, known)):
        return answer
    if section or (near_keys(part, names) and "." not in rest):
        return suggest(part, names)
    leaves: dict[str, list[str]] = {}
    for dotted in known.list_keys() if decisive else ():
        leaves.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    if near := [dotted for name in near_keys(leaf, leaves) for dotted in leaves[name]]:
        return offer_keys(near, typed)
    if VARIABLE.fullmatch(key):
        write = f"cluster.secrets=[{key}]" if names_a_secret(key) else f"cluster.environment.{key}={typed.value.strip() or 'VALUE'}"
        return f"a variable that the ranks are to have is written {quote(write)}"
    about = find_topic(rest if decisive else rest.rpartition(".")[0])
    return answer_foreign(about, typed, known) or (
        answer_unknown(key, typed, known) if decisive else f"valid are: {', '.join(sorted(names))}"
    )


def near_keys(word: str, names: Collection[str]) -> list[str]:
    """The names that the word is a typing error of. Each part must be one of the same part: max_length is no error in min_length. A word
    such as `mode` is none: it is right elsewhere."""
    if plain(word) in load_synonyms().generic:
        return []
    return [name for name in find_near(word, names, least=NEAR_LEAF) if is_typing_error(word, name)]


def answer_variant(word: str, typed: Typed, known: Known) -> str:
    """The answer to the word without `peft_`, `use_`, `no_` and the like."""
    for rest, negated in list_variants(word):
        row = load_synonyms().keys.get(plain(rest))
        turned = replace(typed, value=turn_round(typed.value)) if negated else typed
        if row and (not negated or (turned.value and not row.group and translate(row, turned.value))):
            return answer_foreign(row, turned, known)
        keys = [dotted for dotted in known.list_keys() if dotted.endswith(f".{rest}")]
        if negated and turned.value and keys and all(not typed.judge(f"{key}={turned.value}") for key in keys):
            return f"write {join_or(f'{key}={turned.value}' for key in keys)}"
        if keys and not negated:
            return offer_keys(keys, typed)
    return ""


def answer_unknown(key: str, typed: Typed, known: Known) -> str:
    """What is said of a word that nothing is known of: the nearest word if one is near, and where to look."""
    table, word = load_synonyms().keys, key.rpartition(".")[2]
    if plain(key) in load_synonyms().generic:
        return f"{key} says too little by itself; omnilaunch options --search {quote(word)} lists what it may be here, and omnilaunch options all axes"
    near = near_keys(word, dict.fromkeys(each for row in table.values() for each in row.words))
    nearest = next((answer for each in near if (answer := answer_foreign(table[plain(each)], typed, known))), "")
    called = f"the nearest word is {near[0]}: {nearest}. " if nearest else ""
    return f"no key here and no word of another tool is called so; {called}Look for it with: omnilaunch options --search {quote(word)}"


def answer_foreign(row: Synonym | None, typed: Typed, known: Known) -> str:
    if row is None:
        return ""
    if row.modules:
        return answer_modules(row, typed)
    if f"{COUNT}={HOLE}" in row.write and (answer := explain_devices(typed, known)):
        return answer
    return answer_group(row, typed, known) if row.group else answer_key(row, typed, explain_axis(typed, known))


def answer_group(row: Synonym, typed: Typed, known: Known) -> str:
    """What trains the groups of weights that all words like `freeze_vit=false` name together, with the stage that was typed."""
    wishes = list(find_wishes(typed.overrides)) or [(row.words[0], row, typed.value)]
    if wishes[0][1] is not row:
        return f"the answer to {wishes[0][0]} takes it into account"
    trains = {each.group: (value.lower() in FALSE) == each.frozen for _, each, value in wishes}
    stage = next((text.partition("=")[2].strip() for text in typed.overrides if text.startswith("stage=")), "")
    stage = stage if stage in known.groups["stage"] else ""
    recipe = read_yaml(known.conf.find("stage", stage or DEFAULT_STAGE))
    given = next((text.partition("=")[2].strip("[]").split(",") for text in typed.overrides if text.startswith("stage.trainable=")), None)
    before = given if given is not None else recipe.get("trainable") or []
    if recipe.get("kind") != "train":
        return f"leave it out; stage={stage} trains nothing"
    members = {group: ("lm", "head") if group == "lm" else (group,) for group in trains}
    wanted = {*before, *(each for group, on in trains.items() if on for each in members[group])}
    wanted -= {each for group, on in trains.items() if not on for each in members[group]}
    if recipe.get("lora"):
        return answer_beside_adapters(stage, trains, before, wanted)
    if not wanted:
        return "nothing would be trained: leave one of them out"
    if wanted == set(before):
        also = " or stage=lora" if not stage and trains.get("lm") else ""
        states = [f"{CALLED[group]} is {'trained' if on else 'frozen'}" for group, on in trains.items()]
        return f"leave it out; {', '.join(states)} with stage={stage or DEFAULT_STAGE}{also} already"
    if not stage and wanted == {"projector"}:
        return "write stage=projector, which trains the projector alone"
    return f"write {'' if stage else f'stage={DEFAULT_STAGE} '}{write_groups(wanted)}"


def answer_beside_adapters(stage: str, trains: Mapping[str, bool], before: Collection[str], wanted: Collection[str]) -> str:
    """With adapters in the language model, which is frozen itself."""
    full = [group for group in wanted if group != "lm"]
    if trains.get("lm") is False:
        instead = f"stage=full {write_groups(full)}" if full else "stage=projector"
        return f"stage={stage} always trains adapters in the language model; without them, in place of stage={stage}: {instead}"
    full = [group for group in full if group != "head" or group in before]
    if set(full) == set(before):
        return f"leave it out; stage={stage} trains adapters in the language model{f', and {join_or(before)}' if before else ' alone'}"
    more = f" or {write_groups(('vision', 'projector', 'head'))}" if full == ["vision"] and "projector" not in trains else ""
    return f"write {write_groups(full)}{more}; these are trained in full, beside the adapters of stage={stage}"


def answer_modules(row: Synonym, typed: Typed) -> str:
    """The groups that hold the modules of a list, trained in full beside the adapters; what is not possible there is said."""
    names = re.findall(r"[^\s,\[\]'\"]+", typed.value)
    if not names:
        return row.says if typed.value == "" else f"leave it out; {row.says}"
    if all(name.lower() in FALSE for name in names):
        return f"leave it out; {row.says}"
    groups = {name: find_module(row, name) for name in names}
    inside = [name for name, group in groups.items() if group == "lm"]
    unknown = [name for name, group in groups.items() if not group]
    notes = (
        [f"{', '.join(inside)} cannot be trained beside adapters: stage=full trains the whole language model in their place"]
        if inside
        else []
    )
    notes += [f"{', '.join(unknown)}: {row.says}"] if unknown else []
    before = next((text.partition("=")[2].strip("[]").split(",") for text in typed.overrides if text.startswith("stage.trainable=")), [])
    wanted = {group for group in groups.values() if group not in ("", "lm")}
    if not wanted:
        return "; ".join(notes)
    listed = ",".join(group for group in GROUPS if group in {*wanted, *before})
    return "; ".join((write_answer((f"stage=lora stage.trainable=[{listed}]",), Synonym(words=()), typed), *notes))


def find_module(row: Synonym, name: str) -> str:
    """The group of `model.visual.merger`: by its whole name, else by the longest end that the row has; '' = none."""
    parts = name.split(".")
    ends = (plain(".".join(parts[start:])) for start in range(len(parts)))
    return next((row.modules[end] for end in ends if end in row.modules), "")


def find_wishes(overrides: Sequence[str]) -> Iterator[tuple[str, Synonym, str]]:
    """The typed words of other tools that train or freeze a group, their rows and their values."""
    for override in join_words(overrides):
        word, value = read_foreign(override) or override.partition("=")[::2]
        row = find_key(word, word) if "stage" not in word else None
        if row and row.group:
            yield word, row, value


def write_groups(groups: Collection[str]) -> str:
    return quote(f"stage.trainable=[{','.join(group for group in GROUPS if group in groups)}]")


def offer_keys(keys: Sequence[str], typed: Typed) -> str:
    if (leaf := keys[0].rpartition(".")[2]) in GENERIC_ENDS:
        return f"{leaf} says too little by itself; omnilaunch options --search {leaf} lists the keys that end so, such as {keys[0]}"
    if len(keys) > MOST_KEYS:
        return f"{len(keys)} keys end so; omnilaunch options --search {keys[0].rpartition('.')[2]} lists them"
    number = read_number(keys[0], typed.value) if len(keys) == 1 and typed.judge(f"{keys[0]}={typed.value}") else None
    return f"did you mean {join_or(map(repr, keys))}?{f' {offer_number(keys[0], typed.value)}' if number else ''}"


def name_model(word: str, typed: Typed, known: Known) -> str:
    """`qwen2_5_vl_7b=...` or a bare `lora`: the name of a value in place of a key."""
    axes = [axis for axis, names in known.groups.items() if word in names and axis not in OPTIONAL_GROUPS]
    return f"write {join_or(f'{axis}={word}' for axis in axes)}" if axes and typed.value in ("", "true") else ""


def explain_axis(typed: Typed, known: Known) -> Callable[[str, str], str]:
    """(axis, value) -> what to write, for a key of another tool that names a value of an axis here."""

    def explain(axis: str, value: str) -> str:
        names = known.groups.get(axis, ())
        if f"{axis}={value}" in typed.overrides:
            return f"you already have {axis}={value}: leave it out"
        if value in names:
            return write_answer((f"{axis}={value}",), Synonym(words=()), typed)
        return explain_value(axis, value, names, typed, known) if value else f"write {axis}=NAME; {suggest('', names)}"

    return explain


def explain_value(axis: str, name: str, names: Sequence[str], typed: Typed, known: Known) -> str:
    """What to write in place of an unknown value of an axis."""
    if axis == MODEL and is_path(name):
        return f"that is a folder: write model=NAME model.source.path={name}, with one of: {', '.join(published(names))}"
    if axis == "data" and is_path(name):
        return f"that is a file: write data=files data.train={name}"
    if elsewhere := [other for other, others in known.groups.items() if name in others and other not in OPTIONAL_GROUPS]:
        return f"write {join_or(f'{other}={name}' for other in elsewhere)}"
    official = find_official(axis, name, known.conf)
    if len(official) == 1 and "/" in name:
        return f"write {axis}={official[0]}"
    if axis == MODEL and not official and (relative := find_relative(name, known.conf))[0]:
        return f"not available; model={relative[0]} is {relative[1]}, which has other weights"
    if axis == HARDWARE and not official and (answer := explain_cards(name, typed, known, alone=True)):
        return answer
    if answer := answer_value(axis, name, names, typed):
        return answer if answer.startswith(("write ", "you already ")) else f"{answer}; valid are: {', '.join(names)}"
    if len(official) == 1:
        return f"write {axis}={official[0]}"
    if official:
        return f"which one: {join_or(f'{axis}={each}' for each in official)}?"
    if axis == HARDWARE and (chip := shorten_chip(name)) != name.lower() and chip:
        return explain_value(axis, chip, names, typed, known) if chip not in names else f"write {axis}={chip}"
    if axis == MODEL and not find_near(name, names) and any(letter.isdigit() for letter in name):
        return f"no file of conf/model describes it; valid are: {', '.join(published(names))}"
    if axis == HARDWARE and not find_near(name, names) and any(letter.isdigit() for letter in name):
        return f"no file describes it; CONTRIBUTING.md says how to add hardware: copy the nearest file of conf/hardware; valid are: {', '.join(names)}"
    return suggest(name, names)


def explain_devices(typed: Typed, known: Known) -> str:
    """`gpus=8xH200` names the cards too, and `gpus=0,1` the devices; '' for a number."""
    value = typed.value.strip().strip("[]'\"")
    if DEVICES.fullmatch(value) and len(set(value.split(","))) == value.count(",") + 1:
        count = value.count(",") + 1
        chosen = write_answer((f"{COUNT}={count} cluster.nodes.0.devices=[{value}]",), Synonym(words=()), typed)
        return f"{chosen}; these devices of the node are used"
    return explain_cards(value, typed, known, alone=False)


def explain_cards(text: str, typed: Typed, known: Known, *, alone: bool) -> str:
    """What to write for a number of cards of a kind, such as `8xH200`; '' for anything else. `alone`: as the value of hardware, where
    `h200:1` may be the number of a device."""
    others = replace(typed, overrides=[text for text in typed.overrides if not text.startswith(f"{HARDWARE}=")])
    readings = []
    for chip, count, between in split_cards(text):
        explained = explain_value(HARDWARE, chip, known.groups[HARDWARE], others, known) if chip not in known.groups[HARDWARE] else ""
        explained = explained or f"write {HARDWARE}={chip}"
        readings.append((not explained.startswith("write "), chip, count, between, explained))
    for unknown, chip, count, between, explained in sorted(readings):
        if alone and between == ":" and chip.lower() in ("cuda", "npu"):
            return ""  # as torch names one device
        if not unknown:
            return write_cards(chip, count, explained, typed, known, may_be_one=alone and between == ":")
        if between not in ("", "-") and LIKE_A_CHIP.fullmatch(chip) and explained.startswith(("no file", "not available")):
            return f"the number of devices is {COUNT}={count}; {chip}: {explained}"
    return ""


def write_cards(chip: str, count: int, explained: str, typed: Typed, known: Known, *, may_be_one: bool) -> str:
    """`explained`: what is written for one card. `may_be_one`: whether the number may be the id of a device."""
    head, _, says = explained.removeprefix("write ").partition("; ")
    names = re.findall(rf"{HARDWARE}=(\w+)", head)
    files = [read_yaml(known.conf.find(HARDWARE, name)) for name in names]
    held = max((int(file.get("devices_per_node") or 0) for file in files), default=0)
    if may_be_one and count < held:
        both = f"; cluster.nodes.0.devices=[{count}] chooses the device {count}"
        return f"{explained}{both}{f', {COUNT}={count} takes {count} devices' if count else ''}"
    if len(names) > 1:
        return f"{explained}; {COUNT}={count} is the number of devices of a node"
    more = f"{COUNT}={count}"
    if count > held and files[0].get("accelerator") != "cpu":
        if not any(str(note).startswith("devices_per_node") for note in files[0].get("notes") or ()):
            nodes = f"{count} devices are {-(-count // held)} nodes of {held}: copy conf/cluster/example.yaml to conf/cluster/NAME.yaml"
            return f"{write_answer((head,), Synonym(words=()), typed)}; {nodes}, fill it in, and write cluster=NAME"
        more = f"{more} {HARDWARE}.devices_per_node={count}"  # that of the file is assumed
    return "; ".join(part for part in (write_answer((f"{head} {more}",), Synonym(words=()), typed), says) if part)


def explain_file(word: str, known: Known) -> str:
    """What to write in place of a bare `rows.json`; '' for any other word, and for the value of an option: `--data_path rows.json`."""
    if not ROWS.fullmatch(word):
        return ""
    strategy = answer_value("strategy", word, known.groups["strategy"], Typed())
    return strategy or f"a file of rows is named by its key: data=files data.train={word}"


def is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith((".json", ".jsonl", ".csv", ".parquet", ".tsv"))


def published(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("tiny_")]


# ------------------------------------------------------------------------------------------- the forms of other tools


EQUALS = ("=", "＝")
OPTION = re.compile(r"--?([A-Za-z][\w.-]*)(?:[=\s]\s*(.*))?", re.DOTALL)
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
