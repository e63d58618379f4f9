"""The simplest PyTorch loop for the same job: the data set in memory, AdamW, clipping, step. Prints samples/s.

    python tests/benchmarks/bare_loop.py runs/RUN/spec.json

Same model class, initial weights, batch, threads and precision (float32) as the run of that spec; without engine, metrics and checks.
"""

import sys
import time
from pathlib import Path

import torch

from trainer.contract import TrainSpec, read
from trainer.data.batch.collate import collate
from trainer.data.check import resolve
from trainer.data.rows.sample import read_samples
from trainer.models.registry import FAMILIES

WARM_UP = 20


def main() -> None:
    spec = read(TrainSpec, Path(sys.argv[1]))
    torch.set_num_threads(spec.device.threads)
    torch.manual_seed(spec.seed)
    family = FAMILIES[spec.model.family]
    model, processor = family.create(spec.model), family.create_processor(spec.model)
    places = resolve(spec.data)
    samples, _ = read_samples(places.train, places.images)
    whole = collate(samples, processor, spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.optimizer.lr)
    model.train()
    started = 0.0
    for step in range(spec.steps):
        if step == WARM_UP:
            started = time.perf_counter()
        chosen = torch.randint(len(samples), (spec.batch.global_batch,))
        loss = model(**{key: value[chosen] for key, value in whole.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # printing the loss waits for the device
    print(f"samples/s {(spec.steps - WARM_UP) * spec.batch.global_batch / (time.perf_counter() - started):.1f}")


if __name__ == "__main__":
    main()
