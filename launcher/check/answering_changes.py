"""What a stage that answers could do with less memory: fewer questions at a time, smaller images, a shorter context, a model over several
devices, weights in 16 or in 4 bits."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from launcher.check.change import Change, set_values
from launcher.config.schema import Config
from launcher.config.source import RecordedWeights
from launcher.memory.answering import answer_load
from launcher.memory.estimate import estimate_memory
from launcher.memory.states import GIB, packed_parameters, spreads, streams, weight_bytes
from launcher.memory.tokens import QUESTION_TOKENS, largest_image, resolve_context
from trainer.contract import Quantization

BATCH = {"infer": "stage.inference.batch", "serve": "stage.serving.max_batch"}
CONTEXT = {"infer": "stage.inference.context", "serve": "stage.serving.context"}
OPTIONS = {"infer": "inference", "serve": "serving"}
BATCHES = (32, 16, 8, 4, 2, 1)
SMALLER = (2, 4)  # parts of the largest image that is taken
LEAST_UNITS = 16  # of 28 x 28 pixels: the smallest bound of an image that is offered
HALVES = {  # of conf/precision
    "bfloat16": {"precision.name": "bf16", "precision.weights": "bfloat16", "precision.compute": "bfloat16"},
    "float16": {
        "precision.name": "fp16",
        "precision.weights": "float16",
        "precision.compute": "float16",
        "precision.loss_scaling": "dynamic",
    },
}
KEPT = (("vision", "projector", "head"), ("projector", "head"))  # groups that stay in 16 bits


def list_answering_changes(config: Config) -> Iterator[Change]:
    """From the cheapest to the dearest."""
    smaller = tuple(smaller_inputs(config))
    yield from (Change(cost="speed", values={batch_key(config): size}) for size in smaller_batches(config))
    yield from (Change(cost="context", values=values) for values in smaller)
    if config.stage.quantization is not None and config.stage.quantization.compare:
        yield Change(cost="quality", values={"stage.quantization.compare": False})
    one = fewest_questions(config)
    for values in smaller:
        yield Change(cost="context", values={**values, **one})
    if smaller:
        together = {key: value for values in smaller for key, value in values.items()}
        yield Change(cost="context", values={**together, **one})
    if config.stage.kind in OPTIONS and not spreads(config) and config.hardware.devices_per_node > 1:
        spread = {f"stage.{OPTIONS[config.stage.kind]}.spread": "auto", "cluster.devices_per_node": config.hardware.devices_per_node}
        yield Change(cost="speed", values=spread)
        yield Change(cost="speed", values={**spread, **one})
    yield from half_precision(config, one)


def batch_key(config: Config) -> str:
    return BATCH.get(config.stage.kind, "run.evaluation.batch")


def smaller_batches(config: Config) -> Iterator[int]:
    asks_one = config.stage.inference is not None and not config.stage.inference.input
    yield from (size for size in BATCHES if size < answer_load(config)[0] and not asks_one)


def fewest_questions(config: Config) -> dict[str, Any]:
    """One question at a time."""
    return {batch_key(config): 1}


def smaller_inputs(config: Config) -> Iterator[dict[str, Any]]:
    """Images with fewer tokens, fewer images, and a shorter context that still holds the largest image."""
    rule, data, kind = config.model.image_tokens, config.data, config.stage.kind
    if config.stage.serving is not None and config.stage.serving.max_images > 1:
        yield {"stage.serving.max_images": 1}
    if rule.rule in ("tiles", "slices") and (data.max_tiles or rule.maximum) > 1:
        yield {"data.max_tiles": 1}
    if rule.rule == "grid":
        most, least = data.max_pixels or rule.max_pixels, max(rule.min_pixels, LEAST_UNITS * rule.unit**2)
        yield from ({"data.max_pixels": most // part} for part in SMALLER if most // part >= least)
    if kind in CONTEXT:
        context = resolve_context(config)
        if context // 2 >= largest_image(config)[0] + QUESTION_TOKENS:
            yield {CONTEXT[kind]: context // 2}
    elif not data.builtin and data.max_length // 2 >= QUESTION_TOKENS:
        yield {"data.max_length": data.max_length // 2}


def half_precision(config: Config, one: dict[str, Any]) -> Iterator[Change]:
    """16-bit weights in place of float32, in the dtype that the chip has."""
    can = config.hardware.capability
    if config.precision.weights != "float32" or streams(config):
        return
    dtype = "bfloat16" if can.bf16 == "native" else "float16" if can.fp16 != "none" else ""
    if dtype:
        name = HALVES[dtype]["precision.name"]
        yield Change(cost="quality", values=HALVES[dtype], override=f"precision={name}")
        yield Change(cost="quality", values={**HALVES[dtype], **one}, override=f"precision={name} {batch_key(config)}=1")


def describe_fewer_bits(config: Config) -> str:
    """The way by a quantized checkpoint, as commands, if it would fit; else what the weights would take, so that it is not tried."""
    recorded, kind = config.stage.recorded, config.stage.kind
    if (recorded is not None and recorded.quantized) or kind not in ("evaluate", "infer", "serve"):
        return ""
    if config.hardware.accelerator != "cuda":
        return "\n    int8 would not help: its weights are converted back when they are read, and NF4 needs CUDA"
    for kept in KEPT:
        packed = with_nf4(config, kept)
        for values in ({}, fewest_questions(config)):
            if estimate_memory(set_values(packed, values)).fits:
                return describe_route(packed, kept, values)
    packed = with_nf4(config, KEPT[-1])
    size = weight_bytes(packed, config.model.parameters.total) / GIB
    return f"\n    weights in NF4 (stage=quantize stage.quantization.scheme=nf4) would take {size:.1f} GiB, which does not fit either"


def with_nf4(config: Config, kept: tuple[str, ...]) -> Config:
    """The config as it would be with a checkpoint in NF4 of the same model."""
    recorded = config.stage.recorded or RecordedWeights(run_id="", stage="", model=config.model.name)
    recorded = replace(recorded, quantized="nf4", kept=kept, adapter=None)
    return replace(config, stage=replace(config.stage, recorded=recorded))


def describe_route(packed: Config, kept: tuple[str, ...], values: dict[str, Any]) -> str:
    recorded, hardware, model = packed.stage.recorded, packed.hardware, packed.model
    source = f"stage.checkpoint={packed.stage.checkpoint}" if packed.stage.checkpoint else f"model={model.name}"
    name = f"{model.name}-nf4"
    keep = () if kept == Quantization.keep else (f"stage.quantization.keep=[{','.join(kept)}]",)
    words = (
        "stage=quantize",
        source,
        f"hardware={hardware.name}",
        "stage.quantization.scheme=nf4",
        "stage.quantization.compare=false",
        *keep,
    )
    first = shlex.join(("omnilaunch", "launch", *words, "--run-id", name))
    more = " ".join((f"stage.checkpoint={name}", *(f"{key}={value}" for key, value in values.items())))
    size = weight_bytes(packed, model.parameters.total) / GIB
    assert recorded is not None and packed_parameters(packed)
    merged = ", after stage=merge" if packed.stage.recorded and packed.stage.recorded.adapter else ""
    return f"\n    with weights in NF4 ({size:.1f} GiB) it fits{merged}. First: {first}\n    then this command with {more}"
