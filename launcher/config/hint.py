"""What is said about a key or a value that the config does not have: the words of other tools, official names, then typing errors.

Nothing is offered that may do something else than what was asked: where it is not clear, the valid names are listed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from launcher.config.conf_folder import OPTIONAL_GROUPS, ConfFolder
from launcher.config.official_name import COUNT, HARDWARE, explain_cards, find_official, find_relative, read_yaml, shorten_chip
from launcher.config.schema import GROUPS
from launcher.config.synonym import (
    ABSENT,
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
from launcher.config.written import join_words, offer_number, quote, read_foreign, read_number
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
TARGETS = "stage.lora.targets"
REGEX = re.compile(r"[\\^$*+?(|{]")  # in no name of a layer
MODEL, DEFAULT_STAGE = "model", "full"
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
    if f"{TARGETS}=[{HOLE}]" in " ".join(row.write) and REGEX.search(typed.value):
        return answer_regex(typed)
    if not row.write and is_turned_off(row, typed):
        return "leave it out"
    if row.axis == "" and len(row.write) == 1 and (answer := explain_without(row.write[0], typed, known)):
        return answer
    if f"{COUNT}={HOLE}" in row.write and (answer := explain_devices(typed, known)):
        return answer
    return answer_group(row, typed, known) if row.group else answer_key(row, typed, explain_axis(typed, known))


def answer_regex(typed: Typed) -> str:
    """`lora_target=.*_proj`: one regex over the whole names of modules, which `re:` begins here; a choice of names is a list."""
    value = typed.value.strip().strip("'\"")
    if re.fullmatch(r"[\w|]+", value):
        return write_answer((f"stage=lora {TARGETS}=[{value.strip('|').replace('|', ',')}]",), Synonym(words=()), typed)
    text = value.replace(" ", "\0").replace('"', '\\"')
    chosen = write_answer((f'stage=lora {TARGETS}=["re:{text}"]',), Synonym(words=()), typed)
    return f"{chosen}; the regex is over the whole names of modules"


def is_turned_off(row: Synonym, typed: Typed) -> bool:
    """Whether the value turns off what is not available, so that nothing is missing: `use_galore=false`."""
    word = next((text.partition("=")[0] for text in typed.overrides if text.endswith(f"={typed.value}")), row.words[0])
    turned = word.lstrip("-").startswith(load_synonyms().negations)
    off = typed.value.strip().lower() in FALSE and not typed.value.strip().isdigit()  # a loss scale of 0 is a dynamic one
    return row.says.startswith(ABSENT) and off and not turned


def explain_without(write: str, typed: Typed, known: Known) -> str:
    """The answer to `bf16=false` where bf16 is what the hardware has by default; '' where leaving it out is right, and for other words."""
    axis, _, precision = write.partition("=")
    chosen = dict(text.split("=", 1) for text in typed.overrides if "=" in text)
    if axis != "precision" or typed.value.strip().lower() not in FALSE:
        return ""
    other = "bf16" if precision == "fp32" else "fp32"
    if axis in chosen:
        return f"{write} is given; {axis}={other} is without it" if chosen[axis] == precision else ""
    hardware = chosen.get(HARDWARE, "").strip()
    recipe = (
        read_yaml(known.conf.find(HARDWARE, hardware))
        if hardware in known.groups[HARDWARE]
        else read_yaml(known.conf.project / "config.yaml")
    )
    given = next((each for each in map(read_default, recipe.get("defaults") or ()) if each), "")
    return f"the default here is {precision}; {axis}={other} is without it" if given == precision else ""


def read_default(entry: object) -> str:
    """The precision that an entry of a file's defaults list chooses; '' = none."""
    chosen = entry.items() if isinstance(entry, Mapping) else ()
    return next((str(value) for key, value in chosen if "precision" in str(key)), "")


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
    if axis == HARDWARE and not official and (answer := explain_cards(name, typed, name_card(typed, known), known.conf, alone=True)):
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
        return f"no file of conf/model describes {name}; CONTRIBUTING.md says how a model is added. Those of model=NAME: {', '.join(published(names))}"
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
    if (answer := explain_cards(value, typed, name_card(typed, known), known.conf, alone=False)) or value[:1].isdigit() or not value:
        return answer
    named = explain_axis(typed, known)(HARDWARE, value)
    return named if named.startswith((f"write {HARDWARE}=", "you already")) else ""


def name_card(typed: Typed, known: Known) -> Callable[[str], str]:
    """What is written for one card, whatever hardware is typed."""
    others = replace(typed, overrides=[text for text in typed.overrides if not text.startswith(f"{HARDWARE}=")])
    return partial(explain_axis(others, known), HARDWARE)


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
