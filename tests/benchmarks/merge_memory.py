"""Memory and time of merging an adapter into a model with 8 billion parameters: writes a random bfloat16 base and an adapter for all linear
layers of its decoder to FOLDER, merges them in a separate process, and prints the peak of its resident memory.

    python tests/benchmarks/merge_memory.py FOLDER [MODEL] [SHARE] [PROBES]

MODEL: of conf/model, default qwen2_5_vl_7b. SHARE: the part of each large tensor that is written, default 1; the rest is a hole in the file,
which reads as zeros and needs no disk space. Base and merged model need 33 GB with SHARE 1. Both are deleted at the end.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.trainer.conftest import make_spec  # noqa: E402
from trainer.checkpoint.build import start_hollow  # noqa: E402
from trainer.contract import RESULT_FILE, SPEC_FILE, Merging, ModelSpec, StageSpec, TrainResult, read, write  # noqa: E402
from trainer.models.registry import find_family  # noqa: E402
from trainer.models.tiny import read_model  # noqa: E402
from trainer.tensor.stream import Outgoing, write_shards  # noqa: E402

RANK = 16
BLOCK = 2**24  # random numbers, repeated
LIMIT_BYTES = 4 * 10**9


def main() -> int:
    folder, name, share, probes = (*sys.argv[1:], *("", "qwen2_5_vl_7b", "1", "4")[len(sys.argv) :])
    root = Path(folder)
    model = read_model(ROOT / "conf" / "model" / f"{name}.yaml")
    base, adapter, run = root / "base", root / "adapter", root / "run"
    try:
        for path in (base, adapter, run):
            path.mkdir(parents=True)
        write_base(model, base, float(share))
        write_adapter(model, base, adapter)
        stage = StageSpec(name="merge", kind="merge", trainable=(), checkpoint=str(adapter), merging=Merging(probes=int(probes)))
        write(replace(make_spec(run, run), model=model, stage=stage), run / SPEC_FILE)
        return measure(run)
    finally:
        for path in (base, adapter, run):
            shutil.rmtree(path, ignore_errors=True)


def measure(run: Path) -> int:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    began = time.perf_counter()
    command = (sys.executable, "-m", "trainer", "run", str(run / SPEC_FILE))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables})
    seconds = time.perf_counter() - began
    if done.returncode:
        return done.returncode
    result: TrainResult = read(TrainResult, run / RESULT_FILE)
    peaks = {peak.phase: peak.allocated_bytes for peak in result.peaks}
    print("; ".join(f"{phase} {size / 1e9:.2f} GB" for phase, size in peaks.items()))
    print(f"peak of resident memory {max(peaks.values()) / 1e9:.2f} GB, {seconds:.0f} s, {result.evaluation}")
    return 0 if max(peaks.values()) <= LIMIT_BYTES else 1


def write_base(model: ModelSpec, folder: Path, share: float) -> None:
    family = find_family(model.family)
    meta_model = start_hollow(model, family, torch.bfloat16)
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    tensors = [make_tensor(name, tuple(parameter.shape), block) for name, parameter in meta_model.named_parameters()]
    write_shards(tensors, folder, 5 * 10**9)
    if share < 1:
        for file in folder.glob("*.safetensors"):
            punch(file, share)
    meta_model.config.save_pretrained(folder)
    family.create_processor(model).save(folder)


def make_tensor(name: str, shape: tuple[int, ...], block: Tensor) -> Outgoing:
    count = torch.Size(shape).numel()

    def pieces() -> Iterator[Tensor]:
        for start in range(0, count, BLOCK):
            yield block[: min(BLOCK, count - start)]

    return Outgoing(name=name, dtype=torch.bfloat16, shape=shape, pieces=pieces)


def punch(file: Path, share: float) -> None:
    """Replaces all but `share` of each 64 MiB after the header by a hole (fallocate(1))."""
    piece = 2**26
    for start in range(piece, file.stat().st_size - piece, piece):
        length = int(piece * (1 - share)) // 4096 * 4096
        subprocess.run(("fallocate", "--punch-hole", "--offset", str(start), "--length", str(length), str(file)), check=True)


def write_adapter(model: ModelSpec, base: Path, folder: Path) -> None:
    import re

    from peft import LoraConfig

    meta_model = start_hollow(model, find_family(model.family), torch.bfloat16)
    linear = {name: module for name, module in meta_model.named_modules() if type(module) is torch.nn.Linear}
    chosen = {name: module for name, module in linear.items() if re.match(model.groups["lm"], f"{name}.weight")}
    generator = torch.Generator().manual_seed(1)
    tensors: list[Outgoing] = []
    for name, module in chosen.items():
        for factor, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
            values = torch.randn(shape, generator=generator) * 0.01
            key = f"base_model.model.{name}.lora_{factor}.weight"
            tensors.append(Outgoing(name=key, dtype=torch.float32, shape=shape, pieces=lambda values=values: iter((values,))))
    write_shards(tensors, folder, 10**12)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sorted(chosen), base_model_name_or_path=str(base))
    config.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
