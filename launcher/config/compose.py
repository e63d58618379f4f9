"""From conf/ and overrides to a typed Config.

Hydra's Compose API composes. Before that, each override is checked against the schema on its own, so that all problems are reported
together; afterwards the whole result is checked against the dataclasses of the schema. Hydra is imported only where it is used, and no
validation library is imported at all: it would take a quarter of the time of a plan.
"""

import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.config.conf_folder import GROUPS, OPTIONAL_GROUPS, PRIMARY, ConfFolder, as_conf_folder
from launcher.config.defaults import choose_duration, keys_of, settle, settle_rate, without_keys
from launcher.config.expected import describe_expected
from launcher.config.fact import complete, refuse_fixed, use_checkpoint_template
from launcher.config.hint import Known, explain_file, explain_key, explain_value
from launcher.config.key import FROM_RECORD, list_settings, member_of, takes_list, types_of, without_null
from launcher.config.schema import AXES, Config
from launcher.config.source import expand_source, kind_that_follows
from launcher.config.synonym import Typed
from launcher.config.written import UNREADABLE, join_words, parse, read_foreign, read_text, read_value, restate, separate
from launcher.errors import NODES, ConfigRefused, refuse_config, suggest
from trainer.contract import SpecError, decode

WITHOUT = {"tune": "~tune", "experiment": ""}  # =null for Hydra: `tune` has a default to delete, `experiment` has none
LARGEST = 2**63 - 1  # a larger number is a typing error, and may not fit into a float
OWN_CLUSTER = ". Your own is a file: copy conf/cluster/example.yaml to conf/cluster/NAME.yaml, fill it in, and write cluster=NAME"
INTERPOLATION = "interpolations (${...}) are refused, since a plan must show the value itself; write the value"


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What Hydra composed: plain data, and the file that was chosen for each group."""

    data: dict[str, Any]
    choices: dict[str, str | None]


def compose(overrides: Sequence[str], conf: Path | ConfFolder) -> Config:
    """The config of `conf`/config.yaml with overrides such as `hardware=p4` and `run.steps=10`.

    Raises ConfigRefused listing every wrong override, or else every wrong value with its key, its file and the allowed values.
    """
    return compose_with_files(overrides, conf)[0]


def compose_with_places(overrides: Sequence[str], conf: Path | ConfFolder) -> tuple[Config, Callable[[str], str]]:
    """The config, and what says of a dotted key which override or file sets it; '' where no file does. Raises ConfigRefused as `compose`."""
    conf = as_conf_folder(conf)
    composed = _compose_settled(overrides, conf)

    def find_place(key: str) -> str:
        place, (section, *inner) = _where(key.split("."), composed, overrides, conf), key.split(".")
        file = conf.find(section, str(composed.choices.get(section)))
        path = inner if place == conf.relative(file) else [section, *inner]
        return place if place.startswith("override") or _holds(conf.project.parent / place, path) else ""

    return complete(use_checkpoint_template(_validate(composed, overrides, conf)), overrides), find_place


def compose_with_files(overrides: Sequence[str], conf: Path | ConfFolder) -> tuple[Config, tuple[Path, ...]]:
    """The same, and the files that it was composed from, the first one that of config.yaml."""
    conf = as_conf_folder(conf)
    composed = _compose_settled(overrides, conf)
    files = (conf.find(group, choice) for group, choice in composed.choices.items() if choice)
    config = complete(use_checkpoint_template(_validate(composed, overrides, conf)), overrides)
    return config, (conf.project / f"{PRIMARY}.yaml", *(file for file in files if file.is_file()))


def _compose_settled(overrides: Sequence[str], conf: ConfFolder) -> Composed:
    """With the defaults that depend on other values."""
    composed = _compose(_translate(overrides, conf), conf)
    settle(composed.data, composed.choices, keys_of(overrides), conf)
    settle_rate(composed.data, composed.choices, keys_of(overrides), conf)
    return composed


def compose_over(config: Config, overrides: Sequence[str], conf: Path | ConfFolder) -> Config:
    """An existing config with overrides. Keys that no override names stay as they are, whatever `conf` says now; `axis=NAME` takes that
    one section from `conf`. Raises ConfigRefused as `compose` does."""
    from omegaconf import OmegaConf

    named = [override.partition("=")[0] for override in overrides]
    if of_several := [name for name in named if name in OPTIONAL_GROUPS]:
        raise ConfigRefused(
            f"{of_several[0]}=... sets keys of several sections. Start a new run with launch, or override the keys one by one"
        )
    conf = as_conf_folder(conf)
    translated = _translate(overrides, conf)
    chosen = [text for text in translated if not text.startswith("++")]
    composed = _compose(chosen, conf)
    data = json.loads(json.dumps(asdict(config))) | {text.partition("=")[0]: composed.data[text.partition("=")[0]] for text in chosen}
    tree = OmegaConf.create(data)
    for text in translated:
        parsed = parse(text.removeprefix("++")) if text.startswith("++") else None
        if parsed is not None:
            OmegaConf.update(tree, parsed.key_or_group, parsed.value(), merge=True, force_add=True)
    changed = typing.cast(dict[str, Any], OmegaConf.to_container(tree))
    if "data" in named:
        settle(changed, composed.choices, keys_of(overrides), conf)
    choose_duration(changed, keys_of(overrides))
    if "stage.checkpoint" in named:
        changed["stage"]["recorded"] = None  # of another checkpoint
    return complete(_validate(Composed(data=changed, choices=composed.choices), overrides, conf), overrides)


def options(conf: Path | ConfFolder) -> dict[str, tuple[str, ...]]:
    """Group -> its values, which are the files of its folder in `conf`."""
    return as_conf_folder(conf).list_groups()


# ------------------------------------------------------------------------------------------------------- overrides


def _translate(overrides: Sequence[str], conf: ConfFolder) -> list[str]:
    """Overrides in Hydra's syntax. Raises ConfigRefused for all that are wrong, together."""
    groups, translated, problems = conf.list_groups(), dict[str, str](), list[str]()
    known = Known(list_keys=list_settings, groups=groups, conf=conf, judge=lambda override: judge(override, conf))
    for override in join_words(overrides):
        try:
            key, text = _translate_one(expand_source(override), overrides, known)
            if translated.setdefault(key, text) != text:
                raise ConfigRefused(f"{key} is given twice, with different values: keep one")
        except ConfigRefused as error:
            parts = separate(override)
            apart = f"separate overrides by a space: {parts}" if parts else ""
            problems.append(f"  {override}: {apart or restate(override, partial(_refuse, overrides, known), groups) or error}")
    if problems:
        raise ConfigRefused("\n".join((_heading("override", len(problems)), *problems)))
    return [text for text in (*translated.values(), kind_that_follows(tuple(translated))) if text]


