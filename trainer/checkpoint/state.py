"""The training state beside the weights: master weights and moments of the optimizer, loss scale, random number generators.

It is stored whole and by parameter name, so that a run can resume with another number of ranks or another ZeRO stage. DeepSpeed's getters
(deepspeed.utils.safe_get_full_fp32_param and the like, 0.19.8) are not enough: they need ZeRO; under ZeRO 1 and 2 they add up floats, which
loses the sign of a zero; under ZeRO 3 they return float32 moments in the dtype of the weights; and the setter fails if the size of a
parameter is no multiple of the number of ranks. So the shards are found through the same maps, and copied bit by bit.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.contract import InputRefused, write_text
from trainer.device.device import seed_all
from trainer.device.rng import read_rng_state, set_rng_state
from trainer.distributed.collective import gather_objects
from trainer.distributed.engine import Engine
from trainer.optim.adamw_8bit import AdamW8bit
from trainer.optim.optimizer_shard import OptimizerShard, find_shards
from trainer.tensor.shard import ShardWriter, StoredTensor, sync
from trainer.tensor.stream import find_stored_tensors

MASTER = "master"
AVERAGE = "average"  # of trainer.distributed.average
NEW_RNG_NOTE = "equal up to rounding, and each rank's random numbers are seeded again from seed, step and rank"
REST_FILE = "rest.json"  # everything that is not a tensor
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's DynamicLossScaler


def state_bytes(engine: Engine) -> int:
    """Bytes that `write_state` writes."""
    shards_by_name = find_shards(engine).items()
    return sum(shard.numel * held.element_size() for name, shard in shards_by_name for held in local_state(engine, name, shard).values())


def local_state(engine: Engine, name: str, shard: OptimizerShard) -> dict[str, Tensor]:
    """This rank's elements of a parameter's master weights, of their average if the run keeps one and, after the first update, of its moments:
    (count,) each. 8-bit moments are returned as float32 values, which are quantized to the same codes again, so that they can be split over
    another number of ranks."""
    optimizer = engine.handle.basic_optimizer
    weights = {MASTER: shard.of(shard.owner)} | ({AVERAGE: engine.average.values[name]} if engine.average else {})
    if isinstance(optimizer, AdamW8bit):
        return {**weights, **optimizer.read_moments(shard.owner, name)}
    states = optimizer.state.get(shard.owner, {})
    moments = {key: shard.of(value) for key, value in states.items() if torch.is_tensor(value) and value.shape == shard.owner.shape}
    return {**weights, **moments}


def full_state_bytes(engine: Engine) -> int:
    """`state_bytes` once the optimizer has its two moments, which it creates at its first update."""
    average = 4 if engine.average else 0
    return sum((3 * shard.owner.element_size() + average) * shard.numel for shard in find_shards(engine).values())


def weights_bytes(engine: Engine) -> int:
    """Bytes of the weights in a checkpoint: all weights, or for an adapter those that are trained; twice with averages beside them."""
    adapter = hasattr(engine.model, "peft_config")
    kept = (p for p in engine.model.parameters() if p.requires_grad or not adapter)
    copies = 2 if engine.average and not engine.exports_average else 1
    return copies * sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in kept)


def write_state(engine: Engine, folder: Path, *, writers: int) -> str:
    """Every rank must call it. Returns this rank's error, or ''."""
    shards = open_shards(engine, folder)
    return finish_state(engine.rank, shards, gather_state(engine, shards, writers=writers))


def open_shards(engine: Engine, folder: Path, *, hold: bool = False) -> ShardWriter:
    """This rank's files of the state."""
    return ShardWriter(folder, f"state-{engine.rank:03d}", hold=hold)


def gather_state(engine: Engine, shards: ShardWriter, *, writers: int) -> dict[str, Any]:
    """Every rank must call it: the tensors are gathered one by one, tensor i to the `shards` of rank i % writers. Returns everything that is
    not a tensor, for rank 0 to write."""
    place = 0
    for name, shard in find_shards(engine).items():
        for key, held in local_state(engine, name, shard).items():
            writer = place % writers
            whole = gather_shard(engine, shard, held, writer)
            if writer == engine.rank:
                shards.add(f"{key}/{name}", whole.to("cpu", copy=True))
            if engine.device.type != "cpu":  # else the other ranks run ahead and hold a whole tensor for each pending reduction
                getattr(torch, engine.device.type).synchronize(engine.device)
            place += 1
    return {
        "optimizer_steps": optimizer_steps(engine),
        "loss_scaler": read_scaler(engine),
        "random": gather_objects(read_rng_state(engine.device)),
    }


def finish_state(rank: int, shards: ShardWriter, rest: dict[str, Any]) -> str:
    """Write the waiting tensors, and on rank 0 also `rest`. No collective. Returns the error, or ''."""
    shards.flush()
    if rank == 0 and not shards.problem:
        try:
            write_text(json.dumps(rest) + "\n", shards.folder / REST_FILE)
            sync(shards.folder)
        except OSError as error:
            return str(error)
    return shards.problem


