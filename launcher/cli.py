"""omnilaunch: fine-tune multimodal models on the accelerators you have.

  omnilaunch plan   [AXIS=NAME ...] [key=value ...]   show what a run would do; nothing is touched
  omnilaunch launch [AXIS=NAME ...] [key=value ...]   carry it out
  omnilaunch render [AXIS=NAME ...] --to FOLDER       write it as scripts for nodes that no SSH reaches
  omnilaunch doctor [AXIS=NAME ...] [key=value ...]   what is wrong with the nodes
  omnilaunch data check [AXIS=NAME ...] [key=value ...]   what is wrong with the data
  omnilaunch options [AXIS]                           what can be chosen
  omnilaunch runs [KEY=VALUE ...]                     the runs of this folder; runs tag, runs prune: see runs --help
  omnilaunch compare RUN RUN ...                      whether they are the same, and where they part
  omnilaunch report RUN ...                           one page that stands by itself
  omnilaunch rerun RUN [key=value ...]                the run of a record once more
  omnilaunch bench NAME [cluster=...]                 a pinned cell of conf/experiment, measured and published
  omnilaunch bench-rerun RESULT                       a published result again: reproduced or not
  omnilaunch attach|stop|status|logs RUN              one of them, on whatever nodes it is
  omnilaunch fit-report [RUN ...]                     the memory that plans foretold against what their runs took
  omnilaunch image ACTION [AXIS=NAME ...]             render, refresh, build, ls, inspect, prune, fetch: see image --help

Axes: hardware, model, stage, precision, strategy, data, cluster. Exit codes: 0 done, 2 refused, 3 image, 4 node, 5 run failed,
7 compared and different, or not reproduced, 130 stopped, 1 a bug of ours.
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands import (
    bench as bench_action,
    data as data_action,
    image as image_action,
    live_run as run_action,
    records as record_action,
    rerun as rerun_action,
)
from launcher.errors import ConfigRefused, LaunchError
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.chain import Chain
    from launcher.plan.plan import Plan

PROJECT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """The one place that catches. A refusal prints its text; a bug prints its traceback."""
    gc.disable()  # a plan is imports and small objects that stay: collecting among them is an eighth of its time
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return int(arguments.verb(arguments))
    except LaunchError as error:
        print(f"\nomnilaunch: {error}", file=sys.stderr)
        return int(error.exit_code)
    except PermissionError as error:  # the run of another user, as a rule
        print(
            f"\nomnilaunch: {error.filename}: {error.strerror}. Do it as the user who owns it, or have the folder's rights changed",
            file=sys.stderr,
        )
        return int(Exit.USAGE)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `omnilaunch plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="omnilaunch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, verb, text in (("plan", show_plan, "show what a run would do"), ("launch", run_launch, "carry out a plan")):
        sub = verbs.add_parser(name, help=text, allow_abbrev=False)
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="an axis (hardware=h200) or a key (run.steps=100)")
        sub.add_argument("--run-id", default="", help="name of the run; made from the time when left out")
        if name == "launch":
            sub.add_argument(
                "--detach", action="store_true", help="leave when all ranks were started and the data was checked; the run goes on"
            )
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="the whole plan as JSON")
            sub.add_argument("--trace", action="store_true", help="judge by the memory of one step, traced; needs the trainer's packages")
        sub.set_defaults(verb=verb)
    sub = verbs.add_parser("render", help="write a run as a folder to carry to its nodes, where SSH is not allowed", allow_abbrev=False)
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for plan; or one run, by its id or folder")
    sub.add_argument("--to", required=True, metavar="FOLDER", help="new or empty")
    sub.add_argument("--run-id", default="", help="name of the run; made from the time when left out")
    sub.set_defaults(verb=render_run)
    sub = verbs.add_parser("doctor", help="what is wrong with the nodes of a cluster, or with this machine", allow_abbrev=False)
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for plan: cluster=lab hardware=h200")
    sub.add_argument("--json", action="store_true", help="all findings as JSON")
    sub.set_defaults(verb=show_doctor)
    sub = verbs.add_parser("options", help="what can be chosen")
    sub.add_argument("axis", nargs="?", default="")
    sub.set_defaults(verb=show_options)
    add_reports(verbs)
    run_action.add_to(verbs, Terminal().say)
    record_action.add_to(verbs, Terminal().say)
    rerun_action.add_to(verbs, Terminal().say)
    bench_action.add_to(verbs, Terminal().say)
    data_action.add_to(verbs.add_parser("data", help="what a run would train on", allow_abbrev=False), plan_of)
    image_action.add_to(verbs.add_parser("image", help="the one image that matches a hardware", allow_abbrev=False))
    arguments, rest = parser.parse_known_args(argv)
    take_words(arguments, rest, parser)
    return arguments


def take_words(arguments: argparse.Namespace, rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """KEY=VALUE after an option belongs to those before it: argparse takes the first row of them alone."""
    into = next((name for name in ("overrides", "words") if hasattr(arguments, name)), "")
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if rest and (strange or not into):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if into:
        setattr(arguments, into, [*getattr(arguments, into), *rest])


def add_reports(verbs: Any) -> None:
    """What is read from the records of this folder."""
    sub = verbs.add_parser("fit-report", help="the memory that plans foretold against what their runs took", allow_abbrev=False)
    sub.add_argument("runs", nargs="*", metavar="RUN", help="their ids; all runs of this folder when left out")
    sub.add_argument("--markdown", action="store_true", help="as a table of Markdown")
    sub.set_defaults(verb=show_fit_report)


def plan_of(overrides: Sequence[str], run_id: str, *, traced: bool = False) -> "Plan":
    """Compose and plan, with this machine as the place. `traced`: its memory is still to be held against a traced step."""
    from launcher.check.rules import RULES, RULES_BUT_MEMORY
    from launcher.config.compose import compose
    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import RUNS_FOLDER, absolute, make_plan
    from launcher.record.checkpoint_reference import resolve_base, resolve_checkpoint
    from launcher.record.record import name_run, utc_now, valid_run_id

    here = Path.cwd()
    config = compose(overrides, PROJECT / "conf")
    runs = (Path(absolute(config.cluster.root, here)) / RUNS_FOLDER, here / RUNS_FOLDER)
    config = resolve_base(resolve_checkpoint(config, *runs), *runs)
    run_id = valid_run_id(run_id or name_run(config, utc_now(), pid=os.getpid()))
    rules = RULES_BUT_MEMORY if traced else RULES
    return make_plan(config, load_stacks(PROJECT / "images"), local_context(PROJECT), run_id=run_id, overrides=tuple(overrides), rules=rules)


def show_plan(arguments: argparse.Namespace) -> int:
    from launcher.plan.description import describe_plan, plan_json

    if chained := chain_of(arguments):
        from launcher.commands.chain import show_chain

        return show_chain(*chained, PROJECT, Terminal().say)
    plan = plan_of(arguments.overrides, arguments.run_id, traced=arguments.trace)
    if arguments.trace:
        print(show_traced(plan, as_json=arguments.json))
    else:
        print(plan_json(plan) if arguments.json else describe_plan(plan))
    return Exit.OK


def show_traced(plan: "Plan", *, as_json: bool) -> str:
    """The plan whose memory and verdict go by a traced step, and the step; as JSON its key is `trace`."""
    import json
    from dataclasses import asdict

    from launcher.image.stack import load_stacks
    from launcher.plan.description import describe_plan
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import to_plain
    from launcher.plan.trace import describe_trace, go_by_trace, trace_plan

    report = trace_plan(plan, local_context(PROJECT), os.environ)
    plan = go_by_trace(plan, report, load_stacks(PROJECT / "images"))
    if as_json:
        return json.dumps(to_plain(plan) | {"trace": asdict(report)}, indent=2, ensure_ascii=False)
    return f"{describe_plan(plan)}\n\n== a step, traced\n{describe_trace(report, plan)}"


def chain_of(arguments: argparse.Namespace) -> "tuple[Chain, list[str], str] | None":
    """The chain that the words name, the words, and what its runs are named by."""
    from launcher.config.chain import find_chain
    from launcher.record.record import utc_now, valid_run_id

    chain = find_chain(arguments.overrides, PROJECT / "conf")
    if chain is None:
        return None
    if refused := [option for option in ("json", "trace", "detach") if getattr(arguments, option, False)]:
        raise ConfigRefused(f"--{refused[0]} is for one run, and experiment={chain.name} is a chain of {len(chain.steps)}")
    return chain, arguments.overrides, valid_run_id(arguments.run_id or f"{utc_now():%Y%m%d-%H%M%S}-{chain.name}")


def run_launch(arguments: argparse.Namespace) -> int:
    if chained := chain_of(arguments):
        from launcher.commands.chain import launch_chain

        return launch_chain(*chained, PROJECT, launch_one, Terminal().say)
    return launch_one(arguments.overrides, arguments.run_id, detach=arguments.detach)


def launch_one(overrides: Sequence[str], run_id: str, *, detach: bool = False) -> int:
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack

    from launcher.plan.description import describe_record
    from launcher.plan.local_context import local_context
    from launcher.record.source import read_source
    from launcher.run.launch import launch
    from launcher.run.session import open_examined

    plan = plan_of(overrides, run_id)
    if detach and plan.config.cluster.runtime != "docker":
        raise ConfigRefused(
            "--detach leaves containers behind that go on by themselves, and cluster.runtime=process has none: cluster.runtime=docker"
        )
    gc.enable()  # from here on it may be days
    say = Terminal().say
    if not plan.is_local:
        say(f"looking at {', '.join(node.host for node in plan.config.cluster.working)}")
    with ExitStack() as stack:
        source = stack.enter_context(ThreadPoolExecutor(1)).submit(read_source, PROJECT)  # git is through when the nodes are looked at
        opened = open_examined(plan, local_context(PROJECT), os.environ, say=say, terminal=sys.stdout.isatty())
        plan, desk = stack.enter_context(opened)
        record = launch(plan, source.result(), desk, detach=detach)
        say(describe_record(record, plan) if record else f"it goes on by itself; to take it up again: omnilaunch attach {plan.run_id}")
    return record.exit_code if record else Exit.OK


def render_run(arguments: argparse.Namespace) -> int:
    from launcher.record.record import PLAN_FILE, SOURCE_FILE, SourceState, read_if_there
    from launcher.record.source import read_source
    from launcher.run.offline.render import write_bundle

    words = arguments.overrides
    places = [path for path in (Path(words[0]), Path.cwd() / "runs" / words[0]) if (path / PLAN_FILE).is_file()] if len(words) == 1 else []
    plan = run_action.load_plan(places[0]) if places else plan_of(words, arguments.run_id)
    source = read_if_there(SourceState, places[0] / SOURCE_FILE) if places else None
    folder = write_bundle(plan, Path(arguments.to), project=PROJECT, source=source or read_source(PROJECT).state)
    print(f"run {plan.run_id} is in {folder}; README.txt there says what to do")
    return Exit.OK


def show_doctor(arguments: argparse.Namespace) -> int:
    from launcher.doctor.findings import describe_findings, findings_json, has_errors
    from launcher.image.stack import load_stacks
    from launcher.run.session import examine_nodes

    plan = plan_of(arguments.overrides, "")
    examination = examine_nodes(plan, load_stacks(PROJECT / "images")[plan.config.hardware.stack], os.environ, launching=False)
    print(findings_json(examination.findings) if arguments.json else describe_findings(examination.findings))
    return Exit.NODE if has_errors(examination.findings) else Exit.OK


class Terminal:
    """Says things until nobody listens any more: a run does not end because a pipe or a window did."""

    def __init__(self) -> None:
        self.open = True

    def say(self, text: str) -> None:
        try:
            if self.open:
                print(text, flush=True)
        except OSError:
            self.open = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_options(arguments: argparse.Namespace) -> int:
    from launcher.config.compose import options
    from launcher.errors import suggest

    axes = options(PROJECT / "conf")
    if arguments.axis and arguments.axis not in axes:
        raise ConfigRefused(f"unknown axis {arguments.axis!r}; {suggest(arguments.axis, axes)}")
    for axis, names in axes.items():
        if not arguments.axis or axis == arguments.axis:
            print(f"{axis:10} {'  '.join(names)}")
    return Exit.OK


def show_fit_report(arguments: argparse.Namespace) -> int:
    from launcher.record.memory_report import choose_folders, compare_runs, describe_comparisons

    comparisons, left_out = compare_runs(choose_folders(Path.cwd() / "runs", arguments.runs))
    print(describe_comparisons(comparisons, left_out, markdown=arguments.markdown))
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