def _refuse(overrides: Sequence[str], known: Known, override: str) -> str:
    """Why an override is refused among those that were typed; '' = it is not."""
    try:
        _translate_one(expand_source(override), overrides, known)
    except ConfigRefused as error:
        return str(error)
    return known.judge(override)


def _translate_one(override: str, overrides: Sequence[str], known: Known) -> tuple[str, str]:
    """(key, override for Hydra or '' where it needs none). Raises ConfigRefused with the reason alone. `overrides`: all that were typed."""
    if override.startswith(("+", "~")):
        raise ConfigRefused(f"'+' and '~' are refused, since the schema has every key; write {override.lstrip('+~')}")
    if answer := explain_file(override, known):
        raise ConfigRefused(answer)
    if foreign := read_foreign(override):
        _refuse_foreign(*foreign, overrides, known)
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigRefused(UNREADABLE)
    typed = Typed(value=text, overrides=overrides, judge=known.judge)
    if key in known.groups:
        if "${" in text:
            raise ConfigRefused(INTERPOLATION)
        return key, _choose(key, text.strip().strip("'\""), typed, known)
    axis, _, rest = key.partition(".")
    if axis in AXES and rest == "name":
        raise ConfigRefused(f"{key} is the name of the chosen file; choose another one with {axis}=NAME")
    if key == FROM_RECORD or key.startswith(f"{FROM_RECORD}."):
        raise ConfigRefused("is read from the record of stage.checkpoint: set that, or the keys of model, data and stage themselves")
    kind = _find_type(key, typed, known)
    if "${" in text:
        raise ConfigRefused(INTERPOLATION)
    refuse_fixed(key, text)
    written = read_text(text, listed=takes_list(kind)) if without_null(kind) is str else read_value(key, text)
    return key, f"++{key}={written}"  # ++: a file may omit a key that has a default


def _refuse_foreign(word: str, value: str, overrides: Sequence[str], known: Known) -> None:
    """Raises ConfigRefused for an override in the form of another tool: `--learning_rate 1e-4`, `learning_rate: 1e-4`, a bare word."""
    typed = Typed(value=value, overrides=overrides, judge=known.judge)
    key = word.replace("-", "_")
    if key in known.groups and value in known.groups[key]:
        raise ConfigRefused(f"write {key}={value}")
    if key in known.groups and value:
        _choose(key, value, typed, known)
    if key in known.groups:
        raise ConfigRefused(f"write {key}=NAME; {suggest('', known.groups[key])}")
    _find_type(key, typed, known)
    raise ConfigRefused(f"write {key}={value or 'VALUE'}")


