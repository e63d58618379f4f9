"""The evaluation of a training run, beside what training keeps on the device: its batch is lowered until it fits, or the run is refused."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

from launcher.check.change import Change, set_values
from launcher.check.problem import Problem, Rule
from launcher.check.strategy import Resolved, is_countable
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.estimate import answering_memory, estimate_memory
from launcher.memory.states import GIB
from trainer.contract.wording import plural

KEY = "run.evaluation.batch"
OFF = {"run.evaluation.enabled": False}


def evaluates(config: Config) -> bool:
    """Whether a training run evaluates, on a device whose memory is known, rows that it has."""
    has_rows = bool(config.data.builtin or config.data.evaluation)
    on_a_device = config.hardware.memory_gib is not None
    return config.stage.kind == "train" and config.run.evaluation.enabled and has_rows and on_a_device and is_countable(config)


def settle_evaluation(resolved: Resolved, typed: Set[str]) -> tuple[Resolved, str]:
    """The config with the largest batch of questions that fits, unless the user typed one; and what was set, '' for nothing."""
    config, batch = resolved.config, resolved.config.run.evaluation.batch
    if resolved.memory is None or KEY in typed or not evaluates(config) or not resolved.memory.fits or answering_memory(config).fits:
        return resolved, ""
    fitting = find_batch(config)
    if not fitting:
        return resolved, ""
    asked, taken = (set_values(each, {KEY: fitting}) for each in (resolved.asked, config))
    needed = answering_memory(config).total_bytes / GIB
    said = (
        f"{KEY}={fitting}: the most questions at a time whose evaluation fits beside the training; {batch} would take {needed:.1f} GiB of the "
        f"device's {config.hardware.memory_gib:g}"
    )
    return replace(resolved, asked=asked, config=taken), said


def find_batch(config: Config) -> int:
    """The largest batch of questions below the present one that fits; 0 if not even one question does. Memory grows with the batch."""
    low, high = 0, config.run.evaluation.batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits_with(config, {KEY: middle}) else (low, middle)
    return low


def fits_with(config: Config, values: Mapping[str, object]) -> bool:
    return answering_memory(set_values(config, values)).fits


def evaluation_fits(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Judged where the training itself fits."""
    if not evaluates(config) or not estimate_memory(config).fits or (memory := answering_memory(config)).fits:
        return
    limit = (memory.limit_bytes or 0) / GIB
    what = (
        f"the evaluation, beside what training keeps, takes {memory.total_bytes / GIB:.1f} GiB of the device's {limit:g}, of which "
        f"{memory.share:.0%} may be taken: {plural(config.run.evaluation.batch, 'question')} at a time, answers of up to "
        f"{config.run.evaluation.max_new_tokens:,} tokens{describe_one(config)}"
    )
    yield Problem(key=KEY, what=what, changes=tuple(list_fitting(config)), forcible=True)


def describe_one(config: Config) -> str:
    """Where not even one question fits; else ''."""
    one = answering_memory(set_values(config, {KEY: 1}))
    return "" if one.fits else f"; one at a time takes {one.total_bytes / GIB:.1f}"


def list_fitting(config: Config) -> Iterator[str]:
    if batch := find_batch(config):
        yield f"{KEY}={batch}"
    yield str(Change(cost="quality", values=OFF))


EVALUATION_RULES: tuple[Rule, ...] = (evaluation_fits,)
