"""Two ranks that stay, and what a test of the start under ZeRO 3 has each of them do: build, scatter, and look at what became of it."""

import ctypes
import gc
import multiprocessing
import os
import queue
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer.distributed.zero3
from tests.trainer.mortal import free_port
from trainer.checkpoint.resume import ResumePoint
from trainer.contract import TrainSpec
from trainer.contract.checkpoint_files import MetricsSummary
from trainer.device.device import DEVICES, STATUS, reset_resident_peak, seed_all
from trainer.device.dtype import loading_dtype
from trainer.device.rank import Rank
from trainer.device.rng import read_rng_state
from trainer.distributed.engine import start_distributed, start_engine
from trainer.distributed.zero3 import partition_model
from trainer.programs.dispatch import silence_libraries
from trainer.train.model import build_model

RANKS = 2
MMAP_THRESHOLD = -3  # of mallopt(3)
SILENT_S = 900  # a task takes seconds on a quiet machine, minutes on one that is not
CPU = torch.device("cpu")
Task = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of this module, and what follows after the rank's number


def carry_out(tasks: dict[str, Task], log: Path, *, ranks: int = RANKS) -> dict[str, list[Any]]:
    """Every task on all ranks, one after the other: name -> what each rank returned. Raises AssertionError with the traceback of a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed", "peft"])
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=be_rank, args=(rank, ranks, port, tasks, log, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found: dict[str, list[Any]] = {name: [None] * ranks for name in tasks}
    try:
        for _ in range(ranks * len(tasks)):
            name, number, answer, error = answers.get(timeout=SILENT_S)
            assert not error, f"{name}, rank {number}: {error}"
            found[name][number] = answer
    except queue.Empty:
        raise AssertionError(f"the ranks fell silent: {log.read_text(errors='replace')[-3000:]}") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def be_rank(number: int, ranks: int, port: int, tasks: dict[str, Task], log: Path, answers: Any) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    silence_libraries()
    first = next(iter(tasks.values()))[1][0]
    start_distributed(first.device)
    for name, (task, arguments) in tasks.items():
        answer, error = None, ""
        try:
            answer = task(number, *arguments)
        except Exception:
            error = traceback.format_exc()
        answers.put((name, number, answer, error))
        if error:
            break
    time.sleep(SILENT_S)  # killed from outside, once all answers are there


def place_of(number: int) -> Rank:
    return Rank(number=number, local=number, world_size=RANKS, device=DEVICES["cpu"], torch_device=CPU)


def start_of(checkpoint: str) -> ResumePoint:
    state: Any = SimpleNamespace(path=checkpoint, step=1) if checkpoint else None
    return ResumePoint(checkpoint=state, rows=MetricsSummary(), data_sha256="")


# ------------------------------------------------------------------------------------------------------------- what comes out


def compare(number: int, spec: TrainSpec, checkpoint: str = "") -> dict[str, Any]:
    """A start under ZeRO 3 beside one without, which every rank makes whole: what differs, and how much there was to compare."""
    import deepspeed

    whole = {**spec.deepspeed, "zero_optimization": {"stage": 0}}
    seed_all(spec.seed, deterministic=False)
    expected = build_model(replace(spec, deepspeed=whole), place_of(number), start_of(checkpoint)).staged.model
    numbers = read_rng_state(CPU)
    seed_all(spec.seed + number, deterministic=False)  # on rank 1 what must not matter
    made = build_model(spec, place_of(number), start_of(checkpoint))
    model = made.staged.model
    on_meta = sum(parameter.is_meta for parameter in model.parameters())
    partition_model(model, spec, CPU)
    held = sum(parameter.numel() for parameter in model.parameters())
    random = read_rng_state(CPU) == numbers
    engine = start_engine(model, spec, CPU, rates=made.staged.rates)
    found = dict(model.named_parameters())
    wanted = dict(expected.named_parameters())
    differing = sorted(found.keys() ^ wanted.keys())
    for name, parameter in found.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            other = wanted[name].detach().to(loading_dtype(spec.precision))
            same = parameter.dtype == other.dtype and torch.equal(parameter, other)
        differing += [] if same and parameter.requires_grad == wanted[name].requires_grad else [name]
    buffers, others = dict(model.named_buffers()), dict(expected.named_buffers())
    for name, buffer in others.items():
        same = name in buffers and buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)
        differing += [] if same else [name]
    engine.handle.destroy()
    return {
        "differing": differing,
        "parameters": len(found),
        "on_meta": on_meta,
        "held": held,
        "rotary": sum("inv_freq" in name for name in buffers),
        "random": random,
    }


# ------------------------------------------------------------------------------------------------------------- what it takes


def weigh(number: int, spec: TrainSpec, how: str) -> dict[str, float]:
    """The most memory that a rank's host needed for a start, over the bytes of the model's parameters: in all, and without the pages of
    files, which the kernel takes back where it needs room. `how`: scattered, built (no further than without values on rank 1), or whole
    (as a rank without ZeRO 3 has it, every byte read)."""
    if how == "whole":
        spec = replace(spec, deepspeed={**spec.deepspeed, "zero_optimization": {"stage": 0}})
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)  # else glibc keeps what is freed in a heap full of holes, and the figure is of those
    gc.collect()
    reset_resident_peak()
    before, anonymous = status("VmRSS"), [status("RssAnon")]
    model = build_model(spec, place_of(number), start_of("")).staged.model
    size, _ = sizes(model)
    if how == "whole":
        for parameter in model.parameters():
            parameter.detach().view(torch.uint8).max()
    if how == "scattered":
        with watch_parameters(lambda _: status("RssAnon")) as seen:
            partition_model(model, spec, CPU)
        anonymous += seen
    anonymous.append(status("RssAnon"))
    own = (max(anonymous) - anonymous[0]) / size
    return {"bytes": size, "share": (status("VmHWM") - before) / size, "own": own}


def trace(number: int, spec: TrainSpec) -> dict[str, float]:
    """What stands in a rank's memory, over the bytes of the model: as it is built, at most until it is scattered, and then; of whole
    parameters on the device at most; of parameters that DeepSpeed moves as it starts."""
    with Tally() as tally:
        made = build_model(spec, place_of(number), start_of(""))
        model = made.staged.model
        size, largest = sizes(model)
        built, tally.highest = tally.standing, tally.standing
        with watch_parameters(lambda come: sum(p.numel() * p.element_size() for p in come)) as wholes:
            partition_model(model, spec, CPU)
        gc.collect()
        highest, left = tally.highest, tally.standing
    with watch_moves() as moves:
        engine = start_engine(model, spec, CPU, rates=made.staged.rates)
    engine.handle.destroy()
    found = {"largest": largest, "built": built, "highest": highest, "left": left, "whole": max(wholes), "moved": sum(moves)}
    return {name: count / size for name, count in found.items()} | {"parameters": len(wholes)}


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, and of the largest one."""
    found = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    return sum(found), max(found)


