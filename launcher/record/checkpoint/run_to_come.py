"""The memory of a stage whose stage.checkpoint names a run that does not exist yet: known before the first of two runs, and its download."""

from collections.abc import Iterator, Set
from dataclasses import replace

from launcher.check.answering_changes import KEPT, with_nf4
from launcher.check.strategy import resolve
from launcher.config.schema import Config
from launcher.memory.states import GIB
from launcher.plan.plan import on_one_rank

FILE_BY_FILE = ("merge", "convert", "quantize")


def describe_run_to_come(config: Config, typed: Set[str]) -> str:
    """What the stage takes on each device for full weights of the typed model, and where it can read them for those in NF4; '' where no model
    is typed, since the run would say which it is."""
    if "model" not in typed or config.stage.kind in FILE_BY_FILE:
        return ""
    config = replace(config, stage=replace(config.stage, checkpoint=""))
    lines = "".join(f"\n    {kind}: {describe_peak(each)}" for kind, each in list_kinds(config))
    return f"\n  If that run is still to come, this stage will take, with model={config.model.name} on {config.hardware.title}:{lines}"


def list_kinds(config: Config) -> Iterator[tuple[str, Config]]:
    yield f"weights in {config.precision.weights}", config
    if config.stage.kind != "train" and config.hardware.accelerator == "cuda":
        yield from ((f"weights in NF4, stage.quantization.keep=[{','.join(kept)}]", with_nf4(config, kept)) for kept in KEPT)


def describe_peak(config: Config) -> str:
    memory = resolve(on_one_rank(config)).memory
    if memory is None:
        return "not computed: see the other problems without stage.checkpoint"
    peak = f"{memory.total_bytes / GIB:.1f} GiB on each device"
    if memory.limit_bytes is None:
        return f"{peak}; its memory is not known"
    return f"{peak} of {memory.limit_bytes / GIB:g}: {'it fits' if memory.fits else 'it does not fit'}"
