"""`omnilaunch options`: the values of each axis, the keys of the config, and the words of other tools for them."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.commands.plan import add_overrides, conf_of
from launcher.errors import ConfigRefused
from launcher.redact import show
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.conf_folder import ConfFolder
    from launcher.config.setting import Setting

WIDTH, LEAST_WIDTH = 80, 40
LABEL = 10
GAP = 2  # columns between a name and what it means
SHORT = 12  # characters of a value that is shown beside its key
FEW = 4  # lines of a search that are not cut
WIDEST = 40  # columns of a name; a longer one has a line of its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "key", nargs="?", default="", metavar="KEY", help="an axis, a key or a section: hardware, run.steps, stage.optimizer"
    )
    add_overrides(parser, "the run whose values are shown: hardware=h200 stage=lora")
    parser.add_argument("--search", default="", metavar="WORD", help="find keys, values, meanings, and the words of other tools")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    from launcher.config.axis_value import describe_axis, describe_values
    from launcher.config.compose import options
    from launcher.config.schema import AXES

    conf = conf_of(arguments)
    words = [word for word in (arguments.key, *arguments.overrides) if word]
    keys, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(keys) > 1:
        raise ConfigRefused(f"give one key, then overrides; these are {len(keys)}: {', '.join(keys)}")
    key = keys[0] if keys else ""
    if arguments.search:
        return show_found(arguments.search, conf, as_json=arguments.json)
    if not key and overrides:
        key = overrides[0].partition("=")[0]
    if key in options(conf):
        values = {key: describe_axis(key, conf)}
        settings = describe(key, overrides, conf) if key in AXES else []
        return show_axes(values, find_chosen(overrides, conf), settings, as_json=arguments.json)
    if not key:
        return show_axes(describe_values(conf), find_chosen(overrides, conf), [], as_json=arguments.json)
    return show_key(key, overrides, conf, as_json=arguments.json)


def describe(key: str, overrides: Sequence[str], conf: "ConfFolder") -> "list[Setting]":
    from launcher.config.setting import describe_settings, find_keys

    return describe_settings(find_keys(key, conf), overrides, conf)


def show_axes(values: dict[str, dict[str, str]], chosen: dict[str, str], settings: "Sequence[Setting]", *, as_json: bool) -> int:
    """The values of axes, and the settings of the one that was asked for."""
    if as_json:
        show(json.dumps({"values": values, "keys": [asdict(each) for each in settings]}, indent=2, ensure_ascii=False))
        return Exit.OK
    for axis, lines in values.items():
        show(axis)
        size = max(map(len, lines), default=0)
        for name, title in lines.items():
            show(cut(f"{'*' if chosen.get(axis) == name else ' '} {name:{size}}{' ' * GAP}{title}"))
    show("\n* chosen, or the default")
    if settings:
        axis = next(iter(values))
        show(f"\nkeys of {axis}")
        show_table([each for each in settings if not each.fixed and each.key != f"{axis}.name"])
    show("\nA key: omnilaunch options KEY")
    show("The words of other tools: omnilaunch options --search WORD")
    return Exit.OK


def find_chosen(overrides: Sequence[str], conf: "ConfFolder") -> dict[str, str]:
    """Axis -> the value that these overrides choose; without any, the default of config.yaml, for which nothing has to be composed."""
    from launcher.config.compose import compose
    from launcher.config.conf_folder import PRIMARY
    from launcher.config.official_name import read_yaml
    from launcher.config.schema import AXES

    if not overrides:
        defaults = read_yaml(conf.project / f"{PRIMARY}.yaml").get("defaults", ())
        return {axis: name for entry in defaults if isinstance(entry, dict) for axis, name in entry.items() if axis in AXES}
    config = compose(overrides, conf)
    return {axis: getattr(config, axis).name for axis in AXES}


def show_key(key: str, overrides: Sequence[str], conf: "ConfFolder", *, as_json: bool) -> int:
    settings = describe(key, overrides, conf)
    if as_json:
        show(json.dumps([asdict(each) for each in settings], indent=2, ensure_ascii=False))
    elif settings[0].key == key:
        show("\n".join(write_setting(settings[0])))
    else:
        show(f"keys of {key}")
        show_table(settings)
        show("\nA key: omnilaunch options KEY")
    return Exit.OK


def write_setting(setting: "Setting") -> Iterator[str]:
    from launcher.plan.text import wrap

    rows = {
        "meaning": setting.meaning,
        "type": setting.kind,
        "allowed": ", ".join(setting.allowed),
        "current": setting.current,
        "set by": setting.place or "no file; the default of the schema",
        "default": setting.default if setting.default != "none" else "none: a file of conf/ sets it",
        "fixed": setting.fixed,
        "words": ", ".join(setting.words),
        "write": "" if setting.fixed else f"{setting.key}={example(setting)}",
    }
    yield setting.key
    for name, text in rows.items():
        if text:
            yield from wrap(text, width(), first=f"  {name:{LABEL}}", indent=" " * (LABEL + 2))


def example(setting: "Setting") -> str:
    """A value that the key may have."""
    value = setting.current if setting.current not in ("null", "''") else next(iter(setting.allowed), "VALUE")
    return value if " " not in value and '"' not in value else "VALUE"


def show_table(settings: "Sequence[Setting]") -> None:
    """Key, current value and meaning, one line each; a long key has a line of its own."""
    named = [(f"{each.key}={each.current}" if len(each.current) <= SHORT else each.key, each.meaning) for each in settings]
    size = max((len(name) for name, _ in named if len(name) <= WIDEST), default=0)
    for name, meaning in named:
        show(f"  {name}\n{cut(' ' * (size + 4) + meaning)}" if len(name) > size else cut(f"  {name:{size}}  {meaning}"))


def width() -> int:
    """Columns of the terminal; WIDTH where the output goes elsewhere."""
    from shutil import get_terminal_size

    return max(get_terminal_size((WIDTH, 24)).columns, LEAST_WIDTH)


def cut(line: str) -> str:
    """The line in the columns of the terminal, of which a Chinese character takes two."""
    from launcher.plan.text import measure

    if measure(line) <= width():
        return line
    while measure(line) > width() - 3:
        line = line[:-1]
    return f"{line.rstrip()}..."


def show_found(word: str, conf: "ConfFolder", *, as_json: bool) -> int:
    """Raises ConfigRefused where nothing is found."""
    from launcher.config.search import find_meant, search
    from launcher.plan.text import measure

    found = search(word, conf)
    if not any(found.values()) and (near := find_meant(word)):
        show(f"nothing is called {word!r}; this is for {near[0]}{''.join(f', or search {each}' for each in near[1:])}", file=sys.stderr)
        found = search(near[0], conf)
    if not any(found.values()):
        raise ConfigRefused(f"nothing is called or means {word!r}. All axes and values: omnilaunch options")
    if as_json:
        show(json.dumps(found, indent=2, ensure_ascii=False))
        return Exit.OK
    titles = {"keys": "keys", "values": "values", "words": "words of other tools", "variables": "environment variables", "verbs": "verbs"}
    for name, lines in found.items():
        if lines:
            show(titles[name])
            size = min(WIDEST - 14, max(map(measure, lines)))
            for left, right in lines.items():
                print_found(f"  {left}{' ' * (size - measure(left))}", right, whole=len(lines) <= FEW)
    return Exit.OK


def print_found(name: str, text: str, *, whole: bool) -> None:
    """On one line, or wrapped where few were found and there is room for it."""
    from launcher.plan.text import measure, wrap

    lines = wrap(text, width(), first=f"{name}  ", indent=" " * (measure(name) + 2)) if whole else (cut(f"{name}  {text}"),)
    show("\n".join(lines))
