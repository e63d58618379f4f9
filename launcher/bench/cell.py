"""A pinned benchmark cell, conf/experiment/NAME.yaml: everything that its figures depend on, and the bands, stated before anything runs.

    cell = load_cell("cpu_tiny_llava_full", ("cluster=lab",), conf)     # raises ConfigRefused with all that the cell lacks

Where it runs is chosen beside it (`cluster=...`); nothing else can be, so that two results of one name are of one thing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.chain import list_chains
from launcher.config.compose import compose, options
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest

GROUP = "experiment"
LEAST_REPEATS = 5  # median and range of fewer say little
LEAST_STEPS = 20  # of which the first tenth does not count
NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,49}")  # a file, a tag, and the beginning of run ids
# Of the cluster what a run computes with, and so the cell's own; all else of it says only where.
COMPUTING = ("cluster.devices_per_node", "cluster.environment")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`overrides`: the words that compose it."""

    name: str
    config: Config
    overrides: tuple[str, ...]


def list_cells(conf: Path) -> tuple[str, ...]:
    chains = list_chains(conf)
    return tuple(name for name in options(conf)[GROUP] if name not in chains)


def load_cell(name: str, words: Sequence[str], conf: Path) -> Cell:
    """`words`: overrides of the cluster. Raises ConfigRefused for a cell that there is not or that is not pinned, saying what it lacks."""
    if name not in (names := list_cells(conf)):
        there = f"{suggest(name, names)}; omnilaunch bench lists them" if names else "there is none yet: see docs/bench.md"
        raise ConfigRefused(f"there is no experiment {name!r} in {conf.name}/{GROUP}: {there}")
    refuse_choices(words)
    overrides = (f"{GROUP}={name}", *words)
    config = compose(overrides, conf)
    lacks = [what for rule in RULES if (what := rule(config))]
    if not NAME.fullmatch(name):
        lacks.insert(0, "its name: 1 to 50 of a-z, 0-9 and '_'")
    if lacks:
        told = "\n".join(f"  {what}" for what in lacks)
        raise ConfigRefused(f"{conf.name}/{GROUP}/{name}.yaml is no benchmark yet, and nothing was started. It must state:\n{told}")
    return Cell(name=name, config=config, overrides=overrides)


def refuse_choices(words: Sequence[str], computing: Sequence[str] = COMPUTING) -> None:
    for word in words:
        key = word.partition("=")[0]
        fixed = any(key == own or key.startswith(f"{own}.") for own in computing)
        if fixed or key.partition(".")[0] != "cluster":
            raise ConfigRefused(
                f"{word}: a pinned cell is measured as it stands; only where it runs can be chosen: cluster=NAME, cluster.root=FOLDER, "
                f"cluster.delivery.... For another cell copy its file in conf/{GROUP}; for a run of your own: omnilaunch launch {GROUP}=NAME {word}"
            )


# ------------------------------------------------------------------------------------------------------------------ rules


def repeats_are_enough(config: Config) -> str:
    repeats = config.run.repeats
    return "" if repeats >= LEAST_REPEATS else f"run.repeats: {repeats}, at least {LEAST_REPEATS}: of fewer, nobody knows the spread"


def bands_are_stated(config: Config) -> str:
    bands = config.run.bands
    names = ["loss", "throughput", "memory", *(["evaluation"] if config.run.evaluation.enabled else [])]
    missing = [name for name in names if getattr(bands, name) is None]
    return f"run.bands.{', run.bands.'.join(missing)}: before it runs, how far a rerun may lie" if missing else ""


def steps_are_enough(config: Config) -> str:
    return (
        "" if config.run.steps >= LEAST_STEPS else f"run.steps: {config.run.steps}, at least {LEAST_STEPS}: the first tenth does not count"
    )


def it_trains(config: Config) -> str:
    return "" if config.stage.kind == "train" else f"a stage that trains; {config.stage.name} makes no steps"


def threads_are_pinned(config: Config) -> str:
    return (
        ""
        if config.hardware.threads > 0
        else "hardware.threads: a number of CPU threads of each rank; 0 is what torch makes of the machine"
    )


def strategy_is_pinned(config: Config) -> str:
    strategy = config.strategy
    open_keys = ["strategy (auto chooses by the machine)"] if strategy.name == "auto" else []
    open_keys += [f"strategy.{key}" for key in ("micro_batch", "gradient_checkpointing") if getattr(strategy, key) is None]
    return ", ".join(open_keys)


def nothing_is_of_one_machine(config: Config) -> str:
    """What others do not have, or have otherwise."""
    source = config.model.source
    found = [] if config.data.builtin else [f"data: a built-in set; the files of data={config.data.name} are of one machine"]
    found += ["stage.checkpoint: '', a run of one machine"] if config.stage.checkpoint else []
    found += ["model.source: random, or a hub's id with its revision"] if source.kind == "path" else []
    found += (
        [f"model.source.revision: which commit of {source.id}; or model.source.kind=random"]
        if source.kind == "hub" and not source.revision
        else []
    )
    return "\n  ".join(found)


def nothing_disturbs(config: Config) -> str:
    run = config.run
    wrong = [f"run.{key}: {value}" for key, value in (("restarts", 0), ("force", "''")) if getattr(run, key)]
    return ", ".join([*wrong, *(["run.profile.steps: 0, a trace costs speed"] if run.profile.steps else [])])


RULES: tuple[Callable[[Config], str], ...] = (
    repeats_are_enough,
    bands_are_stated,
    steps_are_enough,
    it_trains,
    threads_are_pinned,
    strategy_is_pinned,
    nothing_is_of_one_machine,
    nothing_disturbs,
)
