"""Rules about dtypes: what the chip computes in, which dtypes DeepSpeed and the optimizers combine, loss scaling and rounding.

They read the fields of the precision. Its name is never used: a user may write a file of conf/precision, or change one field of it.
"""

from collections.abc import Iterator, Mapping

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack

FILE_KINDS = ("merge", "convert", "quantize")
FLOAT16_RANGE = "values above 65,504 become infinite, those below 6e-8 become 0"  # torch.finfo(torch.float16): max, smallest_normal * eps


def bf16_is_native(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    precision, hardware = config.precision, config.hardware
    wanted = "bfloat16" in (precision.weights, precision.compute, precision.optimizer, precision.gradients)
    if wanted and hardware.capability.bf16 == "none":
        what = f"{hardware.title} has no bfloat16: torch would emulate it, slowly, and still report it as supported"
        fp16 = ("precision=fp16",) if hardware.capability.fp16 != "none" else ()
        yield Problem(key="precision", what=what, changes=(*fp16, "precision=fp32"), forcible=True)


def fp16_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    precision, hardware = config.precision, config.hardware
    if "float16" in (precision.weights, precision.compute) and hardware.capability.fp16 == "none":
        bf16 = ("precision=bf16",) if hardware.capability.bf16 == "native" else ()
        what = f"{hardware.title} does not train in float16"
        yield Problem(key="precision", what=what, changes=(*bf16, "precision=fp32"), forcible=True)


def dtypes_combine(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """The combinations that DeepSpeed 0.19.8 has (runtime/engine.py, _do_optimizer_sanity_check; runtime/config.py, _do_error_check). It
    has float16 masters with DeepSpeedCPUAdam only, and AdamW's eps of 1e-8 is 0 in float16."""
    precision = config.precision
    weights, optimizer, gradients = precision.weights, precision.optimizer, precision.gradients
    if precision.compute != weights:
        what = f"{precision.compute} is not possible: the model computes in the dtype of its weights, which is {weights}"
        yield Problem(key="precision.compute", what=what, changes=(f"precision.weights={precision.compute}",))
    if config.stage.kind != "train":
        return
    if optimizer != "float32" and not optimizer == weights == "bfloat16":
        what = f"{optimizer} is not possible with weights in {weights}: masters and states are in float32, or in bfloat16 with bfloat16 weights"
        yield Problem(key="precision.optimizer", what=what, changes=("precision.optimizer=float32",))
    allowed = ("bfloat16",) if optimizer == weights == "bfloat16" else tuple(dict.fromkeys(("float32", weights)))
    if gradients not in allowed:
        what = (
            f"{gradients} is not possible with weights in {weights} and optimizer states in {optimizer}: DeepSpeed accumulates gradients in "
            f"{' or '.join(allowed)} there"
        )
        yield Problem(key="precision.gradients", what=what, changes=tuple(f"precision.gradients={dtype}" for dtype in allowed))


def loss_scaling_suits(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    precision = config.precision
    half = "float16" in (precision.weights, precision.compute)
    if half and precision.loss_scaling == "none" and config.stage.kind == "train":
        what = "gradients in float16 underflow without loss scaling"
        yield Problem(key="precision.loss_scaling", what=what, changes=("precision.loss_scaling=dynamic",), forcible=True)
    if not half and precision.loss_scaling == "dynamic":
        what = f"loss scaling is for float16, not for {precision.compute}"
        yield Problem(key="precision.loss_scaling", what=what, changes=("precision.loss_scaling=none",))


def rounding_suits(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    precision, offload = config.precision, config.strategy.offload_optimizer
    if precision.rounding == "nearest" or config.stage.kind != "train":
        return
    if precision.optimizer != "bfloat16":
        what = f"stochastic rounding is for masters and states in bfloat16, not in {precision.optimizer}"
        yield Problem(key="precision.rounding", what=what, changes=("precision.rounding=nearest",))
    elif offload:
        what = "DeepSpeedCPUAdam, the only optimizer for bfloat16 states in host memory, rounds to nearest, which loses small updates"
        changes = ("strategy.offload_optimizer=false", "precision=bf16", "precision.rounding=nearest")
        yield Problem(key="strategy.offload_optimizer", what=what, changes=changes)


def state_bits_suit(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    key, optimizer = "stage.optimizer.state_bits", config.precision.optimizer
    if not config.stage.optimizer.state_bits or config.stage.kind != "train":
        return
    if optimizer != "float32":
        what = f"8-bit states need masters in float32, and precision.optimizer is {optimizer}"
        yield Problem(key=key, what=what, changes=(f"{key}=0", "precision=bf16", "precision=fp32"))
    if config.strategy.offload_optimizer:
        what = "DeepSpeedCPUAdam, the only optimizer for states in host memory, has no 8-bit states"
        yield Problem(key=key, what=what, changes=("strategy.offload_optimizer=false", f"{key}=0"))


def masters_suit_strategy(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    if config.precision.optimizer == "bfloat16" and config.strategy.name in ("single", "ddp"):
        what = f"DeepSpeed keeps masters and states in bfloat16 with zero1, zero2 or zero3, not with {config.strategy.name}"
        yield Problem(key="strategy", what=what, changes=("strategy=auto", "strategy=zero1", "precision=bf16"))


def write_cast_notes(config: Config) -> Iterator[str]:
    """Weights that are saved in a dtype of a larger range than float16, in which the run loads them. A folder of this machine is read by
    launcher.plan.weights_folder instead."""
    recorded, source, checkpoint = config.stage.recorded, config.model.source, config.stage.checkpoint
    if recorded is not None and recorded.dtype and not recorded.quantized:
        yield from describe_cast(config, checkpoint, recorded.dtype)
    elif not checkpoint and source.kind in ("hub", "modelscope"):
        yield from describe_cast(config, source.id or source.modelscope, source.dtype)


def describe_cast(config: Config, name: str, saved: str) -> Iterator[str]:
    """`name`: of the weights; `saved`: their dtype, '' = not known. A stage that works file by file reports such values itself."""
    if config.precision.weights != "float16" or saved == "float16" or config.stage.kind in FILE_KINDS:
        return
    whose = f"{name} is in {saved}" if saved else f"{name} may be in bfloat16"
    chip = f", which {config.hardware.title} does not have" if saved == "bfloat16" and config.hardware.capability.bf16 == "none" else ""
    source = config.model.source
    folder = f" model.source.path={source.path}" if source.path else ""
    start = f" stage.checkpoint={config.stage.checkpoint}" if config.stage.checkpoint else folder
    command = f"omnilaunch launch stage=convert model={config.model.name} hardware=cpu{start}"
    if config.stage.kind == "train":  # the engine gives all weights one dtype: what was kept in float32 cannot be trained
        advice = f"to know before the run whether there are such values: {command} stage.conversion.unfit=refuse"
    else:
        advice = f"convert the model once, which reports those values, with {command}; then set stage.checkpoint=RUN_ID here"
    yield f"{whose}{chip}, and is loaded in float16: {FLOAT16_RANGE}; {advice}"


PRECISION_RULES: tuple[Rule, ...] = (
    bf16_is_native,
    fp16_is_possible,
    dtypes_combine,
    loss_scaling_suits,
    rounding_suits,
    state_bits_suit,
    masters_suit_strategy,
)
