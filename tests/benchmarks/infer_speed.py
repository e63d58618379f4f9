"""Rows/s of stage infer for a file, compared with transformers' plain generate for one row at a time, with the same model in the same run.

    python -m tests.benchmarks.infer_speed [--rows 256] [--batch 32] [--new 64] [--width 256] [--layers 6] [--images 40]

A LLaVA with random weights, so that every answer has the maximum length: only the speed is compared. Both read the same rows: one of
`--images` different photos each, and questions of 1 to 40 words. Plain: open the image, call the processor, generate, decode. Ours: answer the
file and write its rows, without loading the model. The answers must be the same.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.trainer.conftest import architecture, make_spec
from trainer.contract import Inference, Sampling, StageSpec, TrainSpec, WeightsLineage
from trainer.data.batch.collate import collate_prompts
from trainer.data.rows.request import read_requests
from trainer.data.rows.sample import Message, Sample
from trainer.device.device import DEVICES
from trainer.device.rank import Rank
from trainer.generation.text_reader import end_ids
from trainer.models.family import Processor
from trainer.models.registry import find_family
from trainer.programs.infer import answer_all
from trainer.stages.group import Staged
from trainer.train.model import BuiltModel

WORDS = "which of these is shown in the picture and what would one say of it if asked".split()  # noqa: SIM905
PHOTO = (640, 480)
PLACE = Rank(number=0, local=0, world_size=1, device=DEVICES["cpu"], torch_device=torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 256), ("batch", 32), ("new", 64), ("width", 256), ("layers", 6), ("images", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="omnilaunch-infer-") as name:
        folder = Path(name)
        file = write_rows(folder, given.rows, given.images)
        spec = describe(
            folder, given.width, given.layers, Inference(input=str(file), batch=given.batch, sampling=Sampling(max_new_tokens=given.new))
        )
        family = find_family("llava")
        torch.manual_seed(0)
        model, processor = family.create(spec.model).eval(), family.create_processor(spec.model)
        plain, plain_s = answer_plainly(model, processor, spec, file)
        ours, ours_s = answer_file(model, processor, spec, file)
    same = sum(one == other for one, other in zip(plain, ours, strict=True))
    print(f"{given.rows} rows, {given.new} new tokens each, batches of {given.batch}, {torch.get_num_threads()} threads")
    print(f"plain {given.rows / plain_s:.2f} rows/s, infer {given.rows / ours_s:.2f} rows/s: {plain_s / ours_s:.2f} times as fast")
    print(f"{same} of {given.rows} answers are equal")


def write_rows(folder: Path, rows: int, images: int) -> Path:
    numbers, words = np.random.default_rng(0), random.Random(0)
    for image in range(images):
        small = numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize(PHOTO, Image.Resampling.BICUBIC).save(folder / f"{image}.jpg")
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            prompt = " ".join(words.choices(WORDS, k=words.randint(1, 40)))
            lines.write(json.dumps({"prompt": prompt, "image": f"{words.randrange(images)}.jpg"}) + "\n")
    return file


def describe(folder: Path, width: int, layers: int, inference: Inference) -> TrainSpec:
    spec = make_spec(folder, folder)
    sizes = architecture(width, layers)
    sizes["text"]["max_position_embeddings"] = 1024
    stage = StageSpec(name="infer", kind="infer", trainable=(), inference=inference)
    return replace(spec, stage=stage, model=replace(spec.model, architecture=sizes), data=replace(spec.data, max_length=1024))


def answer_plainly(model: torch.nn.Module, processor: Processor, spec: TrainSpec, file: Path) -> tuple[list[str], float]:
    """The answers, and the seconds."""
    inference = spec.stage.inference
    assert inference is not None
    began, texts = time.perf_counter(), []
    for request in read_requests(file, file.parent):
        asked = (*request.messages, Message(role="assistant", content="-"))
        sample = Sample(id="", images=request.images, messages=asked, file=str(file), row=request.row)
        batch, _ = collate_prompts([sample], processor, spec)
        ends = end_ids(processor.tokenizer, spec.model.template.end_mark)
        more = {"max_new_tokens": inference.sampling.max_new_tokens, "do_sample": False, "eos_token_id": ends}
        with torch.no_grad():
            ids = model.generate(**batch, **more, pad_token_id=processor.tokenizer.pad_token_id)  # type: ignore[operator]
        texts.append(processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts, time.perf_counter() - began


def answer_file(model: torch.nn.Module, processor: Processor, spec: TrainSpec, file: Path) -> tuple[list[str], float]:
    made = BuiltModel(staged=Staged(model=model, groups=(), rates={}), processor=processor, lineage=WeightsLineage(), kernels={})
    assert spec.stage.inference is not None
    began = time.perf_counter()
    tally = answer_all(spec, spec.stage.inference, PLACE, made, read_requests(file, file.parent))
    seconds = time.perf_counter() - began
    assert not tally.failed
    rows = (Path(spec.output) / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["answer"] for row in rows], seconds


if __name__ == "__main__":
    main()
