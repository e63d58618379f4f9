"""`omnilaunch compare`: whether runs are the same, bitwise or within a stated band, and where they diverge."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigRefused, suggest
from launcher.record.run_name import find_run
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.schema import Bands
    from launcher.record.run_files import RunFiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the reference, then the runs to compare with it")
    add_limits(parser)
    parser.add_argument("--weights", action="store_true", help="read the last checkpoints again, however large they are")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """What may differ between runs that are compared."""
    band = "loss, throughput, memory or evaluation, such as loss=0.01 for 1 %%; overrides run.bands of the reference"
    parser.add_argument("--band", action="append", default=[], metavar="NAME=SHARE", help=band)
    allow = "what may differ: hardware, image, code, data, or a pattern of keys"
    parser.add_argument("--allow", action="append", default=[], metavar="WHAT", help=allow)
    parser.add_argument("--unlike", action="store_true", help="compare runs of different experiments")


def run(arguments: argparse.Namespace) -> int:
    from launcher.record.comparison import Outcome, comparison_json, describe_comparison
    from launcher.record.verdict import compare

    reference, *others = read_runs(arguments.runs, at_least=2, every_weight=arguments.weights)
    allow = tuple(arguments.allow)
    refuse_unknown(allow, (reference, *others))
    comparison = compare(reference, others, bands=read_bands(arguments.band, reference), allow=allow, unlike=arguments.unlike)
    arguments.say(comparison_json(comparison) if arguments.json else describe_comparison(comparison))
    return Exit.DIFFERENT if comparison.outcome is Outcome.DIFFERENT else Exit.OK


def read_runs(names: Sequence[str], *, at_least: int = 1, every_weight: bool = False) -> "list[RunFiles]":
    """Raises ConfigRefused for an unknown run, and for one that is named twice."""
    from launcher.record.run_files import read_run_files

    folders = [find_run(name, Path.cwd() / "runs") for name in names]
    twice = next((name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigRefused(f"run {twice} is named twice: name different runs")
    if len(folders) < at_least:
        raise ConfigRefused(f"name at least {at_least} runs: omnilaunch compare {names[0]} RUN. To list them: omnilaunch runs")
    return [read_run_files(folder, every_weight=every_weight) for folder in folders]


def read_bands(words: Sequence[str], reference: "RunFiles") -> "Bands":
    """The bands of the reference's config, with those of the command line in their place."""
    from dataclasses import asdict

    from launcher.config.schema import Bands
    from launcher.record.run_files import bands_of

    values = asdict(bands_of(reference))
    for word in words:
        name, _, text = word.partition("=")
        if name not in values:
            raise ConfigRefused(f"--band {word}: unknown name {name!r}; {suggest(name, values)}")
        values[name] = read_share(text, f"--band {word}")
    return Bands(**values)


def read_share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ConfigRefused(f"{where}: {text!r} is not a share; write 0.05 for 5 %")
    return share


def refuse_unknown(allow: Sequence[str], runs: "Sequence[RunFiles]") -> None:
    """Raises ConfigRefused for a --allow that matches no fact of any run: a typing error would allow nothing without being noticed."""
    from launcher.record.comparable import ALLOWANCES, collect_comparables, matches

    keys = {key for evidence in runs for key in collect_comparables(evidence)} if allow else set()
    for word in allow:
        if word not in ALLOWANCES and not any(matches(key, (word,)) for key in keys):
            raise ConfigRefused(
                f"--allow {word}: these runs have no such fact; {suggest(word, ALLOWANCES)}, and patterns of the keys that --json prints"
            )
