"""What the next step depends on besides the weights' file: masters and moments of the optimizer, loss scale, random numbers.

Kept whole and by parameter name, so that a run can go on with another number of ranks or another ZeRO stage. DeepSpeed's own getters
(deepspeed.utils.safe_get_full_fp32_param and its kin, 0.19.8) serve only in part: they know nothing without ZeRO, ZeRO 1 and 2 add up
floats, which loses the sign of a zero, ZeRO 3 gathers float32 moments in the dtype of the weights, and its setter fails where a
parameter is no multiple of the ranks. So the parts are found through the same maps that those use, and copied bit by bit.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from trainer.contract import InputRefused, write_text
from trainer.device.device import seed_all
from trainer.distributed.engine import Engine
from trainer.optim.adamw_8bit import AdamW8bit
from trainer.optim.optimizer_shard import OptimizerShard, find_shards
from trainer.tensor.shard import ShardWriter, StoredTensor, find_stored_tensors, sync

MASTER = "master"
NEW_RNG_NOTE = "equal up to rounding, and each rank's random numbers begin anew from seed, step and rank"
REST_FILE = "rest.json"  # what is no tensor
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's DynamicLossScaler


# ------------------------------------------------------------------------------------------------------------------ saving


def state_bytes(engine: Engine) -> int:
    """Of all that `write_state` writes."""
    parts = find_shards(engine).items()
    return sum(part.numel * held.element_size() for name, part in parts for held in local_state(engine, name, part).values())


def local_state(engine: Engine, name: str, part: OptimizerShard) -> dict[str, Tensor]:
    """What this rank holds of a parameter's master and, after the first update, of its moments: (count,) each. Moments in 8 bits come as
    the float32 values that they stand for, which become the same codes again: so they can be cut for another number of ranks."""
    optimizer = engine.handle.basic_optimizer
    if isinstance(optimizer, AdamW8bit):
        return {MASTER: part.of(part.owner), **optimizer.read_moments(part.owner, name)}
    states = optimizer.state.get(part.owner, {})
    moments = {key: part.of(value) for key, value in states.items() if torch.is_tensor(value) and value.shape == part.owner.shape}
    return {MASTER: part.of(part.owner), **moments}


def full_state_bytes(engine: Engine) -> int:
    """As `state_bytes` will be once the optimizer has its two moments, which it makes at its first update."""
    return sum(3 * part.numel * part.owner.element_size() for part in find_shards(engine).values())


def weights_bytes(engine: Engine) -> int:
    """Of the weights in a checkpoint: all, or those that train where it is an adapter."""
    adapter = hasattr(engine.model, "peft_config")
    kept = (p for p in engine.model.parameters() if p.requires_grad or not adapter)
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in kept)


def write_state(engine: Engine, folder: Path, *, writers: int) -> str:
    """Every rank must call it. Returns what went wrong on this rank, or ''."""
    shards = open_shards(engine, folder)
    return finish_state(engine.rank, shards, gather_state(engine, shards, writers=writers))


def open_shards(engine: Engine, folder: Path, *, held: bool = False) -> ShardWriter:
    """This rank's own files of a state."""
    return ShardWriter(folder, f"state-{engine.rank:03d}", held=held)


def gather_state(engine: Engine, shards: ShardWriter, *, writers: int) -> dict[str, Any]:
    """Every rank must call it: parameter by parameter the tensors come together, tensor i at rank i % writers, whose `shards` take it.
    Returns what is no tensor, for rank 0 to write."""
    place = 0
    for name, part in find_shards(engine).items():
        for key, held in local_state(engine, name, part).items():
            writer = place % writers
            whole = gather_shard(engine, part, held, writer)
            if writer == engine.rank:
                shards.add(f"{key}/{name}", whole.to("cpu", copy=True))
            if engine.device.type != "cpu":  # else the other ranks run ahead, and hold a whole tensor for each reduction under way
                getattr(torch, engine.device.type).synchronize(engine.device)
            place += 1
    return {"optimizer_steps": optimizer_steps(engine), "loss_scaler": read_scaler(engine), "random": gather_rng_states(engine)}


def finish_state(rank: int, shards: ShardWriter, rest: dict[str, Any]) -> str:
    """Write what still waits, on rank 0 `rest` too. No collective. Returns what went wrong, or ''."""
    shards.flush()
    if rank == 0 and not shards.problem:
        try:
            write_text(json.dumps(rest) + "\n", shards.folder / REST_FILE)
            sync(shards.folder)
        except OSError as error:
            return str(error)
    return shards.problem


def gather_shard(engine: Engine, part: OptimizerShard, held: Tensor, writer: int) -> Tensor:
    """All ranks' parts of a parameter or moment, whole, in the dtype of `held`: on rank `writer`, of no use on the others. Bits are added
    up as integers: every element is held by one rank, and nothing but a zero is added to it."""
    shape = getattr(part.parameter, "ds_shape", part.parameter.shape)
    if engine.world_size == 1 or engine.handle.zero_optimization_stage() == 0:
        return held.view(shape)
    bits = torch.zeros(part.numel, dtype=torch.int32, device=engine.device)  # made as integers: HCCL goes by the storage's own dtype
    whole = bits.view(torch.float32)  # 16 bits fit in, and come out as they were
    whole.narrow(0, part.start, part.count).copy_(held)
    torch.distributed.reduce(bits, dst=writer)
    return whole.to(held.dtype).view(shape)