def judge(override: str, conf: Path | ConfFolder) -> str:
    """Why an override would be refused by itself; '' = it would not. For overrides that a hint offers."""
    known = Known(list_keys=tuple, groups=options(conf), conf=as_conf_folder(conf), judge=lambda _: "")
    try:
        key, text = _translate_one(override, (), known)
        parsed = parse(text.removeprefix("++")) if text.startswith("++") else None
        problems: list[tuple[str, str]] = []
        if parsed is not None:
            _build(_find_type(key, Typed(), known), parsed.value(), key, problems)
    except ConfigRefused as error:
        return str(error)
    return problems[0][1] if problems else ""


def find_type(key: str, conf: Path | ConfFolder) -> Any:
    """The type of a dotted key of the schema, `| None` included. Raises ConfigRefused with what the key may be called here."""
    known = Known(list_keys=list_settings, groups=options(conf), conf=as_conf_folder(conf), judge=lambda _: "")
    return _find_type(key, Typed(), known)


def _choose(group: str, name: str, typed: Typed, known: Known) -> str:
    """The raw text is compared with the names: it may be text that Hydra cannot parse."""
    names = known.groups[group]
    if name == "null" and group in OPTIONAL_GROUPS:
        return WITHOUT[group]
    if name not in names and "," in name:
        raise ConfigRefused(f"give one value; {suggest(name.split(',')[0], names)}")
    if name not in names:
        others = without_keys(typed.overrides, (group,))
        typed = replace(typed, overrides=others)  # what is wrong is no choice that an answer has to keep
        answer = explain_value(group, name, names, typed, known)
        more = OWN_CLUSTER if group == "cluster" and answer.startswith("valid are") else ""
        raise ConfigRefused(f"unknown {group} {name!r}; {answer}{more}")
    return f"{group}={name}"


def _find_type(key: str, typed: Typed, known: Known) -> Any:
    """The type of a dotted key in the schema. Raises ConfigRefused with a suggestion for an unknown key."""
    kind: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        section, kind = ".".join(parts[:depth]), without_null(kind)
        origin = typing.get_origin(kind)
        if is_dataclass(kind):
            names = types_of(typing.cast(type, kind))
            if part not in names:
                where, valid = (f" in {section}", {*names}) if section else ("", {*names, *known.groups})
                raise ConfigRefused(f"unknown key {key!r}{where}; {explain_key(key, section, valid, typed, known)}")
            kind = names[part]
        elif origin in (dict, tuple) and (origin is dict or part.isdigit()):
            kind = typing.get_args(kind)[1 if origin is dict else 0]
        elif kind is not Any:
            raise ConfigRefused(f"unknown key {key!r}: {section} is a single value and has no keys")
    return kind


# ---------------------------------------------------------------------------------------------------------- Hydra


