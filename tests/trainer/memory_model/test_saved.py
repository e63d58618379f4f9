"""What autograd really keeps for the backward pass, tensor by tensor, against launcher.memory.activations's formulas: within 5 %."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.memory.activations import attention_bytes, count_kept, decoder_layer_bytes, lora_bytes, tower_layer_bytes
from launcher.memory.tokens import Load
from launcher.plan.plan import model_spec
from tests.trainer.conftest import fuses_grouped_heads
from trainer.contract import ModelSpec, TrainSpec
from trainer.device.dtype import loading_dtype
from trainer.kernels.noise import EmbeddingNoise
from trainer.memory_model.allocation_tracker import AllocationTracker
from trainer.models import find_family
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import apply_stage

CONF = Path(__file__).parents[3] / "conf"
LENGTH = 96
CHECKPOINTED = "strategy.gradient_checkpointing=true"
WITHIN = 0.05
LINEAR_WITHIN = 0.10  # launcher.memory.activations.LINEAR_ATTENTION is one number for all that the kernel's chunks keep


@pytest.fixture
def base(tiny_spec: Callable[..., TrainSpec]) -> TrainSpec:
    return tiny_spec()


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the storages that the graph of `run` keeps, each once, the model's own parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # which keeps them alive, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def skip_without_kernel(attention: str) -> None:
    if attention == "sdpa" and not fuses_grouped_heads():
        pytest.skip("torch has no fused attention with grouped heads for this CPU: what it keeps is not what a card keeps")


def build(config: Config, base: TrainSpec) -> torch.nn.Module:
    """The config's model in its stage, in the type that DeepSpeed makes of all of it, adapters too."""
    place: Any = type("Here", (), {"here": Path("/")})
    model: ModelSpec = model_spec(config, place)
    stage = replace(base.stage, kind="train", trainable=config.stage.trainable, lora=config.stage.lora)
    spec: TrainSpec = replace(base, model=model, stage=stage, precision=config.precision)
    family = find_family(model.family)
    dtype = loading_dtype(config.precision)
    return apply_stage(family.create(model).to(dtype), spec, family.unused(family.create(model))).model.to(dtype).train()


def per_layer(config: Config, base: TrainSpec, part: str, run: Callable[[torch.nn.Module], Any]) -> int:
    """What one layer more of `part` makes the graph keep: embeddings, projector and last norm fall out of the difference."""
    sizes = []
    for layers in (2, 4):
        architecture = config.model.architecture
        deeper = replace(architecture, **{part: replace(getattr(architecture, part), num_hidden_layers=layers)})
        model = build(replace(config, model=replace(config.model, architecture=deeper)), base)
        sizes.append(saved_bytes(model, lambda model=model: run(model)))  # type: ignore[misc]
    return (sizes[1] - sizes[0]) // 2


def load(rows: int = 1) -> Load:
    return Load(rows=rows, length=LENGTH, image_tokens=0, patches=0, masked=False, assumption="")


def answer(model: torch.nn.Module, length: int = LENGTH) -> Any:
    """The decoder of a model, behind inputs that need a gradient."""
    lm: Any = next(module for name, module in model.named_modules() if name.endswith("language_model"))
    inputs = torch.randn(1, length, lm.config.hidden_size, dtype=next(model.parameters()).dtype, requires_grad=True)
    return lm(inputs_embeds=inputs, use_cache=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "stage",
    [("stage=full",), ("stage=projector",), ("stage=lora",), ("stage=lora", "stage.lora.dropout=0", "stage.lora.targets=[q_proj,v_proj]")],
    ids=["full", "projector", "LoRA", "LoRA without dropout"],
)
def test_a_layer_of_the_decoder(precision: str, attention: str, stage: tuple[str, ...], base: TrainSpec) -> None:
    skip_without_kernel(attention)
    words = ("model=tiny_qwen2_5_vl", "tune=null", f"precision={precision}", f"hardware.capability.attention=[{attention}]", *stage)
    config = compose(words, CONF)
    measured = per_layer(config, base, "text", answer)
    width = 2 if precision == "bf16" else 4
    layers = config.model.architecture.text.num_hidden_layers
    counted = (decoder_layer_bytes(config, load()) + lora_bytes(config, width) // layers) * LENGTH
    assert counted == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "stage",
    [("stage=full",), ("stage=projector",), ("stage=lora",), ("stage=lora", "stage.lora.dropout=0")],
    ids=["full", "projector", "LoRA", "LoRA without dropout"],
)
def test_a_layer_of_the_decoder_under_zero_3(
    precision: str, attention: str, stage: tuple[str, ...], base: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DeepSpeed has its own linear in the place of torch's, which keeps the inputs of frozen weights too."""
    skip_without_kernel(attention)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    words = ("model=tiny_qwen2_5_vl", "tune=null", f"precision={precision}", f"hardware.capability.attention=[{attention}]", *stage)
    config = compose((*words, "strategy=zero3"), CONF)
    measured = per_layer(config, base, "text", answer)
    adapters = lora_bytes(config, 2 if precision == "bf16" else 4) // config.model.architecture.text.num_hidden_layers
    assert (decoder_layer_bytes(config, load()) + adapters) * LENGTH == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "strategy"), [("full", "single"), ("projector", "single"), ("projector", "zero3")])