@contextmanager
def watch_parameters(measure: Callable[[list[torch.nn.Parameter]], int]) -> Iterator[list[int]]:
    """What `measure` says each time that a parameter has come to the device whole, asked with all that have come so far."""
    seen: list[int] = []
    come: list[torch.nn.Parameter] = []
    bring = trainer.distributed.zero3.load_parameter

    def watched(*arguments: Any) -> torch.nn.Parameter:
        come.append(bring(*arguments))
        seen.append(measure(come))
        return come[-1]

    trainer.distributed.zero3.load_parameter = watched
    try:
        yield seen
    finally:
        trainer.distributed.zero3.load_parameter = bring


@contextmanager
def watch_moves() -> Iterator[list[int]]:
    """Bytes of the parameters of every module that is moved as a whole."""
    seen: list[int] = []
    move = torch.nn.Module.to

    def watched(module: torch.nn.Module, *arguments: Any, **named: Any) -> torch.nn.Module:
        seen.append(sizes(module)[0])
        return move(module, *arguments, **named)

    torch.nn.Module.to = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]


def status(key: str) -> int:
    """A size in this process's status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


class Tally(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still stand, but for those without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.standing, self.highest, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.count(storage, storage.nbytes())
        return result

    def count(self, storage: Any, size: int) -> None:
        key = storage._cdata
        self.seen.add(key)
        self.standing += size
        self.highest = max(self.highest, self.standing)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.standing -= size