def gather_shard(engine: Engine, shard: OptimizerShard, held: Tensor, writer: int) -> Tensor:
    """The whole parameter or moment, in the dtype of `held`; valid on rank `writer` only. The bits are summed as integers: one rank holds
    each element, and only zeros are added to it."""
    shape = getattr(shard.parameter, "ds_shape", shard.parameter.shape)
    if engine.world_size == 1 or engine.handle.zero_optimization_stage() == 0:
        return held.view(shape)
    bits = torch.zeros(shard.numel, dtype=torch.int32, device=engine.device)  # created as integers: HCCL uses the storage's own dtype
    whole = bits.view(torch.float32)  # 16-bit values fit, and are restored exactly
    whole.narrow(0, shard.start, shard.count).copy_(held)
    torch.distributed.reduce(bits, dst=writer)
    return whole.to(held.dtype).view(shape)


def optimizer_steps(engine: Engine) -> dict[str, int]:
    """Number of updates of each parameter, for Adam's bias correction: without ZeRO a parameter without a gradient is not updated."""
    states = engine.handle.basic_optimizer.state
    return {name: int(states[shard.owner]["step"]) for name, shard in find_shards(engine).items() if states.get(shard.owner)}


def read_scaler(engine: Engine) -> dict[str, Any]:
    """{} without dynamic loss scaling."""
    scaler = getattr(engine.handle.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in SCALER_KEYS} if getattr(scaler, "dynamic", False) else {}


def restore_state(engine: Engine, folder: Path, *, seed: int, step: int, world_size: int) -> None:
    """Restore the state that was saved. The model already has the checkpoint's weights; the exact master weights are restored here. If the
    number of ranks is not `world_size`, or the kind of device has changed, each rank's random numbers are seeded from seed, step and rank.
    Raises InputRefused if the state is of other parameters."""
    stored: dict[str, dict[str, StoredTensor]] = {}
    for entry, tensor in find_stored_tensors(folder).items():
        key, _, name = entry.partition("/")
        stored.setdefault(name, {})[key] = tensor
    rest = json.loads((folder / REST_FILE).read_text(encoding="utf-8"))
    steps, shards_by_name = rest["optimizer_steps"], find_shards(engine)
    if other := sorted(set(stored) ^ set(shards_by_name)):
        raise InputRefused(
            f"{folder} was saved with other trained parameters than this stage has, as {', '.join(other[:5])}. Start a new run."
        )
    for name, shard in shards_by_name.items():
        restore_shard(engine, name, shard, stored[name], steps=steps.get(name, 0))
    if engine.average and engine.exports_average:
        engine.average.load_masters()  # the files of the checkpoint hold the averages
    replay_adam_steps(engine.handle.basic_optimizer, max(steps.values(), default=0))
    for key, value in rest["loss_scaler"].items():
        setattr(engine.handle.optimizer.loss_scaler, key, value)
    accelerator = rest["random"][0].get("accelerator")
    if (world_size, accelerator) == (engine.world_size, engine.device.type):
        set_rng_state(rest["random"][engine.rank], engine.device)
    else:
        if accelerator != engine.device.type and engine.rank == 0:
            print(f"the checkpoint was saved on {accelerator}, this is {engine.device.type}: {NEW_RNG_NOTE}", flush=True)
        digest = hashlib.sha256(f"{seed}:{step}:{engine.rank}".encode()).digest()
        seed_all(int.from_bytes(digest[:4], "little"), deterministic=False)


def restore_shard(engine: Engine, name: str, shard: OptimizerShard, stored: dict[str, StoredTensor], *, steps: int) -> None:
    """Creates the optimizer's states of the owner as its first update would, which then does not create them."""
    optimizer = engine.handle.basic_optimizer
    shard.of(shard.owner).copy_(stored[MASTER].read(shard.start, shard.count))
    if engine.average:
        engine.average.values[name].copy_(stored[AVERAGE].read(shard.start, shard.count))
    moments = {key: tensor for key, tensor in stored.items() if key not in (MASTER, AVERAGE)}
    if moments and isinstance(optimizer, AdamW8bit):
        read = {key: tensor.read(shard.start, shard.count) for key, tensor in moments.items()}
        optimizer.write_moments(shard.owner, name, read, steps=steps)
        return
    if moments and not optimizer.state.get(shard.owner):
        states = {key: torch.zeros_like(shard.owner.detach(), dtype=tensor.dtype) for key, tensor in moments.items()}
        optimizer.state[shard.owner] = {"step": count_steps(optimizer, shard.owner, steps), **states}
    for key, tensor in moments.items():
        shard.of(optimizer.state[shard.owner][key]).copy_(tensor.read(shard.start, shard.count))


def count_steps(optimizer: torch.optim.Optimizer, owner: Tensor, steps: int) -> int | Tensor:
    """torch's AdamW counts in a tensor, on the device if it is fused; DeepSpeedCPUAdam counts in a plain int."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    device = owner.device if optimizer.defaults["fused"] else torch.device("cpu")
    return torch.tensor(float(steps), dtype=torch.float32, device=device)


def replay_adam_steps(optimizer: Any, steps: int) -> None:
    """DeepSpeedCPUAdam multiplies the powers of its betas step by step, and calls pow() after a jump, which rounds differently (0.19.8,
    ops/csrc/includes/cpu_adam.h, IncrementStep). So all steps are replayed, with nothing to update."""
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    beta1, beta2 = optimizer.defaults["betas"]
    nothing = [torch.zeros(1) for _ in range(4)]  # weight, gradient, both moments
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)