@pytest.mark.parametrize("length", [128, 512])
def test_a_layer_of_linear_attention(
    length: int, stage: str, strategy: str, precision: str, base: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen3.5, with the heads of MiniCPM-V 4.6; its width and MLP are small, so that attention is most of what is kept."""
    if strategy == "zero3":
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    text = "model.architecture.text.options"
    heads = (f"{text}.linear_key_head_dim=128", f"{text}.linear_value_head_dim=128", f"{text}.linear_num_value_heads=4")
    words = ("model=tiny_minicpm_v_4_6", "tune=null", f"precision={precision}", f"stage={stage}", f"strategy={strategy}", *heads)
    config = compose(words, CONF)
    sizes = []
    for layers in (2, 4):
        options = {**config.model.architecture.text.options, "layer_types": ["linear_attention"] * layers}
        deeper = replace(config.model.architecture.text, num_hidden_layers=layers, options=options)
        architecture = replace(config.model.architecture, text=deeper)
        made = replace(config, model=replace(config.model, architecture=architecture))
        model = build(made, base)
        sizes.append(saved_bytes(model, lambda model=model: answer(model, length)))  # type: ignore[misc]
    counted = decoder_layer_bytes(made, replace(load(), length=length)) * length
    assert counted == pytest.approx((sizes[1] - sizes[0]) / 2, rel=LINEAR_WITHIN)


def see(model: torch.nn.Module) -> Any:
    parts: Any = model.model
    dtype = next(model.parameters()).dtype
    if hasattr(parts, "visual"):
        return parts.visual(torch.randn(64, 3 * 2 * 16, dtype=dtype), grid_thw=torch.tensor([[1, 8, 8]]))
    return parts.vision_tower(torch.randn(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "patches"), [("tiny_llava", 17), ("tiny_internvl", 65), ("tiny_qwen2_5_vl", 64)])
def test_a_layer_of_the_tower(name: str, patches: int, precision: str, base: TrainSpec) -> None:
    config = compose((f"model={name}", "tune=null", f"precision={precision}", "stage.trainable=[vision,projector,lm,head]"), CONF)
    measured = per_layer(config, base, "vision", see)
    width = 2 if precision == "bf16" else 4
    assert tower_layer_bytes(config, config.model.architecture.vision, width) * patches == pytest.approx(measured, rel=WITHIN)


def test_a_frozen_tower_keeps_nothing(base: TrainSpec) -> None:
    config = compose(("model=tiny_llava", "tune=null", "stage=full"), CONF)
    model = build(config, base)
    assert saved_bytes(model, lambda: see(model)) == 0 == count_kept(config, load()).vision


@pytest.mark.parametrize(
    ("name", "stage"), [("tiny_llava", "full"), ("tiny_llava", "lora"), ("tiny_internvl", "full"), ("tiny_qwen2_5_vl", "lora")]
)
def test_a_frozen_tower_has_no_backward_pass_where_layers_are_computed_twice(name: str, stage: str, base: TrainSpec) -> None:
    """Whatever transformers and peft have the embeddings' outputs need for that."""
    config = compose((f"model={name}", "tune=null", f"stage={stage}"), CONF)
    model = build(config, base)
    checkpoint_layers(model, replace(base, model=replace(base.model, groups=config.model.groups)))
    seen = see(model.get_base_model() if stage == "lora" else model)  # type: ignore[operator]
    assert not any(value.requires_grad for value in seen.values() if isinstance(value, torch.Tensor))


def test_an_eager_kernel_keeps_the_square_and_a_fused_one_does_not() -> None:
    fused, eager = (
        compose(("model=llava_1_5_7b", "precision=bf16", f"hardware.capability.attention=[{kernel}]"), CONF) for kernel in ("sdpa", "eager")
    )
    long = replace(load(), length=4096)
    assert attention_bytes(fused, long) == attention_bytes(fused, load())
    assert attention_bytes(eager, long) - attention_bytes(eager, load()) == 32 * (4096 - LENGTH) * (4 + 2)


# ----------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_noise_of_neftune_takes_less_than_is_counted_after_it(precision: str) -> None:
    """Three tensors like the embeddings at most: their output, the noise and the sum. Only the sum is left, in place of the output."""
    config = compose(("model=tiny_qwen2_5_vl", "tune=null", f"precision={precision}", "stage=projector", CHECKPOINTED), CONF)
    text, dtype = config.model.architecture.text, loading_dtype(config.precision)
    embedding = torch.nn.Embedding(text.vocab_size, text.hidden_size, dtype=dtype)
    noise, ids, tracker = EmbeddingNoise(embedding, 5.0), torch.zeros(1, LENGTH, dtype=torch.int64), AllocationTracker()
    with tracker, tracker.during("embedding", "activations"), noise.adding(torch.tensor([[0, 0, LENGTH, 7]])):
        kept = embedding(ids)
    one = kept.nbytes
    assert one == LENGTH * text.hidden_size * dtype.itemsize and kept.grad_fn is not None
    peak = tracker.peaks["embedding"].total_bytes
    assert 3 * one <= peak < 3.1 * one, "the spans of the noise are a few bytes"
    assert sum(tracker.alive_bytes.values()) < 1.1 * one, "what is left when the first layer begins"
    assert saved_bytes(embedding, lambda: embedding(ids)) == ids.nbytes, "autograd keeps the ids alone"
    assert count_kept(config, load()).lm >= 3 * one
