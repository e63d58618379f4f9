"""A pinned benchmark cell, conf/experiment/NAME.yaml: it states everything that its figures depend on, and the bands of a rerun.

    cell = load_cell("cpu_tiny_llava_full", ("cluster=lab",), conf)     # raises ConfigRefused with all that the cell lacks

Only where it runs can be chosen on the command line (`cluster=...`), so that two results of one name measure the same thing.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.chain import list_chains
from launcher.config.compose import compose_with_files, options
from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest

GROUP = "experiment"
LEAST_REPEATS = 5  # the median and the range of fewer say little
LEAST_STEPS = 20  # the first tenth of them does not count
NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,49}")  # it names a file and a tag, and run ids begin with it
# Keys of the cluster that decide what a run computes: they belong to the cell. The other ones only say where it runs.
COMPUTING = ("cluster.devices_per_node", "cluster.environment")


@dataclass(frozen=True, kw_only=True)
class Cell:
    name: str
    config: Config
    overrides: tuple[str, ...]
    files: tuple[str, ...] = ()  # as in Plan
    conf: str = ""


def list_cells(conf: Path | ConfFolder) -> tuple[str, ...]:
    chains = list_chains(conf)
    return tuple(name for name in options(conf)[GROUP] if name not in chains)


def load_cell(name: str, words: Sequence[str], conf: Path | ConfFolder) -> Cell:
    """`words`: overrides of the cluster. Raises ConfigRefused for an unknown cell, and for one that is not pinned, with all that it lacks."""
    if name not in (names := list_cells(conf)):
        known = f"{suggest(name, names)}. See: omnilaunch bench" if names else "there is none yet: see docs/bench.md"
        raise ConfigRefused(f"there is no experiment {name!r} in conf/{GROUP}: {known}")
    refuse_choices(words)
    overrides = (f"{GROUP}={name}", *words)
    folder = as_conf_folder(conf)
    config, files = compose_with_files(overrides, folder)
    lacks = [*([] if NAME.fullmatch(name) else ["its name: 1 to 50 of a-z, 0-9 and '_'"]), *find_lacks(config)]
    if lacks:
        lines = "\n".join(f"  {what}" for what in lacks)
        raise ConfigRefused(f"{folder.describe(GROUP, name)} is not a benchmark yet, and nothing was started. It must state:\n{lines}")
    used = tuple(map(folder.relative, files))
    return Cell(name=name, config=config, overrides=overrides, files=used, conf=str(folder.own or ""))


def refuse_choices(words: Sequence[str], computing: Sequence[str] = COMPUTING) -> None:
    for word in words:
        key = word.partition("=")[0]
        fixed = any(key == own or key.startswith(f"{own}.") for own in computing)
        if fixed or key.partition(".")[0] != "cluster":
            raise ConfigRefused(
                f"{word}: a pinned cell cannot be changed; only where it runs can be chosen: cluster=NAME, cluster.root=FOLDER, "
                f"cluster.delivery.... For another cell copy its file in conf/{GROUP}; for a run of your own: omnilaunch launch {GROUP}=NAME {word}"
            )


def find_lacks(config: Config) -> Iterator[str]:
    """What a cell must state and this one does not, as `key: what is allowed`."""
    run, strategy, source = config.run, config.strategy, config.model.source
    if run.epochs is not None:
        yield f"run.steps: in place of run.epochs={run.epochs:g}, which depends on the data"
    if run.repeats < LEAST_REPEATS:
        yield f"run.repeats: {run.repeats}, at least {LEAST_REPEATS}: fewer do not show how much the figures vary"
    names = ["loss", "throughput", "memory", *(["evaluation"] if run.evaluation.enabled else [])]
    if missing := [f"run.bands.{name}" for name in names if getattr(run.bands, name) is None]:
        yield f"{', '.join(missing)}: how far the figures of a rerun may differ, stated before the first run"
    if run.steps < LEAST_STEPS:
        yield f"run.steps: {run.steps}, at least {LEAST_STEPS}: the first tenth of them does not count"
    if config.stage.kind != "train":
        yield f"a stage that trains; {config.stage.name} makes no steps"
    if config.hardware.threads <= 0:
        yield "hardware.threads: a number of CPU threads for each rank; with 0, torch chooses it by the machine"
    if strategy.name == "auto":
        yield "strategy (auto chooses by the machine)"
    yield from (f"strategy.{key}" for key in ("micro_batch", "gradient_checkpointing") if getattr(strategy, key) is None)
    if not config.data.builtin:
        yield f"data: a built-in set; the files of data={config.data.name} exist on one machine only"
    if config.stage.checkpoint:
        yield "stage.checkpoint: '', since a run exists on one machine only"
    if source.kind in ("path", "modelscope"):
        yield "model.source: random, or a model of the hub with its revision"
    if source.kind == "hub" and not source.revision:
        yield f"model.source.revision: which commit of {source.id}; or model.source.kind=random"
    yield from (f"run.{key}: {value}" for key, value in (("restarts", 0), ("force", "''")) if getattr(run, key))
    if run.profile.steps:
        yield "run.profile.steps: 0, since a trace makes the steps slower"
