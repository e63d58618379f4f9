"""The program `omnilaunch`: the table of its verbs, the parser of one verb, and the one place that catches errors."""

import argparse
import errno
import gc
import os
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr, suppress
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import ConfigRefused, LaunchError, find_near, suggest
from launcher.redact import show
from trainer.contract import Exit


class Verb(NamedTuple):
    """A row of the help. `module` is below launcher.commands, has add_arguments(parser) and run(arguments), and is imported when called."""

    group: str
    help: str
    module: str
    examples: tuple[str, ...]


GROUPS = {
    "prepare": "Prepare a run",
    "run": "Start, stop and resume runs",
    "look": "Look at runs",
    "reproduce": "Reproduce and measure",
    "shell": "Shell",
}
LORA = "hardware=h200 model=qwen2_5_vl_7b stage=lora"
IMAGES = ("build hardware=h200", "fetch hardware=cpu --to wheelhouse/")
WEIGHTS = ("fetch qwen2_5_vl_7b --to /models/qwen", "check /models/qwen")
DATA = ("check data=files data.train=train.json data.images=images/", "fetch rows.jsonl --to with_images/")
VERBS = {
    "options": Verb("prepare", "list the values of each axis; explain and search keys", "options", ("hardware", "--search batch")),
    "data": Verb("prepare", "check every row and every image of the data; fetch images by URL", "data", DATA),
    "model": Verb("prepare", "download, check and list the weights of models", "model", WEIGHTS),
    "image": Verb("prepare", "build, inspect and list the container images", "image", IMAGES),
    "licence": Verb("prepare", "show and accept the licences of software inside the images", "licence", ("show cann", "accept cann")),
    "doctor": Verb(
        "prepare",
        "check the nodes of a cluster, or this machine",
        "doctor",
        ("cluster=YOURS", "cluster=YOURS hardware=h200 --json", "data data=digits"),
    ),
    "plan": Verb("prepare", "show what a run would do, without starting it", "plan", (LORA, "run.steps=100 --json")),
    "launch": Verb("run", "start a run, or resume one", "launch", (f"{LORA} cluster=YOURS --run-id monday", "--resume monday")),
    "attach": Verb("run", "supervise a run that is already running", "live.attach", ("last", "20261121-0245")),
    "stop": Verb("run", "stop a run on all its nodes, after it has saved", "live.stop", ("last", "monday")),
    "render": Verb("run", "write a run as scripts, for nodes without SSH", "render", (f"{LORA} --to monday/", "last --to monday/")),
    "status": Verb("look", "show the state of a run", "live.status", ("last", "monday")),
    "logs": Verb("look", "print the output of all ranks of a run", "live.logs", ("last", "-f monday")),
    "explain": Verb(
        "look", "explain a log: the known failure in it, and what to do", "live.explain", ("runs/monday/logs/node0.log", "- --json")
    ),
    "runs": Verb("look", "list the runs of this folder; tag and remove runs", "runs", ("stage=lora --status finished", "prune --keep 10")),
    "compare": Verb("look", "compare runs, and show where they diverge", "compare", ("monday last", "monday last --band loss=0.01")),
    "report": Verb("look", "write a report of one or several runs", "report", ("last", "monday tuesday --markdown --out -")),
    "fit-report": Verb("look", "compare planned memory with measured memory", "fit_report", ("", "last --markdown")),
    "rerun": Verb("reproduce", "run a recorded run again", "rerun", ("last", "monday hardware=h200 cluster=YOURS")),
    "bench": Verb("reproduce", "run a benchmark and publish its result", "bench", ("", "cpu_tiny_llava_full cluster=local")),
    "bench-rerun": Verb(
        "reproduce", "check that a published result reproduces", "bench_rerun", ("cpu_tiny_llava_full", "last --repeats 5")
    ),
    "completion": Verb("shell", "print the completion script of bash or zsh", "completion", ("bash", "zsh")),
}
NEGATIVE = re.compile(r"-\.?\d[\d.e+-]*")  # the value of an option, and no option
COMPLETE = "--complete"  # hidden; the completion scripts call it
# Without a module: the verbs that look at no project, no folder and no node.
SIMPLE = {"help": "show the help of a verb: omnilaunch help launch", "version": "print the version"}
KEEPING_CODE = ("run", "reproduce")  # groups whose verbs have started something: their exit code says how that ended
AXES = "hardware, model, stage, precision, strategy, data, cluster"
HELP = f"""
KEY=VALUE is an axis (hardware=h200) or a setting (run.steps=100). Axes: {AXES}.
RUN is a run id, the beginning of one that no other id has, `last` for the newest run, or the path of a run's folder.

Exit codes: 0 done, 2 refused, 3 image, 4 node, 5 run failed, 7 different or not reproduced or known, 130 stopped, 1 a bug in omnilaunch.
omnilaunch VERB --help shows the options of a verb and two examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Errors are caught here and nowhere else: a refusal prints its text, a bug its traceback."""
    gc.disable()  # a plan is imports and small objects that all stay: the collector would take an eighth of its time
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == [COMPLETE]:
            return print_completions(words[1:])
        code = run_verb(words)
        sys.stdout.flush()  # what cannot be written is found now, and not by the interpreter at its end
        return code
    except LaunchError as error:
        show(f"\nomnilaunch: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return explain(error)


def run_verb(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        print(help_text())
        return int(Exit.OK)
    if words[0] in ("version", "--version"):
        print(version_text())
        return int(Exit.OK)
    if words[0] == "help":
        words = (*words[1:], "--help")
    try:
        arguments = parse(words)
    except SystemExit:
        sys.stdout.flush()  # the help of a verb
        raise
    code, terminal = int(arguments.verb(arguments)), getattr(arguments, "terminal", None)
    if terminal is not None and terminal.error is not None and VERBS[words[0]].group not in KEEPING_CODE:
        raise terminal.error
    return code


def explain(error: OSError) -> int:
    """Print what the system refused, and return the exit code. Raises the error again where it is no refusal that a user can fix."""
    if isinstance(error, BrokenPipeError):  # `omnilaunch plan | head`
        close_output()
        return int(Exit.OK)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        close_output()
        where = error.filename or "the output could not be written"
        text = f"{where}: {error.strerror}. Free disk space there, and run the command again"
    elif isinstance(error, PermissionError):  # usually the run of another user
        text = f"{error.filename}: {error.strerror}. Run the command as the owner of the file, or change its permissions"
    elif isinstance(error, FileNotFoundError) and is_folder_gone():
        text = "the working directory was deleted. Change to another one, and run the command again: cd .. or cd ~"
    else:
        raise error
    with suppress(OSError):  # a full disk
        show(f"\nomnilaunch: {text}", file=sys.stderr)
    return int(Exit.USAGE)


def is_folder_gone() -> bool:
    try:
        return not Path.cwd()
    except FileNotFoundError:
        return True


def close_output() -> None:
    """Nothing more is written: the interpreter would try it again at its end, and fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    lines = ["usage: omnilaunch VERB [KEY=VALUE ...] [options]", "", "Fine-tune multimodal models on the accelerators you have."]
    for group, title in GROUPS.items():
        verbs = [(name, verb.help) for name, verb in VERBS.items() if verb.group == group]
        verbs += SIMPLE.items() if group == "shell" else ()
        lines += ["", f"{title}:", *(f"  {name:12} {text}" for name, text in verbs)]
    return "\n".join((*lines, HELP)).rstrip()


def version_text() -> str:
    """`omnilaunch 0.1.0, commit 3774a110, Python 3.11.7`; without the commit where the folder is not a git tree."""
    import platform
    import tomllib

    from launcher.record.source import read_source

    project = Path(__file__).resolve().parents[1]
    version = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    state = read_source(project).state
    commit = f", commit {state.commit[:12]}{' with changes' if state.dirty else ''}" if state.commit else ""
    return f"omnilaunch {version}{commit}, Python {platform.python_version()}"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one verb: `verb` is the function to call with them. Names and KEY=VALUE may stand before, between and after options.
    Raises ConfigRefused for an unknown verb or action."""
    name, *rest = words
    if name not in VERBS:
        raise ConfigRefused(f"{explain_verb(name)}. See: omnilaunch --help")
    parser, module = make_parser(name)
    actions, into = getattr(module, "ACTIONS", {}), argparse.Namespace()
    if actions and rest and not rest[0].startswith("-"):
        if rest[0] not in actions:
            raise ConfigRefused(f"unknown action {rest[0]!r} of {name}; {suggest(rest[0], actions)}. See: omnilaunch {name} --help")
        into = argparse.Namespace(**{key: parser.get_default(key) for key in ("verb", "say", "terminal")})
        parser, rest = parser_of_action(parser, rest[0]), rest[1:]
    if {"-h", "--help"} & {*rest}:
        print(parser.format_help(), end="")  # argparse passes over a help that cannot be written
        raise SystemExit(int(Exit.OK))
    if actions and parser.prog == f"omnilaunch {name}":
        return parser.parse_args(rest)  # ends the program where the verb does nothing without an action
    given = argparse.Namespace(**vars(into))
    arguments, unknown = parser.parse_known_intermixed_args(rest, into)
    if unknown and hasattr(arguments, "overrides") and (foreign := find_foreign(rest, unknown, own_options(parser))):
        arguments, unknown = parser.parse_known_intermixed_args(remove(rest, [word for option in foreign for word in option]), given)
        arguments.overrides += map(" ".join, foreign)  # composing explains them, together with all others
    if unknown:
        refuse_unknown(unknown, parser)
    return arguments


def parser_of_action(parser: argparse.ArgumentParser, action: str) -> argparse.ArgumentParser:
    """The parser of `omnilaunch image build`, from that of `omnilaunch image`."""
    choices = next(each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    found: argparse.ArgumentParser = choices[action]
    return found


def own_options(parser: argparse.ArgumentParser) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))


def find_foreign(words: Sequence[str], unparsed: Sequence[str], own: Collection[str]) -> list[list[str]]:
    """The options of other tools among `words`, each with its values: `--learning_rate 1e-4`. Where there is one, options of which nothing is
    known are listed with it: they must not hide its answer. `unparsed`: what the parser did not take; `own`: the options of the verb, of
    which a word may be a typing error."""
    options = {word: word.lstrip("-").partition("=")[0] for word in unparsed if re.match(r"--\w", word)}
    if not options:
        return []
    from launcher.config.key import is_about_known, is_known_elsewhere

    known = {word for word, name in options.items() if is_known_elsewhere(name)}
    other = {word for word in {*options} - known if not find_near(word.partition("=")[0], own)}
    if not known and not any(is_about_known(options[word]) for word in other):
        return []
    found = []
    for place, word in enumerate(words):
        if word in known | other:
            values = takewhile(lambda text: (text[:1] != "-" or NEGATIVE.fullmatch(text)) and "=" not in text, words[place + 1 :])
            found.append([word, *(values if "=" not in word else ())])
    return found


def remove(words: Sequence[str], removed: Sequence[str]) -> list[str]:
    """`words` without one of each of `removed`."""
    left = list(removed)
    return [word for word in words if word not in left or left.remove(word)]  # type: ignore[func-returns-value]


def explain_verb(name: str) -> str:
    """What to write in place of a verb that does not exist."""
    from launcher.config.synonym import answer_verb

    if "=" in name and not name.startswith("-"):
        return f"unknown verb {name!r}: that is a setting, which follows a verb; write omnilaunch plan {name}"
    return f"unknown verb {name!r}; {answer_verb(name, VERBS) or suggest(name, (*VERBS, *SIMPLE))}"


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
    terminal = Terminal()
    parser.set_defaults(verb=module.run, say=terminal.say, terminal=terminal)
    return parser, module


def refuse_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Ends the program, as argparse does. An unknown option gets the nearest one."""
    option = next((word for word in unknown if word.startswith("-")), "")
    hint = suggest(option.partition("=")[0], own_options(parser)) if option else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{f'; {hint}' if hint else ''}")


def print_completions(words: Sequence[str]) -> int:
    """One candidate a line for the last of `words`. The shell is in the middle of a line: nothing else is ever printed."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), suppress(Exception, SystemExit):
        from launcher.commands.completion import complete

        for candidate in filter(str.isprintable, complete(words, (*VERBS, *SIMPLE), make_parser)):
            print(candidate)  # no line at all where there is none: then the shell completes file names
    return int(Exit.OK)


class Terminal:
    """Prints lines until the pipe or the window is closed, or the disk is full. A run does not end because its output is no longer read.
    Much of what verbs say was read from files that others wrote: it gives the terminal no commands. `error`: what ended the output."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def say(self, text: str) -> None:
        try:
            if self.error is None:
                show(text)
        except OSError as error:
            self.error = error
            close_output()


if __name__ == "__main__":
    sys.exit(main())
