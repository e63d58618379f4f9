"""`omnilaunch fit-report`: the memory that plans predicted, compared with what their runs measured."""

import argparse
from pathlib import Path

from trainer.contract import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="all runs of this folder when omitted")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    from launcher.record.memory_report import choose_folders, compare_runs, describe_comparisons

    comparisons, left_out = compare_runs(choose_folders(Path.cwd() / "runs", arguments.runs))
    arguments.say(describe_comparisons(comparisons, left_out, markdown=arguments.markdown))
    return Exit.OK
