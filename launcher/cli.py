"""The program `omnilaunch`: the table of its verbs, the parser of one verb, and the one place that catches errors."""

import argparse
import gc
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import ConfigRefused, LaunchError, suggest
from trainer.contract import Exit


class Verb(NamedTuple):
    """A row of the help. `module` is below launcher.commands, has add_arguments(parser) and run(arguments), and is imported when called."""

    group: str
    help: str
    module: str
    examples: tuple[str, str]


GROUPS = {
    "prepare": "Prepare a run",
    "run": "Start, stop and resume runs",
    "look": "Look at runs",
    "reproduce": "Reproduce and measure",
    "shell": "Shell",
}
LORA = "hardware=h200 model=qwen2_5_vl_7b stage=lora"
IMAGES = ("build hardware=h200 cluster.delivery.accept_licence=true", "fetch hardware=cpu --to wheelhouse/")
WEIGHTS = ("fetch qwen2_5_vl_7b --to /models/qwen", "check /models/qwen")
DATA = ("check data=files data.train=train.json data.images=images/", "check data=digits --out problems.jsonl")
VERBS = {
    "options": Verb("prepare", "list the values of each axis", "options", ("", "hardware")),
    "data": Verb("prepare", "check every row and every image of the data", "data", DATA),
    "model": Verb("prepare", "download, check and list the weights of models", "model", WEIGHTS),
    "image": Verb("prepare", "build, inspect and list the container images", "image", IMAGES),
    "doctor": Verb(
        "prepare", "check the nodes of a cluster, or this machine", "doctor", ("cluster=example", "cluster=example hardware=h200 --json")
    ),
    "plan": Verb("prepare", "show what a run would do, without starting it", "plan", (LORA, "run.steps=100 --json")),
    "launch": Verb("run", "start a run", "launch", (f"{LORA} cluster=example", "cluster=example --detach --run-id monday")),
    "attach": Verb("run", "supervise a run that is already running", "live.attach", ("last", "20261121-0245")),
    "stop": Verb("run", "stop a run on all its nodes, after it has saved", "live.stop", ("last", "monday")),
    "render": Verb("run", "write a run as scripts, for nodes without SSH", "render", (f"{LORA} --to monday/", "last --to monday/")),
    "status": Verb("look", "show the state of a run", "live.status", ("last", "monday")),
    "logs": Verb("look", "print the output of all ranks of a run", "live.logs", ("last", "-f monday")),
    "runs": Verb("look", "list the runs of this folder; tag and remove runs", "runs", ("stage=lora --status finished", "prune --keep 10")),
    "compare": Verb("look", "compare runs, and show where they diverge", "compare", ("monday last", "monday last --band loss=0.01")),
    "report": Verb("look", "write a report of one or several runs", "report", ("last", "monday tuesday --markdown --out -")),
    "fit-report": Verb("look", "compare planned memory with measured memory", "fit_report", ("", "last --markdown")),
    "rerun": Verb("reproduce", "run a recorded run again", "rerun", ("last", "monday hardware=h200 cluster=example")),
    "bench": Verb("reproduce", "run a benchmark and publish its result", "bench", ("", "cpu_tiny_llava_full cluster=local")),
    "bench-rerun": Verb(
        "reproduce", "check that a published result reproduces", "bench_rerun", ("cpu_tiny_llava_full", "last --repeats 5")
    ),
    "completion": Verb("shell", "print the completion script of bash or zsh", "completion", ("bash", "zsh")),
}
COMPLETE = "--complete"  # hidden; the completion scripts call it
AXES = "hardware, model, stage, precision, strategy, data, cluster"
HELP = f"""
KEY=VALUE is an axis (hardware=h200) or a setting (run.steps=100). Axes: {AXES}.
RUN is a run id, the beginning of one that no other id has, `last` for the newest run, or the path of a run's folder.

Exit codes: 0 done, 2 refused, 3 image, 4 node, 5 run failed, 7 different or not reproduced, 130 stopped, 1 a bug in omnilaunch.
omnilaunch VERB --help shows the options of a verb and two examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Errors are caught here and nowhere else: a refusal prints its text, a bug its traceback."""
    gc.disable()  # a plan is imports and small objects that all stay: the collector would take an eighth of its time
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == [COMPLETE]:
            return print_completions(words[1:])
        if words[:1] in (["-h"], ["--help"]):
            print(help_text())
            return int(Exit.OK)
        arguments = parse(words)
        return int(arguments.verb(arguments))
    except LaunchError as error:
        print(f"\nomnilaunch: {error}", file=sys.stderr)
        return int(error.exit_code)
    except PermissionError as error:  # usually the run of another user
        print(
            f"\nomnilaunch: {error.filename}: {error.strerror}. Run the command as the owner of the file, or change its permissions",
            file=sys.stderr,
        )
        return int(Exit.USAGE)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `omnilaunch plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)


def help_text() -> str:
    lines = ["usage: omnilaunch VERB [KEY=VALUE ...] [options]", "", "Fine-tune multimodal models on the accelerators you have."]
    for group, title in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:12} {verb.help}" for name, verb in VERBS.items() if verb.group == group)]
    return "\n".join((*lines, HELP)).rstrip()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one verb: `verb` is the function to call with them. Raises ConfigRefused for an unknown verb or action."""
    name, rest = (words[0], words[1:]) if words else ("", ())
    if name not in VERBS:
        raise ConfigRefused(f"{f'unknown verb {name!r}' if name else 'no verb'}; {suggest(name, VERBS)}. See: omnilaunch --help")
    parser, module = make_parser(name)
    actions = getattr(module, "ACTIONS", {})
    if actions and rest and not rest[0].startswith("-") and rest[0] not in actions:
        raise ConfigRefused(f"unknown action {rest[0]!r} of {name}; {suggest(rest[0], actions)}. See: omnilaunch {name} --help")
    arguments, unparsed = parser.parse_known_args(rest)
    take_overrides(arguments, unparsed, getattr(arguments, "parser", parser))
    return arguments


def make_parser(name: str) -> tuple[argparse.ArgumentParser, Any]:
    """The parser of a verb, and its module."""
    verb = VERBS[name]
    examples = "\n".join(f"  omnilaunch {name} {words}".rstrip() for words in verb.examples)
    parser = argparse.ArgumentParser(
        prog=f"omnilaunch {name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module = import_module(f"launcher.commands.{verb.module}")
    module.add_arguments(parser)
    parser.set_defaults(verb=module.run, say=Terminal().say)
    return parser, module


def take_overrides(arguments: argparse.Namespace, rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Add the KEY=VALUE that follow an option to those before it: argparse takes only the first group of them."""
    into = next((name for name in ("overrides", "words") if hasattr(arguments, name)), "")
    unknown = [word for word in rest if word.startswith("-") or "=" not in word] or ([] if into else list(rest))
    if unknown:
        hint = suggest(unknown[0].partition("=")[0], set(re.findall(r"--[a-z][a-z-]*", parser.format_help())))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{f'; {hint}' if unknown[0].startswith('-') else ''}")
    if into:
        setattr(arguments, into, [*getattr(arguments, into), *rest])


def print_completions(words: Sequence[str]) -> int:
    """One candidate a line for the last of `words`. The shell is in the middle of a line: nothing else is ever printed."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), suppress(Exception, SystemExit):
        from launcher.commands.completion import complete

        for candidate in complete(words, VERBS, make_parser):
            print(candidate)  # no line at all where there is none: then the shell completes file names
    return int(Exit.OK)


class Terminal:
    """Prints lines until the pipe or the window is closed. A run does not end because its output is no longer read."""

    def __init__(self) -> None:
        self.open = True

    def say(self, text: str) -> None:
        try:
            if self.open:
                print(text, flush=True)
        except OSError:
            self.open = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