def _compose(overrides: list[str], conf: ConfFolder) -> Composed:
    """Raises ConfigRefused for a file that cannot be read or composed."""
    from hydra import compose as compose_files, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_dir(str(conf.project.resolve()), version_base="1.3"):
            if conf.own:
                _search_first(conf.own)
            config = compose_files(PRIMARY, overrides, return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        data = typing.cast(dict[str, Any], OmegaConf.to_container(config, throw_on_missing=True))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ConfigRefused(f"{_name_broken(conf)}: cannot be composed: {str(error).replace('++', '')}") from error
    _name_by_file(data, choices, overrides)
    return Composed(data=data, choices=choices)


def _name_by_file(data: dict[str, Any], choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
    """Each axis has the name of its file, which `axis=NAME` chooses: a copy often still has the `name` of the file that it was copied from."""
    typed = keys_of([text.removeprefix("++") for text in overrides])
    for axis in AXES:
        if isinstance(data.get(axis), dict) and choices.get(axis) and f"{axis}.name" not in typed:
            data[axis]["name"] = choices[axis]


def _search_first(own: Path) -> None:
    """Make the initialized Hydra look into this folder before all others. `hydra.searchpath` only adds folders after the first one."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().config_loader().get_sources().insert(0, FileConfigSource(provider="own", path=f"file://{own}"))


def _name_broken(conf: ConfFolder) -> str:
    """The first file that cannot be read or is not YAML; else the folder, and the text of Hydra names the file."""
    from yaml import YAMLError, safe_load

    for file in (file for folder in conf.folders for group in ("", *GROUPS) for file in sorted((folder / group).glob("*.yaml"))):
        try:
            safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, YAMLError):
            return str(file)
    return str(conf.folders[0])


# ----------------------------------------------------------------------------------------------------------- types


def _validate(composed: Composed, overrides: Sequence[str], conf: ConfFolder) -> Config:
    """Raises ConfigRefused listing every value that the schema does not allow, with its key and where it was set."""
    problems: list[tuple[str, str]] = []
    config = _build(Config, composed.data, "", problems)
    if problems:
        lines = [
            f"  {key}{_whose(key, composed)} ({_where(key.split('.'), composed, overrides, conf)}): {reason}" for key, reason in problems
        ]
        refuse_config("\n".join((_heading("value", len(problems)), *lines)), (key for key, _ in problems))
    return choose_runtime(typing.cast(Config, config))


def choose_runtime(config: Config) -> Config:
    """The config with cluster.runtime=auto resolved: an accelerator needs the drivers' own torch, which its image has, and other machines have
    no environment of ours."""
    if config.cluster.runtime != "auto":
        return config
    on_this_cpu = config.hardware.accelerator == "cpu" and all(node.is_local for node in config.cluster.nodes)
    return replace(config, cluster=replace(config.cluster, runtime="process" if on_this_cpu else "docker"))


def _whose(key: str, composed: Composed) -> str:
    """The host of the node that a key belongs to: cluster.nodes.3 alone would have to be counted in the file."""
    if not key.startswith(f"{NODES}."):
        return ""
    nodes, place = composed.data["cluster"]["nodes"], int(key.split(".")[2])
    host = nodes[place].get("host") if isinstance(nodes[place], dict) else None
    return f" of node {host}" if host else ""


def _build(kind: Any, data: Any, key: str, problems: list[tuple[str, str]]) -> Any:
    """A value of a schema type from plain data. All problems are collected, not only the first; the contract's decoder reads the leaves.
    Where there is a problem the value is None and must not be used."""
    inner = member_of(kind, data)
    if is_dataclass(inner) and isinstance(data, dict):
        return _build_section(typing.cast(type, inner), data, key, problems)
    if typing.get_origin(inner) is tuple and isinstance(data, list):
        item = typing.get_args(inner)[0]
        return tuple(_build(item, value, f"{key}.{index}", problems) for index, value in enumerate(data))
    if isinstance(data, str) and "${" in data:
        problems.append((key, INTERPOLATION))
        return None
    if isinstance(data, int) and abs(data) > LARGEST:
        problems.append((key, f"a number of {len(str(abs(data)))} digits is too large; at most {LARGEST}"))
        return None
    try:
        return decode(kind, data)
    except SpecError:
        problems.append((key, describe_expected(inner, data, key)))
        return None


def _build_section(section: type, data: dict[str, Any], key: str, problems: list[tuple[str, str]]) -> Any:
    types, prefix, before = types_of(section), f"{key}." if key else "", len(problems)
    required = [field.name for field in fields(section) if field.default is MISSING and field.default_factory is MISSING]
    problems += [(f"{prefix}{name}", f"unknown key; {suggest(name, types)}") for name in data if name not in types]
    problems += [(f"{prefix}{name}", "is missing") for name in required if name not in data]
    values = {name: _build(types[name], value, f"{prefix}{name}", problems) for name, value in data.items() if name in types}
    return section(**values) if len(problems) == before else None


def _where(path: list[str], composed: Composed, overrides: Sequence[str], conf: ConfFolder) -> str:
    """The override or the file that sets a key. The later file wins, as in the defaults list."""
    key = ".".join(path)
    for override in overrides:
        name = override.split("=", 1)[0]
        if name not in AXES and (key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.")):
            return f"override {override}"
    for group in reversed(OPTIONAL_GROUPS):
        choice = composed.choices.get(group)
        if choice and _holds(conf.find(group, choice), path):
            return conf.describe(group, choice)
    axis = path[0]
    return conf.describe(axis, str(composed.choices.get(axis))) if axis in AXES else f"{conf.project.name}/{PRIMARY}.yaml"


def _holds(file: Path, path: list[str]) -> bool:
    from yaml import safe_load

    node = safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _heading(what: str, count: int) -> str:
    return f"the config is refused, one {what} is wrong:" if count == 1 else f"the config is refused, {count} {what}s are wrong:"
