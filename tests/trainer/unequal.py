"""What each rank does in the test of unequal images: steps on batches in which one rank has no image, one a large one, one several."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.contract import TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.check import resolve
from trainer.data.rows.sample import read_samples
from trainer.device.dtype import loading_dtype
from trainer.distributed.engine import start_engine
from trainer.distributed.zero3 import SOURCE_RANK, partition_model
from trainer.models import find_family
from trainer.stages.group import apply_stage
from trainer.train.loop import StepRequests, train_step
from trainer.train.model import create_on_meta, create_random
from trainer.train.watchdog import Watchdog

CPU = torch.device("cpu")
RANKS = (2, 3)
SIDES = {"small": (32, 32), "wide": (160, 40), "tall": (40, 130), "big": (150, 140)}  # width, height
Row = tuple[str, ...]  # the images of a row
# step -> rank -> the two rows of its micro-batch. With two ranks those of the third one are left out.
STEPS: tuple[tuple[tuple[Row, Row], ...], ...] = (
    (((), ()), (("big",), ("small",)), (("small",), ("tall", "wide"))),
    ((("wide",), ("small",)), (("small", "small", "tall"), ()), ((), ())),
    (((), ()), ((), ()), ((), ())),
    ((("small",), ()), ((), ()), (("big", "wide"), ("wide",))),
)


def write_rows(folder: Path) -> Path:
    """The file of all rows, in the order of STEPS, and their images beside it."""
    numbers = np.random.default_rng(0)
    for name, (width, height) in SIDES.items():
        Image.fromarray(numbers.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    rows = [make_row(images) for step in STEPS for rank in step for images in rank]
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def make_row(images: Row) -> dict[str, object]:
    asked = {"role": "user", "content": "<image>" * len(images) + "Colour?"}
    return {"messages": [asked, {"role": "assistant", "content": "Blue" + "!" * len(images)}], "images": [f"{name}.png" for name in images]}


def take_steps(rank: int, spec: TrainSpec) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step over all ranks, and at last the loss of the last batch without a gradient."""
    places = resolve(spec.data)
    assert places.train
    samples = read_samples(places.train, places.images)[0]
    family = find_family(spec.model.family)
    torch.manual_seed(spec.seed)
    start = create_on_meta if spec.partitioned and rank != SOURCE_RANK else partial(create_random, device=CPU)
    model = start(spec.model, family, loading_dtype(spec.precision))
    staged = apply_stage(model, spec, family.unused(model))
    if spec.partitioned:
        partition_model(staged.model, spec, CPU)
    engine, processor = start_engine(staged.model, spec, CPU, rates=staged.rates), family.create_processor(spec.model)
    watchdog, found = Watchdog(timeout_s=0, rank=rank, stream=io.StringIO(), end=sys.exit), []
    engine.model.train()
    for step in range(len(STEPS)):
        first = 2 * (step * len(STEPS[0]) + rank)
        batch = collate(samples[first : first + 2], processor, spec)
        row, _ = train_step(engine, (batch,), spec, step + 1, own_requests=StepRequests, watchdog=watchdog, peak_bytes=0)
        found.append((row.loss, row.grad_norm))
    engine.model.eval()
    with torch.no_grad():
        found.append((float(engine.sum_over_ranks(float(engine.loss_sum(batch)))), 0.0))
    engine.handle.destroy()
    return found
