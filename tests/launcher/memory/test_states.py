"""Model states by hand, and the strategy that `auto` stands for."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.check.strategy import STATES_SHARE, resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.memory.estimate import SET_ASIDE, answering_memory, estimate_memory
from launcher.memory.states import AVERAGE, GIB, lora_parameters, model_states, trainable_parameters, world_size

CONF = Path(__file__).parents[3] / "conf"
LLAVA = 7_063_427_072
TRAINED = 20_979_712 + 6_607_605_760 + 131_334_144  # projector, lm, head


@cache
def llava(*overrides: str) -> Config:
    return compose(["hardware=h200", "model=llava_1_5_7b", "strategy=ddp", *overrides], CONF)


def with_strategy(config: Config, **changes: Any) -> Config:
    return replace(config, strategy=replace(config.strategy, **changes))


@pytest.mark.parametrize(
    ("precision", "bytes_each"),  # of a frozen weight, of what training adds to one: gradient, moments, master
    [("fp32", (4, 4 + 8)), ("bf16", (2, 6 + 8 + 4)), ("fp16", (2, 4 + 8 + 4)), ("pure_bf16", (2, 2 + 4 + 2))],
)
def test_states_of_one_device(precision: str, bytes_each: tuple[int, int]) -> None:
    """BF16_Optimizer keeps gradients in bfloat16 beside those in float32; pure_bf16 in ZeRO has a copy of its slice."""
    weight, training = bytes_each
    states = model_states(with_strategy(llava(f"precision={precision}", "cluster.devices_per_node=1"), name="single"))
    assert (states.parameters, states.trainable) == (LLAVA, TRAINED)
    assert states.total_bytes == LLAVA * weight + TRAINED * training == sum(states.items_bytes.values())
    assert states.host_bytes == 0


@pytest.mark.parametrize(
    ("name", "shares"),  # ranks over which weights, gradients and optimizer are spread, of 8
    [("ddp", (1, 1, 8)), ("zero1", (1, 1, 8)), ("zero2", (1, 8, 8)), ("zero3", (8, 8, 8))],
)
def test_zero_shards_as_the_paper_says(name: str, shares: tuple[int, int, int]) -> None:
    """ddp with 16-bit weights is rendered as stage 1, since their masters lie in a ZeRO optimizer."""
    gradients = 4 + 2 if name in ("ddp", "zero1") else 4  # BF16_Optimizer's, in both types
    whole = {"weights": 2 * LLAVA, "gradients": gradients * TRAINED, "optimizer": 12 * TRAINED}
    items = model_states(with_strategy(llava(), name=name)).items_bytes
    assert items == {key: -(-size // share) for (key, size), share in zip(whole.items(), shares, strict=True)}


def test_ddp_in_float32_divides_nothing() -> None:
    items = model_states(llava("precision=fp32")).items_bytes
    assert items == {"weights": 4 * LLAVA, "gradients": 4 * TRAINED, "optimizer": 8 * TRAINED}


def test_zero_keeps_a_copy_of_its_slice_in_fp32_too() -> None:
    assert model_states(with_strategy(llava("precision=fp32"), name="zero1")).items_bytes["optimizer"] == -(-TRAINED * 12 // 8)


def test_offloading_moves_states_to_the_host() -> None:
    plain = model_states(with_strategy(llava(), name="zero3"))
    states = model_states(with_strategy(llava(), name="zero3", offload_optimizer=True))
    assert states.total_bytes == plain.items_bytes["weights"]
    assert states.host_bytes == 8 * (plain.items_bytes["gradients"] + plain.items_bytes["optimizer"])
    assert model_states(with_strategy(llava(), name="zero3", offload_optimizer=True, offload_parameters=True)).total_bytes == 0


def test_moments_in_8_bits_take_two_bytes_and_a_scale_for_256_of_them() -> None:
    config = llava("precision=bf16", "stage.optimizer.state_bits=8", "cluster.devices_per_node=1")
    items = model_states(with_strategy(config, name="single")).items_bytes
    assert items["optimizer"] == TRAINED * (4 + 2) + 2 * 4 * -(-TRAINED // 256)
    sharded = model_states(with_strategy(llava("precision=fp32", "stage.optimizer.state_bits=8"), name="zero2")).items_bytes
    assert sharded["optimizer"] == -(-items["optimizer"] // 8)  # float32 weights in ZeRO have a master too


def test_evaluation_holds_weights_alone() -> None:
    states = model_states(llava("stage=evaluate"))
    assert states.items_bytes == {"weights": 2 * LLAVA, "gradients": 0, "optimizer": 0}


@pytest.mark.parametrize(
    "lora",
    [
        "{r: 64, alpha: 64, dropout: 0, targets: [q_proj, k_proj, v_proj, o_proj]}",
        "{r: 16, alpha: 16, dropout: 0, targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}",
    ],
)
def test_lora_of_a_7b_qwen(lora: str) -> None:
    config = compose(["hardware=h200", "model=qwen2_5_vl_7b", "stage=lora", f"stage.lora={lora}"], CONF)
    assert lora_parameters(config) == trainable_parameters(config) == 40_370_176  # counted with peft on the real module
    assert model_states(config).parameters == 8_292_166_656 + 40_370_176


def test_hybrid_decoders_have_attention_in_some_layers_alone() -> None:
    config = compose(["hardware=h200", "model=minicpm_v_4_6", "stage=lora", "stage.lora.targets=[k_proj]"], CONF)
    assert lora_parameters(config) == 16 * (1024 + 2 * 256) * 24 // 4


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "single"),
        (("cluster.devices_per_node=2",), "ddp"),
        (("precision=pure_bf16",), "zero1"),  # DeepSpeed's bfloat16 masters need ZeRO
        (("hardware=h200", "model=llava_1_5_7b", "stage=lora"), "ddp"),
        (("hardware=h200", "model=llava_1_5_7b"), "ddp"),  # which in 16 bits is rendered as stage 1: its slices leave room
        (("hardware=ascend910b", "model=llava_1_5_7b"), "zero2"),
        (("hardware=ascend910b", "model=qwen2_5_vl_32b"), "zero3"),
        (("hardware=rtx3090", "model=llava_1_5_7b"), "zero3"),  # fits nowhere: the most sharded, which check refuses
        (("hardware=rtx3090", "model=llava_1_5_7b", "strategy.offload_optimizer=true"), "zero1"),
        (("hardware=rtx3090", "strategy.offload_parameters=true"), "zero3"),
        (("hardware=h200", "strategy=zero2"), "zero2"),
    ],
)
def test_auto_takes_the_least_sharded_that_leaves_room(overrides: tuple[str, ...], name: str) -> None:
    assert resolve(compose(overrides, CONF)).config.strategy.name == name


def test_the_less_sharded_ones_would_not_have_left_room() -> None:
    config = compose(["hardware=ascend910b", "model=llava_1_5_7b"], CONF)
    taken, before = (model_states(with_strategy(config, name=name)).total_bytes / (64 * GIB) for name in ("zero2", "zero1"))
    assert taken <= STATES_SHARE < before


@pytest.mark.parametrize(
    ("overrides", "micro_batch"),
    [
        ((), 64),
        (("cluster.devices_per_node=2",), 32),
        (("cluster.devices_per_node=4", "stage.global_batch=24"), 6),
        (("stage.global_batch=100",), 50),
        (("stage.global_batch=67",), 1),
        (("hardware=h200", "model=llava_1_5_7b"), 16),  # all of a rank's samples fit
        (("model=llava_1_5_7b", "tune=null"), 1),  # on a device whose memory is not known
        (("strategy.micro_batch=4",), 4),
    ],
)
def test_micro_batch_divides_what_a_rank_takes(overrides: tuple[str, ...], micro_batch: int) -> None:
    config = compose(overrides, CONF)
    assert resolve(config).config.strategy.micro_batch == micro_batch
    assert config.stage.global_batch % (micro_batch * world_size(config)) == 0


def test_a_micro_batch_of_zero_is_left_for_check() -> None:
    assert resolve(compose(["strategy.micro_batch=0"], CONF)).config.strategy.micro_batch == 0


def test_spares_are_no_ranks() -> None:
    assert world_size(compose(["hardware=ascend910b", "cluster=example"], CONF)) == 16
    assert world_size(compose(["hardware=ascend910b", "cluster=example", "cluster.nodes.1.spare=true"], CONF)) == 8


def test_a_batch_that_cannot_be_shared_is_left_for_check() -> None:
    assert resolve(compose(["cluster.devices_per_node=3"], CONF)).config.strategy.micro_batch == 1


@pytest.mark.parametrize(("name", "share"), [("ddp", 8), ("zero2", 8), ("zero3", 8)])  # ddp is rendered as stage 1
def test_an_average_of_the_weights_takes_four_bytes_each_and_is_divided_like_the_optimizer(name: str, share: int) -> None:
    config = with_strategy(llava("stage.optimizer.ema_decay=0.999"), name=name)
    items, without = (model_states(each).items_bytes for each in (config, with_strategy(llava(), name=name)))
    assert items == {**without, AVERAGE: -(-4 * TRAINED // share)}
    plain = model_states(llava("stage.optimizer.ema_decay=0.999", "precision=fp32"))
    assert plain.items_bytes[AVERAGE] == 4 * TRAINED


def test_an_average_is_offloaded_with_the_optimizer_and_shown_by_the_plan() -> None:
    config = with_strategy(llava("stage.optimizer.ema_decay=0.999"), name="zero2", offload_optimizer=True)
    without = with_strategy(llava(), name="zero2", offload_optimizer=True)
    states, before = model_states(config), model_states(without)
    assert states.items_bytes[AVERAGE] == 0 and states.host_bytes - before.host_bytes == 8 * -(-4 * TRAINED // 8)
    shown = {item.name: item.size_bytes for item in estimate_memory(llava("stage.optimizer.ema_decay=0.999")).items}
    assert shown[AVERAGE] == -(-4 * TRAINED // 8) and AVERAGE not in {item.name for item in estimate_memory(llava()).items}


def test_weights_that_averages_displace_are_counted_for_an_evaluation_where_no_copy_is_kept() -> None:
    """Without ZeRO the optimizer updates the model's own weights; with it they are made again from its copy."""
    options = ("precision=fp32", "cluster.devices_per_node=1", "stage.optimizer.ema_decay=0.999")
    single = with_strategy(llava(*options), name="single")
    kept = {item.name: item.size_bytes for item in answering_memory(single).items}
    assert kept[SET_ASIDE] == 4 * TRAINED
    for other in (
        with_strategy(single, name="zero1"),
        with_strategy(llava(*options, "stage.optimizer.ema_weights=trained"), name="single"),
    ):
        assert SET_ASIDE not in {item.name for item in answering_memory(other).items}
