"""Rules about what a run starts from: what the record of stage.checkpoint says, against what this stage needs and what the user typed.

The trainer refuses the same on rank 0, from the files alone. Here it is known before anything starts.
"""

from collections.abc import Iterator, Mapping

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.config.source import RecordedWeights
from launcher.image.stack import Stack

KEY = "stage.checkpoint"
OF_ADAPTER = ("r", "alpha", "rank_stabilised")


def name_run(recorded: RecordedWeights) -> str:
    if not recorded.stage:
        return f"the checkpoint (of {recorded.model}, from elsewhere)"
    whose = f"run {recorded.run_id}" if recorded.run_id else "the checkpoint"
    return f"{whose} (stage {recorded.stage} of {recorded.model})"


def model_is_the_recorded_one(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    recorded = config.stage.recorded
    if recorded is None or not recorded.differences:
        return
    what = (
        f"{config.model.name} is not the model of {name_run(recorded)}: {'; '.join(recorded.differences)}. Without model=... and its keys, the "
        "model is taken from the record"
    )
    changes = (f"model={recorded.model}",) if recorded.model != config.model.name else ()
    yield Problem(key="model", what=what, changes=changes)


def adapter_is_there(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    recorded, kind = config.stage.recorded, config.stage.kind
    if recorded is None or kind not in ("merge", "convert", "quantize"):
        return
    if kind == "merge" and recorded.adapter is None:
        what = (
            f"merge needs the adapter of a LoRA run, and {name_run(recorded)} saved full weights: there is nothing to merge. Every other stage "
            "takes them as they are"
        )
        yield Problem(key=KEY, what=what)
    if kind != "merge" and recorded.adapter is not None:
        source, result = recorded.run_id or config.stage.checkpoint, f"{recorded.run_id}-merged" if recorded.run_id else "merged"
        base = f" stage.base={config.stage.base}" if config.stage.base else ""
        first = f"omnilaunch launch stage=merge {KEY}={source}{base} --run-id {result}"
        what = f"{kind} needs full weights, and {name_run(recorded)} saved an adapter. Merge it first: {first}; then {KEY}={result}"
        yield Problem(key=KEY, what=what)


def quantized_weights_stay(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    recorded, kind = config.stage.recorded, config.stage.kind
    if recorded is None or not recorded.quantized or kind not in ("train", "merge", "convert", "quantize"):
        return
    task = "trained" if kind == "train" else {"merge": "merged", "convert": "converted", "quantize": "quantized again"}[kind]
    what = f"{name_run(recorded)} saved weights in {recorded.quantized}, which cannot be {task}. Use the weights that they were made from"
    yield Problem(key=KEY, what=what, changes=(f"{KEY}={recorded.source}",) if recorded.source else ())


def quantized_weights_load(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    recorded = config.stage.recorded
    if recorded is not None and recorded.quantized == "nf4" and config.hardware.accelerator != "cuda":
        what = (
            f"{name_run(recorded)} saved weights in NF4, which bitsandbytes reads on CUDA devices; {config.hardware.title} is "
            f"{config.hardware.accelerator}. Quantize for this device with stage.quantization.scheme=int8, or use the weights that they were made from"
        )
        yield Problem(key=KEY, what=what, changes=(f"{KEY}={recorded.source}",) if recorded.source else ())


def adapter_is_continued(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A LoRA stage that starts from an adapter continues with it."""
    recorded, lora, reset = config.stage.recorded, config.stage.lora, config.stage.reset
    if recorded is None or recorded.adapter is None or lora is None or config.stage.kind != "train":
        return
    has = recorded.adapter
    wrong = [name for name in OF_ADAPTER if getattr(lora, name) != getattr(has, name)]
    if wrong:
        said = ", ".join(f"{name} is {write(getattr(lora, name))}, the adapter has {write(getattr(has, name))}" for name in wrong)
        what = f"a LoRA stage continues with the adapter of {name_run(recorded)}, but {said}. For a new adapter, merge that one first"
        yield Problem(key="stage.lora", what=what, changes=(" ".join(f"stage.lora.{name}={write(getattr(has, name))}" for name in wrong),))
    if reset:
        what = f"{', '.join(reset)} cannot be reset in a stage that continues with an adapter, that of {name_run(recorded)}"
        yield Problem(key="stage.reset", what=what, changes=("stage.reset=[]",))


def needed_groups_are_trained(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    recorded, stage = config.stage.recorded, config.stage
    if recorded is None or not recorded.trained:
        return
    before = [group for group in recorded.trained if group not in stage.reset]
    lacking = [need for need in stage.needs if need in config.model.groups and need not in before]
    if lacking:
        names = ", ".join(lacking)
        what = (
            f"stage {stage.name} needs a trained {names}, and no run has trained that of {name_run(recorded)}: images would be noise to the "
            f"language model. Train it first: omnilaunch launch stage=projector {KEY}={recorded.run_id}"
        )
        yield Problem(key=KEY, what=what)


def write_start_notes(config: Config) -> Iterator[str]:
    """Weights that only the nodes have: their files decide the model, and the plan cannot read them."""
    stage = config.stage
    yield from stage.recorded.notes if stage.recorded else ()
    if stage.checkpoint and stage.recorded is None and not config.cluster.is_local:
        weights = f"an adapter of {config.model.name}" if stage.kind == "merge" else f"full weights of {config.model.name}"
        yield (
            f"{KEY}={stage.checkpoint} is read on the nodes, and the plan did not look into it: it is planned as {weights} (model={config.model.name}). "
            "If it is another model, name that one with model=NAME"
        )


def write(value: object) -> str:
    return str(value).lower()


START_RULES: tuple[Rule, ...] = (
    model_is_the_recorded_one,
    adapter_is_there,
    quantized_weights_stay,
    quantized_weights_load,
    adapter_is_continued,
    needed_groups_are_trained,
)
