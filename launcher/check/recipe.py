"""Rules about the recipe: numbers in range, a model that suits the stage, batch, length, data and strategy."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from launcher.check.learning import list_lacking
from launcher.check.problem import Problem, Rule
from launcher.check.row_count import refuse_few_rows
from launcher.config.schema import GROUPS, Config
from launcher.image.stack import Stack
from launcher.memory.deepspeed import ZERO_STAGE
from launcher.memory.states import world_size
from launcher.memory.tokens import smallest_image_tokens
from trainer.contract.wording import plural

TEXT_TOKENS = 32  # the shortest question and answer to an image

# ---------------------------------------------------------------------------------------------------------------- numbers

# Lowest and highest value, inclusive. A number that is not listed here must be finite and not negative.
COUNT, PORT, SHARE, PER_NODE = (1, math.inf), (1, 65535), (0, 1), (1, 1024)
MOST_GIB = 10**6  # of one device or node: the estimate computes in bytes
# At least one. The options of the text model are those that launcher.memory.states and launcher.memory.activations compute with.
COUNTS = (
    *("model.architecture.text.num_key_value_heads", "model.architecture.text.options.full_attention_interval"),
    *("model.parameters.total", "model.context", "data.max_length", "stage.lora.r", "stage.lora.alpha", "stage.inference.batch"),
    *("strategy.micro_batch", "strategy.checkpoint_every", "stage.optimizer.cycles", "cluster.node_timeout_s"),
    *(f"run.{name}" for name in ("keep_checkpoints", "stop_timeout_s", "start_timeout_s", "collective_timeout_s")),
    *(f"run.evaluation.{name}" for name in ("batch", "max_new_tokens")),
    *(f"model.architecture.vision.{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")),
    *(f"model.architecture.text.{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")),
    *(f"stage.{name}.sampling.{key}" for name in ("inference", "serving") for key in ("max_new_tokens", "beams")),
    *(f"stage.serving.{name}" for name in ("max_batch", "max_waiting", "max_body_bytes", "max_image_bytes", "max_image_pixels")),
)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(COUNTS, COUNT),
    "hardware.devices_per_node": PER_NODE,
    "hardware.device_multiple": PER_NODE,
    "hardware.memory_gib": (0.1, MOST_GIB),
    "hardware.host_memory_gib": (0.1, MOST_GIB),
    "hardware.context_gib": (0, MOST_GIB),
    "hardware.fragmentation": (0, 10),
    "stage.global_batch": (1, 10**7),
    "stage.lora.dropout": (0, 0.99),
    "stage.optimizer.lr": SHARE,
    "stage.optimizer.beta1": (0, 0.99999),
    "stage.optimizer.beta2": (0, 0.99999),
    "stage.optimizer.eps": (1e-30, 1),
    "stage.optimizer.weight_decay": SHARE,
    "stage.optimizer.final_ratio": SHARE,
    "stage.optimizer.power": (0.01, 100),
    "stage.optimizer.ema_decay": (0, 0.999999),
    "stage.label_smoothing": (0, 0.9),
    "stage.neftune_alpha": (0, 1000),
    **{f"data.augmentation.{name}": SHARE for name in ("crop", "flip", "colour")},
    "data.augmentation.jpeg": (0, 100),
    "cluster.devices_per_node": PER_NODE,
    "cluster.rendezvous_port": (1024, 65535),
    "cluster.nodes.port": PORT,
    "cluster.connect_timeout_s": (1, 600),
    "cluster.silence_s": (3, 3600),  # the kernel counts a third of it, in whole seconds
    "run.steps": (1, 10**9),
    "run.epochs": (0.001, 10**6),
    "run.seed": (0, 2**63 - 1),  # torch.manual_seed
    **{f"stage.{name}.sampling.top_p": (0.01, 1) for name in ("inference", "serving")},
    **{f"stage.{name}.sampling.temperature": (0, 10) for name in ("inference", "serving")},
    **{f"stage.{name}.shard_bytes": (10**6, math.inf) for name in ("merging", "conversion", "quantization")},
    "stage.merging.tolerance": (0, 1),
    "stage.serving.port": PORT,
    **{f"stage.serving.{name}_timeout_s": (0.1, 86400) for name in ("fetch", "request", "drain")},
}
COUNTED_OPTIONS = (
    "full_attention_interval",
    *("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim"),
)

# Offered where the bound itself would be refused, or trains nothing.
BETTER = {"stage.optimizer.lr": "1e-4", "run.epochs": "1"}


def numbers_in_range(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for key, value in read_numbers(config):
        low, high = RANGES.get(re.sub(r"\.\d+(?=\.|$)", "", key), (0, math.inf))
        if low <= value <= high and value != math.inf:
            continue
        bound = f"at most {write_number(high)}" if value > high else f"at least {write_number(low)}"
        better = str(least_length(config)) if key == "data.max_length" else BETTER.get(key)
        nearest = better or write_number(high if value > high else low)
        whose = f" of node {config.cluster.nodes[int(key.split('.')[2])].host}" if key.startswith("cluster.nodes.") else ""
        yield Problem(key=key, what=f"{write_number(value)}{whose} is out of range; it must be {bound}", changes=(f"{key}={nearest}",))


def write_number(value: float) -> str:
    """Integers in full, as a key of that type needs them."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def read_numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, number) of every number in a dataclass, those in lists too. Of the free-form sections of a model's family, only the options
    that the memory estimate computes with."""
    if is_dataclass(value):
        for field in fields(value):
            yield from read_numbers(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
    elif key == "model.architecture.text.options":
        counted = {name: value[name] for name in COUNTED_OPTIONS if name in value}
        yield from (pair for name, number in counted.items() for pair in read_numbers(number, f"{key}.{name}"))
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            yield from read_numbers(item, f"{key}.{place}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def counted_options_are_numbers(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """The schema accepts anything in a free-form section."""
    options = config.model.architecture.text.options
    for name in COUNTED_OPTIONS:
        value = options.get(name, 1)
        endless = isinstance(value, float) and not math.isfinite(value)  # reported as out of range
        if isinstance(value, bool) or not (isinstance(value, int) or endless):
            key = f"model.architecture.text.options.{name}"
            yield Problem(key=key, what=f"{value!r} is not an integer", changes=(f"{key}=4",))
    types = options.get("layer_types", ())
    if not isinstance(types, (list, tuple)):
        key = "model.architecture.text.options.layer_types"
        yield Problem(key=key, what=f"{types!r} is not a list with the kind of each layer", changes=(f"{key}=[full_attention]",))


def steps_hold_warmup(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    warmup, steps = config.stage.optimizer.warmup, config.run.steps
    if config.stage.kind == "train" and 1 <= steps <= warmup < math.inf:
        what = f"{warmup:g} warm-up steps, but the run has {steps}: it would never reach the learning rate"
        longer = (f"run.steps={int(warmup) * 10}",) if config.run.epochs is None else ()
        yield Problem(key="stage.optimizer.warmup", what=what, changes=("stage.optimizer.warmup=0.03", *longer))


def learning_rate_is_set(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    if config.stage.kind == "train" and config.stage.optimizer.lr == 0:
        yield Problem(key="stage.optimizer.lr", what="0 trains nothing", changes=("stage.optimizer.lr=1e-4",))


# -------------------------------------------------------------------------------------------------------- model and stage


def model_is_ready(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    if not config.model.ready:
        what = f"the trainer cannot train {config.model.title} yet: {config.model.pending}"
        yield Problem(key="model", what=what, changes=("model=tiny_llava", "model=llava_1_5_7b"), launch_only=True)


def start_is_given(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    stage = config.stage
    if "adapter" in stage.needs and not stage.checkpoint:
        what = f"stage {stage.name} needs the adapter of a LoRA run"
        yield Problem(key="stage.checkpoint", what=what, changes=("stage.checkpoint=RUN_ID", "stage.checkpoint=FOLDER"))
    elif "checkpoint" in stage.needs and not stage.checkpoint and config.model.source.kind == "random":
        what = (
            f"stage {stage.name} starts from trained weights, but {config.model.title} starts from random ones: give a run that trained it"
        )
        yield Problem(key="stage.checkpoint", what=what, changes=("stage.checkpoint=RUN_ID", "stage.checkpoint=FOLDER", "stage=full"))


def evaluation_is_on(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    if config.stage.kind == "evaluate" and not config.run.evaluation.enabled:
        what = f"is false, so stage {config.stage.name} has nothing to do"
        yield Problem(key="run.evaluation.enabled", what=what, changes=("run.evaluation.enabled=true",))


def best_is_measured(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """The best checkpoint is selected by the evaluations during training, on the held-out rows."""
    run = config.run
    if not run.keep_best or config.stage.kind != "train":
        return
    if lacks := list_lacking(config, run.keep_best):
        what = f"{run.keep_best} is not measured by any evaluation during training, so no checkpoint can be selected as the best"
        yield Problem(key="run.keep_best", what=what, changes=(" ".join(lacks), "run.keep_best=''"))


def source_is_named(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    source = config.model.source
    if source.kind == "hub" and not source.id:
        yield Problem(key="model.source.id", what="is empty, but model.source.kind is hub", changes=("model.source.id=ORGANISATION/NAME",))
    if source.kind == "path" and not source.path:
        yield Problem(key="model.source.path", what="is empty, but model.source.kind is path", changes=("model.source.path=FOLDER",))


def something_is_trained(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    stage, parameters = config.stage, config.model.parameters
    if stage.kind == "train" and stage.lora is None and not sum(getattr(parameters, group) for group in stage.trainable):
        what = f"no parameter would be trained (groups with parameters: {', '.join(g for g in GROUPS if getattr(parameters, g))})"
        yield Problem(key="stage.trainable", what=what, changes=("stage.trainable=[projector,lm,head]",))
    unknown = sorted(set(stage.trainable) - set(config.model.groups))
    if unknown:
        what = f"{config.model.title} has no group {', '.join(unknown)}; it has {', '.join(config.model.groups)}"
        known = ",".join(group for group in stage.trainable if group not in unknown)
        yield Problem(key="stage.trainable", what=what, changes=(f"stage.trainable=[{known}]",))


def groups_are_patterns(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for group, pattern in config.model.groups.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            key, what = f"model.groups.{group}", f"{pattern!r} is not a regular expression: {error}"
            yield Problem(key=key, what=what, changes=(f"{key}=REGEX",))


# ------------------------------------------------------------------------------------------------------- batch and length


def batch_divides(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    total, ranks = config.stage.global_batch, max(1, world_size(config))
    micro = 1 if config.strategy.micro_batch is None else config.strategy.micro_batch
    unit = micro * ranks
    if config.stage.kind in ("train", "evaluate") and total > 0 and unit > 0 and total % unit:
        what = (
            f"{total} samples cannot be divided among {plural(ranks, 'rank')} in micro-batches of {micro}: it must be a multiple of {unit}"
        )
        sizes = [size for size in (total - total % unit, total - total % unit + unit) if size]
        changes = [f"stage.global_batch={size}" for size in sizes]
        if micro > 1 and total % ranks == 0:  # the batch stays, and so does what it learns
            share = total // ranks
            changes.insert(0, f"strategy.micro_batch={next(size for size in range(min(micro, share), 0, -1) if share % size == 0)}")
        yield Problem(key="stage.global_batch", what=what, changes=tuple(changes))
    else:
        yield from refuse_few_rows(config, ranks)


def length_fits(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    length, context, least = config.data.max_length, config.model.context, least_length(config)
    if length > context:
        what = f"{length} tokens exceed the context of {config.model.title}, which is {context}"
        yield Problem(key="data.max_length", what=what, changes=(f"data.max_length={context}",))
    if 0 < length < least:
        image = least - TEXT_TOKENS
        what = f"{length} tokens are too few for a sample: one image of {config.model.title} takes {image}, a short question and answer {TEXT_TOKENS}"
        yield Problem(key="data.max_length", what=what, changes=(f"data.max_length={least}",))


def least_length(config: Config) -> int:
    return smallest_image_tokens(config.model.image_tokens) + TEXT_TOKENS


def packing_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    data = config.data
    if config.stage.kind != "train":
        return
    for key in ("packing", "padding_free"):
        if getattr(data, key) and not config.model.packable:
            what = f"the samples of one row of {config.model.title} would affect each other: its linear attention carries a state along the row"
            yield Problem(key=f"data.{key}", what=what, changes=(f"data.{key}=false", f"data.{key}=false data.length_aware=step"))
    if data.packing and data.length_aware == "window":
        what = "window puts samples of similar length in one step, but packing fills rows best with long and short ones"
        yield Problem(key="data.length_aware", what=what, changes=("data.length_aware=off", "data.packing=false"))


def leaves_padding_out(config: Config) -> bool:
    """data.padding_free; where it is null, true on a CPU only, which is where tests/benchmarks/train_speed.py measured it."""
    if config.data.padding_free is not None:
        return config.data.padding_free
    return config.hardware.accelerator == "cpu" and config.model.packable and not config.data.packing


def data_is_one_set(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    data = config.data
    named = [name for name in ("train", "evaluation", "images") if getattr(data, name)]
    if data.builtin and named:
        chosen = f"data={data.name}" if data.name != "files" else f"data.builtin={data.builtin}"
        what = f"names a file of yours, and {chosen} is the built-in set {data.builtin}, which is taken where no data is chosen: a run reads one set"
        changes = ("data.builtin=''",) if data.name == "files" else ("data=files", "data.builtin=''")
        yield Problem(key=f"data.{named[0]}", what=what, changes=changes)


def data_is_named(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    data = config.data
    if data.builtin:
        return
    stage, wanted = config.stage, {"train": ["train"], "evaluate": ["evaluation"]}.get(config.stage.kind, [])
    if stage.quantization is not None:
        wanted = ["train"] * bool(stage.quantization.calibration) + ["evaluation"] * stage.quantization.compare
    for name in wanted:
        if not getattr(data, name):
            what = "is empty: set its path (JSON, JSON Lines, csv, parquet, Arrow or tar)"
            yield Problem(key=f"data.{name}", what=what, changes=(f"data.{name}=FILE.json",))


# --------------------------------------------------------------------------------------------------------------- strategy


def strategy_suits_devices(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    ranks = world_size(config)
    if config.strategy.name == "single" and ranks > 1:
        changes = ["strategy=auto", "strategy=ddp"]
        if sum(not node.spare for node in config.cluster.nodes) == 1 and config.hardware.device_multiple == 1:
            changes.append("cluster.devices_per_node=1")
        yield Problem(key="strategy", what=f"single is for one rank, but this run has {ranks}", changes=tuple(changes))


def offload_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    strategy, stage = config.strategy, ZERO_STAGE[config.strategy.name]
    if config.hardware.accelerator == "cpu" and (strategy.offload_optimizer or strategy.offload_parameters):
        what = "on the CPU everything is in host memory already"
        yield Problem(key="strategy", what=what, changes=("strategy.offload_optimizer=false strategy.offload_parameters=false",))
    elif strategy.name != "auto" and strategy.offload_parameters and stage < 3:
        what = f"DeepSpeed offloads parameters with zero3 only, not with {strategy.name}"
        yield Problem(key="strategy.offload_parameters", what=what, changes=("strategy=zero3", "strategy.offload_parameters=false"))
    elif strategy.name != "auto" and strategy.offload_optimizer and stage < 1:
        what = f"DeepSpeed offloads the optimizer with zero1, zero2 or zero3, not with {strategy.name}"
        yield Problem(key="strategy.offload_optimizer", what=what, changes=("strategy=zero2", "strategy.offload_optimizer=false"))


RECIPE_RULES: tuple[Rule, ...] = (
    numbers_in_range,
    counted_options_are_numbers,
    steps_hold_warmup,
    learning_rate_is_set,
    model_is_ready,
    start_is_given,
    evaluation_is_on,
    best_is_measured,
    source_is_named,
    something_is_trained,
    groups_are_patterns,
    batch_divides,
    length_fits,
    packing_is_possible,
    data_is_one_set,
    data_is_named,
    strategy_suits_devices,
    offload_is_possible,
)
