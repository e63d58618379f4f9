"""`omnilaunch completion bash|zsh`: print the completion script of a shell; and the candidates that both scripts ask for.

The scripts call `omnilaunch --complete WORD ... LAST` on every Tab. Nothing is composed for it: names come from the files of conf/, keys
from the schema, run ids from runs/.
"""

import argparse
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from launcher.commands.plan import conf_named
from launcher.errors import ConfigRefused, suggest
from trainer.contract import Exit

SHELLS = ("bash", "zsh")
RUN_KEYS = ("stage.checkpoint", "run.evaluation.base")
OPTION = re.compile(r"^ +(?:-\w(?: [A-Z]+)?, )?(--[a-z][a-z-]*)", re.MULTILINE)  # in the text of --help
MakeParser = Callable[[str], tuple[argparse.ArgumentParser, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="bash|zsh", help="to enable it: source <(omnilaunch completion bash), in ~/.bashrc or ~/.zshrc")


def run(arguments: argparse.Namespace) -> int:
    if arguments.shell not in SHELLS:
        raise ConfigRefused(f"unknown shell {arguments.shell!r}; {suggest(arguments.shell, SHELLS)}")
    print(Path(__file__).with_name(f"completion.{arguments.shell}").read_text(encoding="utf-8"), end="")
    return Exit.OK


def complete(words: Sequence[str], verbs: Iterable[str], make_parser: MakeParser) -> list[str]:
    """The candidates for the last of `words`, which is the beginning of a word or ''. A candidate that ends with = or . is not complete."""
    *typed, current = words or [""]
    if typed and typed[-1] == "--conf":
        return []  # the shell completes folders
    names = [*verbs]
    candidates = (
        [*names, "--help", "--version"] if not typed else names if typed == ["help"] else complete_verb(typed, current, make_parser)
    )
    return sorted({word for word in candidates if word.startswith(current)})


def complete_verb(typed: Sequence[str], current: str, make_parser: MakeParser) -> list[str]:
    verb, *rest = typed
    parser, module = make_parser(verb)
    actions = getattr(module, "ACTIONS", {})
    if actions and not rest:
        return [*actions, "--help"]
    text = read_help(parser, rest[:1] if actions else [])
    if current.startswith("-"):
        return OPTION.findall(text)
    found = [*getattr(module, "OPTIONS", {})] if not rest else []  # the actions of `runs`, in place of a filter
    if re.search(r"\bRUN\b", text) and (verb != "runs" or rest[:1] in (["tag"], ["prune"])):
        found += list_runs()
    values = list_values(typed)
    if verb == "model" and "MODEL" in text:
        found += values["model"]
    if verb == "options":
        found += complete_key(current, values) if not rest else complete_override(current, values)
    elif verb == "completion":
        found += SHELLS
    elif verb in ("bench", "bench-rerun") and not rest:
        found += values["experiment"]
    elif "KEY=VALUE" in text or verb.startswith("bench"):
        found += complete_override(current, values)
    return found


def read_help(parser: argparse.ArgumentParser, action: Sequence[str]) -> str:
    """Of the verb, or of one of its actions: the only public way to what argparse knows of an action's arguments."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        parser.parse_known_args([*action, "--help"])
    return text.getvalue()


def complete_key(current: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """A key by its next part, without a value: `run.st` -> run.steps; and the axes."""
    found = complete_override(current, values)
    return found if "=" in current else [*(word.rstrip("=") for word in found), *values]


def complete_override(current: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """AXIS=NAME, or the next part of a key: `run.st` -> run.steps=, `stage.` -> stage.optimizer. and the rest."""
    key, equals, _ = current.partition("=")
    if equals:
        names = list_runs() if key in RUN_KEYS else values.get(key, ())
        return [f"{key}={name}" for name in names]
    from launcher.config.key import list_settings

    start = key.rpartition(".")[0]
    depth = start.count(".") + 2 if start else 1
    parts = [dotted.split(".") for dotted in list_settings() if dotted.startswith(f"{start}." if start else "")]
    keys = [f"{'.'.join(part[:depth])}{'=' if len(part) <= depth else '.'}" for part in parts]
    return [*keys, *(f"{axis}=" for axis in values)] if not start else keys


def list_values(typed: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of the project, and of the folder that `--conf DIR` or the environment names."""
    places = [place for place, word in enumerate(typed) if word == "--conf"]
    option = typed[places[-1] + 1] if places and places[-1] + 1 < len(typed) else ""
    option = option or next((word.partition("=")[2] for word in typed if word.startswith("--conf=")), "")
    return conf_named(option).list_groups()


def list_runs() -> list[str]:
    from launcher.record.run_name import LAST, list_folders

    found = list_folders(Path.cwd() / "runs")
    return [*found, LAST] if found else []