def optimizer_steps(engine: Engine) -> dict[str, int]:
    """Updates of each parameter, which Adam's bias correction counts: without ZeRO one that had no gradient stays behind."""
    states = engine.handle.basic_optimizer.state
    return {name: int(states[part.owner]["step"]) for name, part in find_shards(engine).items() if states.get(part.owner)}


def read_scaler(engine: Engine) -> dict[str, Any]:
    """{} where the loss is not scaled dynamically."""
    scaler = getattr(engine.handle.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in SCALER_KEYS} if getattr(scaler, "dynamic", False) else {}


def gather_rng_states(engine: Engine) -> list[dict[str, Any]]:
    """Every rank's random numbers, by rank."""
    states = [read_rng_state(engine.device)]
    if engine.world_size > 1:
        states = states * engine.world_size
        torch.distributed.all_gather_object(states, read_rng_state(engine.device))
    return states


@contextmanager
def keep_rng_state(accelerator: str) -> Iterator[None]:
    """Random numbers go on after it as if it had drawn none."""
    device = torch.device(accelerator)
    states = read_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(states, device)


def read_rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    states: dict[str, Any] = {"accelerator": device.type}
    states |= {"python": random.getstate(), "numpy": (name, keys.tolist(), position, has_gauss, gauss)}
    states["torch"] = torch.get_rng_state().numpy().tobytes().hex()
    states["device"] = getattr(torch, device.type).get_rng_state(device).cpu().numpy().tobytes().hex() if device.type != "cpu" else ""
    return states


# ---------------------------------------------------------------------------------------------------------------- going on


def restore_state(engine: Engine, folder: Path, *, seed: int, step: int, world_size: int) -> None:
    """Put an engine where the ranks that saved were; its model has the checkpoint's weights, of which the masters here are the exact ones.
    With another number of ranks than `world_size`, or another kind of device, each rank's random numbers begin anew, from seed, step and
    rank. Raises InputRefused when the state is of other parameters."""
    stored: dict[str, dict[str, StoredTensor]] = {}
    for entry, tensor in find_stored_tensors(folder).items():
        key, _, name = entry.partition("/")
        stored.setdefault(name, {})[key] = tensor
    rest = json.loads((folder / REST_FILE).read_text(encoding="utf-8"))
    steps, parts = rest["optimizer_steps"], find_shards(engine)
    if other := sorted(set(stored) ^ set(parts)):
        raise InputRefused(f"{folder} holds other trained parameters than this stage has, as {', '.join(other[:5])}. Start a new run.")
    for name, part in parts.items():
        restore_shard(engine, name, part, stored[name], steps=steps.get(name, 0))
    replay_adam_steps(engine.handle.basic_optimizer, max(steps.values(), default=0))
    for key, value in rest["loss_scaler"].items():
        setattr(engine.handle.optimizer.loss_scaler, key, value)
    accelerator = rest["random"][0].get("accelerator")
    if (world_size, accelerator) == (engine.world_size, engine.device.type):
        set_rng_state(rest["random"][engine.rank], engine.device)
    else:
        if accelerator != engine.device.type and engine.rank == 0:
            print(f"it was saved on {accelerator}, this is {engine.device.type}: {NEW_RNG_NOTE}", flush=True)
        digest = hashlib.sha256(f"{seed}:{step}:{engine.rank}".encode()).digest()
        seed_all(int.from_bytes(digest[:4], "little"), deterministic=False)


def restore_shard(engine: Engine, name: str, part: OptimizerShard, stored: dict[str, StoredTensor], *, steps: int) -> None:
    """The owner's states are made as the optimizer would at its first update, which it then leaves out."""
    optimizer = engine.handle.basic_optimizer
    part.of(part.owner).copy_(stored[MASTER].read(part.start, part.count))
    moments = {key: tensor for key, tensor in stored.items() if key != MASTER}
    if moments and isinstance(optimizer, AdamW8bit):
        read = {key: tensor.read(part.start, part.count) for key, tensor in moments.items()}
        optimizer.write_moments(part.owner, name, read, steps=steps)
        return
    if moments and not optimizer.state.get(part.owner):
        states = {key: torch.zeros_like(part.owner.detach(), dtype=tensor.dtype) for key, tensor in moments.items()}
        optimizer.state[part.owner] = {"step": count_steps(optimizer, part.owner, steps), **states}
    for key, tensor in moments.items():
        part.of(optimizer.state[part.owner][key]).copy_(tensor.read(part.start, part.count))


def count_steps(optimizer: torch.optim.Optimizer, owner: Tensor, steps: int) -> int | Tensor:
    """As torch's AdamW counts, on the device when it is one kernel; DeepSpeedCPUAdam counts in plain ints."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    device = owner.device if optimizer.defaults["fused"] else torch.device("cpu")
    return torch.tensor(float(steps), dtype=torch.float32, device=device)


def replay_adam_steps(optimizer: Any, steps: int) -> None:
    """DeepSpeedCPUAdam multiplies the powers of its betas up from step to step, and takes pow() where it sees a jump, which rounds
    otherwise (0.19.8, ops/csrc/includes/cpu_adam.h, IncrementStep). So it gets all steps once more, with nothing to update."""
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    beta1, beta2 = optimizer.defaults["betas"]
    nothing = [torch.zeros(1) for _ in range(4)]  # weight, gradient, both moments
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)


def set_rng_state(states: dict[str, Any], device: torch.device) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(read_bytes(states["torch"]))
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(read_bytes(states["device"]), device)


def read_bytes(text: str) -> Tensor:
    """(n) uint8."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
