"""Defaults that depend on other values of the config: the length of a row on the model's context, steps on epochs, warm-up on steps.

A value that the user typed is never changed.
"""

import math
from collections.abc import Container, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.conf_folder import ConfFolder
from launcher.config.schema import Config
from launcher.errors import ConfigRefused

RATE = "stage.optimizer.lr"
LENGTH, STEPS, EPOCHS, WARMUP = "data.max_length", "run.steps", "run.epochs", "stage.optimizer.warmup"
SHORT_STEPS = 100  # a shorter run has less warm-up than a recipe says
WARMUP_SHARE = 5  # at most one of so many steps, in a short run


@dataclass(frozen=True, kw_only=True)
class RandomRate:
    """The usual learning rates for random weights, far above those of fine-tuning: peak rates of AdamW. `source`: where they are from. `default`:
    for models of up to `most_parameters`."""

    low: float
    high: float
    source: str
    default: float
    most_parameters: int


@cache
def load_random_rate() -> RandomRate:
    import yaml

    return RandomRate(**yaml.safe_load(Path(__file__).with_name("random_rate.yaml").read_text(encoding="utf-8")))


def keys_of(overrides: Iterable[str]) -> frozenset[str]:
    """The keys that were typed."""
    return frozenset(override.partition("=")[0] for override in overrides)


def without_keys(overrides: Iterable[str], keys: Container[str]) -> tuple[str, ...]:
    """The overrides of other keys."""
    return tuple(override for override in overrides if override.partition("=")[0] not in keys)


def settle(data: dict[str, Any], choices: Mapping[str, str | None], typed: Set[str], conf: ConfFolder) -> None:
    """Set what was left open in a composed config. Raises ConfigRefused for both run.steps and run.epochs."""
    choose_duration(data, typed)
    if LENGTH not in typed and not _sets_length(conf.find("experiment", str(choices.get("experiment")))):
        _settle_length(data, conf.find("data", str(choices.get("data"))))


def choose_duration(data: dict[str, Any], typed: Set[str]) -> None:
    """One of run.steps and run.epochs: the one that was typed. Raises ConfigRefused for both."""
    run = data.get("run")
    if not isinstance(run, dict) or run.get("epochs") is None:
        return
    if {STEPS, EPOCHS} <= typed:
        raise ConfigRefused(
            f"the config is refused: {STEPS} and {EPOCHS} are both given, and each is the length of the run: keep one of them"
        )
    if STEPS in typed:
        run["epochs"] = None


def _settle_length(data: dict[str, Any], file: Path) -> None:
    """At most the context of the model; and for the user's own rows that of conf/data, not that of a recipe for a built-in set."""
    section, model = data.get("data"), data.get("model")
    if not isinstance(section, dict) or not isinstance(model, dict):
        return
    own = _read(file).get("max_length") if not section.get("builtin") else None
    lengths = [length for length in (own or section.get("max_length"), model.get("context")) if isinstance(length, int) and length > 0]
    if len(lengths) == 2:
        section["max_length"] = min(lengths)


def settle_rate(data: dict[str, Any], choices: Mapping[str, str | None], typed: Set[str], conf: ConfFolder) -> None:
    """For a tiny model with random weights on the user's own rows, a learning rate that it learns with; that of a stage is for fine-tuning."""
    usual, stage, model, rows = load_random_rate(), *(_section(data, name) for name in ("stage", "model", "data"))
    optimizer, total = _section(stage, "optimizer"), _section(model, "parameters").get("total")
    files = (conf.find(group, str(choices.get(group))) for group in ("tune", "experiment"))
    given = RATE in typed or any("lr" in _section(_section(_read(file), "stage"), "optimizer") for file in files)
    starts_random = _section(model, "source").get("kind") == "random" and not stage.get("checkpoint")
    if given or rows.get("builtin") or stage.get("kind", "train") != "train" or not starts_random:
        return
    rate = optimizer.get("lr")
    if isinstance(total, int) and total <= usual.most_parameters and isinstance(rate, float) and 0 < rate < usual.low:
        optimizer["lr"] = usual.default


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def _sets_length(file: Path) -> bool:
    section = _read(file).get("data")
    return isinstance(section, dict) and "max_length" in section


def _read(file: Path) -> dict[str, Any]:
    from yaml import safe_load

    found = safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------- once the rows are counted


def count_steps(epochs: float, rows: int, global_batch: int) -> int:
    """Steps in which every row is used `epochs` times: rounded up, so the last step may use rows once more."""
    return max(1, math.ceil(epochs * rows / global_batch - 1e-9))  # 0.1 x 30 is 3.0000000000000004


def with_short_warmup(config: Config, typed: Set[str]) -> Config:
    """A warm-up that a recipe gives in steps, no longer than a fifth of a run of fewer than SHORT_STEPS. Shares fit any run."""
    optimizer, steps = config.stage.optimizer, config.run.steps
    most = max(1, steps // WARMUP_SHARE)
    if WARMUP in typed or not 1 <= steps < SHORT_STEPS or not most < optimizer.warmup < math.inf:
        return config
    return replace(config, stage=replace(config.stage, optimizer=replace(optimizer, warmup=float(most))))
