"""Our trainer compared with Hugging Face's Trainer: the same tiny model, samples, batch, precision (float32) and threads, on the CPU.

    python tests/benchmarks/train_speed.py [--steps 75] [--repeats 3] [--threads 1] [--sets digits,mixed]

Hugging Face's Trainer needs accelerate: pip install accelerate. Each way runs in a separate process, alternately, `repeats` times; the
figures are medians of the mean step after the first 15, for `mixed` one epoch. Both use our collate in the process of the loop
(data.workers=0, dataloader_num_workers=0), and keep processed images and texts between epochs. `mixed`: conversations of 20 to 500 tokens,
three out of four with an image. A step is 16 samples: one micro-batch padded to its longest sample, or with packing rows of at most 512
tokens, one per micro-batch; ours, as always on a CPU, has no padding: the 16 samples in one row. useful: the fraction of computed tokens that
belong to samples.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.trainer.conftest import make_spec  # noqa: E402  # after the path to it
from trainer.contract import METRICS_FILE, SPEC_FILE, Batch, DataSpec, TrainSpec, read, write  # noqa: E402

WORDS = ("which", "of", "these", "is", "in", "the", "picture", "what", "does", "it", "show", "and", "why", "would", "one", "say", "so")
GLOBAL_BATCH, ROOM, ROWS = 16, 512, 240
WARM_UP = ROWS // GLOBAL_BATCH  # steps


@dataclass(frozen=True, kw_only=True)
class Way:
    """`data`: fields of the spec's data section. `trainer`: whose loop; `arguments`: of Hugging Face's TrainingArguments."""

    trainer: Callable[[TrainSpec, dict[str, Any]], dict[str, float]]
    data: dict[str, Any]
    arguments: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------- the data


def write_mixed(root: Path) -> DataSpec:
    """Log-normal lengths, as in instruction data; always the same."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(ROWS):
        words = int(np.clip(random.lognormal(3.0, 1.0), 4, 160))
        text = [str(word) for word in random.choice(WORDS, words)]
        cut = max(2, words // 3)
        image = f"{number}.png" if random.random() < 0.75 else None
        if image:
            sides = random.integers(40, 200, 2)
            Image.fromarray(random.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(root / "images" / image)
        question = ("<image>\n" if image else "") + " ".join(text[:cut])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(text[cut:])}]
        rows.append({"images": [image] if image else [], "messages": turns})
    (root / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return DataSpec(
        name="files", builtin="", root=str(root), train="train.json", evaluation="", images="images", max_length=ROOM, workers=0
    )


def plan(output: Path, data: DataSpec, steps: int, threads: int, changes: dict[str, Any]) -> TrainSpec:
    """Training of conf/model/tiny_llava.yaml, without evaluation. Its context is as long as the rows."""
    micro = 1 if changes.get("packing") else GLOBAL_BATCH
    spec = make_spec(output, output, width=96, micro=micro, accumulation=GLOBAL_BATCH // micro)
    text = {**spec.model.architecture["text"], "max_position_embeddings": 1024}
    return replace(
        spec,
        steps=steps,
        model=replace(spec.model, architecture={**spec.model.architecture, "text": text}),
        data=replace(data, **changes),
        batch=Batch(global_batch=GLOBAL_BATCH, micro_batch=micro, accumulation=GLOBAL_BATCH // micro),
        device=replace(spec.device, threads=threads),
        evaluation=replace(spec.evaluation, enabled=False),
    )


# ------------------------------------------------------------------------------------------------------------------ both loops


def run_ours(spec: TrainSpec, _: dict[str, Any]) -> dict[str, float]:
    from trainer.programs.dispatch import run_stage

    run_stage(spec, dict(os.environ))
    rows = [json.loads(line) for line in (Path(spec.output) / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return {"seconds": statistics.mean(row["seconds"] for row in rows[WARM_UP:])}


def run_theirs(spec: TrainSpec, arguments: dict[str, Any]) -> dict[str, float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from trainer.data.batch.cache import Cache
    from trainer.data.batch.collate import collate
    from trainer.data.batch.load import CACHE_BYTES, keep_lengths

    torch.manual_seed(spec.seed)
    model, processor, samples = load(spec)
    cache = Cache(CACHE_BYTES)
    # Sorting by length measures all samples before, so that all texts are already encoded; the others encode each text when it is used, as we do.
    sorts = "train_sampling_strategy" in arguments
    lengths = keep_lengths(samples, processor, spec, cache)(range(len(samples))) if sorts else [1] * len(samples)

    class Timer(TrainerCallback):
        began = ended = 0.0

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP:
                Timer.began = time.perf_counter()

        def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            Timer.ended = time.perf_counter()

    settings = {
        "output_dir": spec.output,
        "max_steps": spec.steps,
        "per_device_train_batch_size": GLOBAL_BATCH,
        "dataloader_drop_last": True,
        "learning_rate": spec.optimizer.lr,
        "weight_decay": spec.optimizer.weight_decay,
        "max_grad_norm": spec.optimizer.clip_norm,
        "lr_scheduler_type": "linear",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": spec.seed,
        **arguments,
    }
    rows = [{"input_ids": range(length), "sample": sample} for sample, length in zip(samples, lengths, strict=True)]
    Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=lambda items: collate([item["sample"] for item in items], processor, spec, cache),
        callbacks=[Timer()],
    ).train()
    return {"seconds": (Timer.ended - Timer.began) / (spec.steps - WARM_UP)}


def load(spec: TrainSpec) -> tuple[Any, Any, Any]:
    """A random model with its processor, and the samples."""
    import torch

    from trainer.data.check import prepare, resolve
    from trainer.data.rows.sample import read_samples
    from trainer.models.registry import find_family

    torch.set_num_threads(spec.device.threads)
    prepare(spec.data)
    places = resolve(spec.data)
    samples, problems = read_samples(places.train, places.images)
    if problems:
        sys.exit("\n".join(map(str, problems)))
    family = find_family(spec.model.family)
    return family.create(spec.model), family.create_processor(spec.model), samples


def count_useful(spec: TrainSpec) -> dict[str, float]:
    """For our batches, over all steps: the fraction of tokens that belong to a sample, and their number per step."""
    from trainer.data.batch.load import batches

    _, processor, samples = load(spec)
    useful = computed = 0
    for step in batches(samples, processor, spec, rank=0, first_step=0):
        useful += sum(int(micro["attention_mask"].sum()) for micro in step)
        computed += sum(micro["input_ids"].numel() for micro in step)
    return {"useful": useful / computed, "tokens": useful / spec.steps}


WAYS = {
    "hf": Way(trainer=run_theirs, data={}, arguments={}),
    "hf, by length": Way(trainer=run_theirs, data={}, arguments={"train_sampling_strategy": "group_by_length"}),
    "ours": Way(trainer=run_ours, data={"padding_free": True}, arguments={}),  # as in a plan for a CPU
    "ours, padded": Way(trainer=run_ours, data={}, arguments={}),
    "ours, by length": Way(trainer=run_ours, data={"length_aware": "window"}, arguments={}),
    "ours, packed": Way(trainer=run_ours, data={"packing": True}, arguments={}),
}


# -------------------------------------------------------------------------------------------------------------- the comparison


def measure(folder: Path, way: str, spec: TrainSpec, task: str) -> dict[str, float]:
    """One way, in a separate process."""
    folder.mkdir(parents=True)
    spec = replace(spec, output=str(folder))
    write(spec, folder / SPEC_FILE)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    threads = str(spec.device.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu", **(variables if way.startswith("ours") else {})}
    command = (sys.executable, __file__, "--task", task, "--way", way, "--spec", str(folder / SPEC_FILE))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(folder: Path, name: str, data: DataSpec, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    specs = {way: plan(folder, data, arguments.steps, arguments.threads, WAYS[way].data) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats):
        for way in WAYS:
            seconds[way].append(measure(folder / f"{repeat}" / way, way, specs[way], "run")["seconds"])
    found = {}
    for way in WAYS:
        counted = measure(folder / "count" / way, way, specs[way], "count")
        step = statistics.median(seconds[way])
        found[way] = {
            "samples_per_s": GLOBAL_BATCH / step,
            "useful_tokens_per_s": counted["tokens"] / step,
            "useful": counted["useful"],
            "spread": (max(seconds[way]) - min(seconds[way])) / step,
        }
    show(name, found)
    return found


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    base = found["hf"]["samples_per_s"]
    print(f"\n{name:<18}{'samples/s':>12}{'beside hf':>12}{'useful tok/s':>14}{'useful':>9}{'spread':>9}")
    for way, row in found.items():
        useful = f"{row['useful']:>9.1%}" if way != "hf, by length" else f"{'':>9}"  # its order is not ours
        rate = f"{row['useful_tokens_per_s']:>14,.0f}"
        print(f"{way:<18}{row['samples_per_s']:>12.1f}{row['samples_per_s'] / base:>12.2f}{rate}{useful}{row['spread']:>9.0%}")
    packed = found["ours, packed"]["useful_tokens_per_s"] / found["ours, padded"]["useful_tokens_per_s"]
    print(
        f"{name}: {found['ours']['samples_per_s'] / base:.2f} x hf (goal 1.2); packed {packed:.2f} x padded useful tokens/s (goal 2 on mixed),"
    )
    print(f"  {found['ours, packed']['useful']:.1%} of the packed tokens useful (goal 98 %)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sets", default="digits,mixed")
    parser.add_argument("--task", choices=("run", "count"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that are not measured")
    if arguments.task:
        spec, way = read(TrainSpec, arguments.spec), WAYS[arguments.way]
        print(json.dumps(way.trainer(spec, way.arguments) if arguments.task == "run" else count_useful(spec)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        digits = make_spec(root, root / "digits").data
        sets = {"digits": lambda: replace(digits, max_length=ROOM), "mixed": lambda: write_mixed(root / "mixed")}
        found = {name: compare(root / "runs" / name, name, sets[name](), arguments) for name in arguments.sets.split(",")}
    print(json.dumps({"steps": arguments.steps, "repeats": arguments.repeats, "threads": arguments.threads, "sets": found}))


if __name__ == "__main__":
    main()
