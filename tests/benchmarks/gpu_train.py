"""Training of full-size models on one accelerator with `omnilaunch launch`: tokens/s, MFU and peak memory.

    python tests/benchmarks/gpu_train.py [--jobs vlm,lora] [--folder /dev/shm/gpu_train] [KEY=VALUE ...]
    python tests/benchmarks/gpu_train.py --tiny

Needs one device of `--hardware` and no network: the weights are random, the data synthetic. `vlm`: Qwen2.5-VL-7B, projector and decoder
fully trained in pure_bf16, an image of 768 tokens in each sample. `lora`: adapters in the 8B decoder of InternVL3.5-8B, text only.
Both: samples of 1,024 tokens, four in a packed row of 4,096. The first `--warm-up` steps do not count; the rates are the tokens and FLOPs of
all other steps divided by their seconds, from metrics.jsonl. MFU: tests/benchmarks/flop.py has the formula and its source, conf/hardware the
peak. Memory: the peak of first and later steps, allocated to tensors and reserved by the allocator. `--tiny`: the same on the CPU with tiny
models, to try it. KEY=VALUE: overrides for every launch, which replace those of this file. The final checkpoint of a run, 17 GB for `vlm`,
is written to `--folder`: a memory file system is the fastest.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launcher.config.compose import compose  # noqa: E402  # after the path to it
from launcher.config.schema import Config  # noqa: E402
from tests.benchmarks.flop import Shape, count_sample  # noqa: E402
from trainer.contract import ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, EnvReport, StepRow, TrainResult, decode, read  # noqa: E402

QUESTION = 16  # digits, one token each
TRAINING = ("first step", "steps")  # phases whose memory is reported


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`figure`: a field of Figures."""

    figure: str
    least: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """`samples` of `tokens` tokens per step, in rows of `row` tokens; `image`: (width, height) in pixels of the image in each sample."""

    model: str
    overrides: dict[str, str]
    samples: int
    tokens: int
    row: int
    image: tuple[int, int] | None
    goals: tuple[Goal, ...]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of the steps that count. `mfu`: None if conf/hardware has no peak for the dtype. `spread`: (longest - shortest) / median of the seconds
    of a step. `peak_tflops`: of the device. Memory in bytes; reserved is 0 if there is no allocator to ask."""

    steps: int
    tokens_per_s: float
    step_s: float
    spread: float
    tflops: float
    peak_tflops: float | None
    mfu: float | None
    allocated_bytes: int
    reserved_bytes: int


JOBS = {
    "vlm": Job(
        model="qwen2_5_vl_7b",
        overrides={"stage": "full", "precision": "pure_bf16"},  # with float32 master weights the states alone are 130 GiB
        samples=64,
        tokens=1024,
        row=4096,
        image=(896, 672),  # 48 complete windows, 3,072 patches, 768 tokens
        goals=(Goal(figure="mfu", least=0.35, text="MFU >= 35 %"),),
    ),
    "lora": Job(
        model="internvl3_5_8b",
        overrides={"stage": "lora", "stage.needs": "[]", "precision": "bf16"},
        samples=32,
        tokens=1024,
        row=4096,
        image=None,
        goals=(Goal(figure="tokens_per_s", least=12500, text=">= 12,500 tokens/s"),),
    ),
}
TINY_MODELS = {"vlm": "tiny_qwen2_5_vl", "lora": "tiny_internvl"}


def make_tiny(name: str, job: Job) -> Job:
    image = (32, 32) if job.image else None
    return replace(job, model=TINY_MODELS[name], samples=8, tokens=192, row=384, image=image, goals=())


# ------------------------------------------------------------------------------------------------------------------ the data


def write_data(folder: Path, job: Job, rows: int) -> Shape:
    """Writes `rows` conversations of exactly job.tokens tokens to folder/train.json, each with its own image if the job has images. Each digit
    is one token, because the tokenizer of a random start has no merges with digits."""
    (folder / "images").mkdir(parents=True)
    shape, answer = measure(job)
    given = []
    for number in range(rows):
        draw = random.Random(number)
        texts = ["".join(draw.choices("0123456789", k=digits)) for digits in (QUESTION, answer)]
        image = f"{number}.jpg" if job.image else ""
        if job.image:
            write_image(folder / "images" / image, job.image, number)
        turns = [{"role": "user", "content": ("<image>\n" if image else "") + texts[0]}, {"role": "assistant", "content": texts[1]}]
        given.append({"images": [image] if image else [], "messages": turns})
    (folder / "train.json").write_text(json.dumps(given), encoding="utf-8")
    return shape


def write_image(file: Path, size: tuple[int, int], seed: int) -> None:
    """Smooth colours, so that the JPEG has a usual size."""
    import numpy as np
    from PIL import Image

    spots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).save(file, quality=90)


def measure(job: Job) -> tuple[Shape, int]:
    """The shape of a sample, and the number of digits in its answer that fill it, with the trainer's processor. Exits if the rest is too long."""
    from trainer.data.encode import encode, image_id
    from trainer.data.rows.sample import Message, Sample
    from trainer.models.registry import find_family
    from trainer.models.tiny import read_model

    model = read_model(ROOT / "conf" / "model" / f"{job.model}.yaml")
    processor = find_family(model.family).create_processor(model)
    spans = [processor.span(job.image, 0)] if job.image else []
    mark = image_id(processor.tokenizer, model.image_token)

    def read_shape(digits: int) -> Shape:
        question = Message(role="user", content="<image>\n" * len(spans) + "0" * QUESTION)
        talk = (question, Message(role="assistant", content="0" * digits))
        sample = Sample(id="", images=(Path("0.jpg"),) * len(spans), messages=talk, file="", row=1)
        made = encode(sample, processor.tokenizer, model.template, model.image_token, spans, 2**31)
        trained = sum(label >= 0 for label in made.labels)
        return Shape(tokens=len(made.input_ids), trained=trained, image_tokens=made.input_ids.count(mark))

    digits = job.tokens - read_shape(1).tokens + 1
    if digits < 1 or read_shape(digits).tokens != job.tokens:
        sys.exit(f"{job.model}: {job.tokens} tokens cannot be filled: {read_shape(1).tokens} go to the template and the image")
    return read_shape(digits), digits


# ------------------------------------------------------------------------------------------------------------------- the run


def make_overrides(job: Job, data: Path, arguments: argparse.Namespace) -> tuple[str, ...]:
    given = {
        "hardware": arguments.hardware,
        "model": job.model,
        "model.source.kind": "random",
        **job.overrides,
        "stage.global_batch": f"{job.samples}",
        "strategy.micro_batch": "1",
        "data": "files",
        "data.train": f"{data / 'train.json'}",
        "data.images": f"{data / 'images'}",
        "data.max_length": f"{job.row}",
        "data.packing": "true",
        "data.workers": "0" if arguments.tiny else "8",
        "cluster.runtime": "process",
        "cluster.devices_per_node": "1",
        "cluster.root": f"{arguments.folder}",
        "run.steps": f"{arguments.warm_up + arguments.steps}",
        "run.evaluation.enabled": "false",
        **dict(override.split("=", 1) for override in arguments.overrides),
    }
    return tuple(f"{key}={value}" for key, value in given.items())


def launch(folder: Path, name: str, overrides: Sequence[str]) -> tuple[Path, float]:
    """One real `omnilaunch launch`: the folder of the run, and the seconds of the command. Exits with its last output if it fails."""
    argv = (sys.executable, "-m", "launcher.cli", "launch", "--run-id", name, *overrides)
    log, started = folder / f"{name}.log", time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(argv, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed ({done.returncode}):\n{log.read_text(encoding='utf-8')[-6000:]}")
    return folder / "runs" / name, time.perf_counter() - started


def read_rows(run: Path) -> tuple[StepRow, ...]:
    return tuple(decode(StepRow, json.loads(line)) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines())


def summarise(rows: Sequence[StepRow], result: TrainResult, config: Config, shape: Shape, *, warm_up: int) -> Figures:
    """Raises ValueError for a step with samples of another shape: its FLOPs are unknown."""
    counted = rows[warm_up:]
    expected = config.stage.global_batch * shape.tokens
    if not counted or any(row.tokens != expected for row in counted):
        raise ValueError(f"steps of {sorted({row.tokens for row in counted})} tokens; expected {expected}")
    seconds = [row.seconds for row in counted]
    flops = config.stage.global_batch * sum(count_sample(config, shape).values())
    peak = next((peak.tflops for peak in config.hardware.peaks if peak.dtype == config.precision.compute), None)
    tflops = flops * len(counted) / sum(seconds) / 1e12
    held = [peak for peak in result.peaks if peak.phase in TRAINING]
    return Figures(
        steps=len(counted),
        tokens_per_s=expected * len(counted) / sum(seconds),
        step_s=statistics.median(seconds),
        spread=(max(seconds) - min(seconds)) / statistics.median(seconds),
        tflops=tflops,
        peak_tflops=peak,
        mfu=None if peak is None else tflops / peak,
        allocated_bytes=max(peak.allocated_bytes for peak in held),
        reserved_bytes=max(peak.reserved_bytes for peak in held),
    )


def measure_job(name: str, job: Job, arguments: argparse.Namespace) -> dict[str, object]:
    steps = arguments.warm_up + arguments.steps
    shape = write_data(arguments.folder / "data" / name, job, steps * job.samples)  # no sample is used twice
    overrides = make_overrides(job, arguments.folder / "data" / name, arguments)
    run, wall_s = launch(arguments.folder, name, overrides)
    config = compose(overrides, ROOT / "conf")
    result, environment = read(TrainResult, run / RESULT_FILE), read(EnvReport, run / ENVIRONMENT_FILE)
    figures = summarise(read_rows(run), result, config, shape, warm_up=arguments.warm_up)
    for line in describe(name, job, figures, count_sample(config, shape), shape):
        print(line)
    print(f"  {', '.join(environment.devices)}, torch {environment.packages.get('torch', '?')}; command {wall_s:.0f} s", flush=True)
    return {"job": name, "overrides": overrides, "shape": asdict(shape), "wall_s": wall_s, **asdict(figures)}


def describe(name: str, job: Job, figures: Figures, flops: dict[str, float], shape: Shape) -> Iterator[str]:
    total = sum(flops.values())
    parts = ", ".join(f"{part} {share / total:.1%}" for part, share in flops.items() if share)
    mfu = "no peak known" if figures.mfu is None else f"{figures.mfu:.1%} of {figures.peak_tflops:g} TFLOP/s"
    yield f"\n{name}: {job.model}, {job.samples} samples of {shape.tokens} tokens per step in rows of {job.row}, {figures.steps} steps"
    yield f"  {'tokens/s':<18}{figures.tokens_per_s:>14,.0f}   a step {figures.step_s:.3f} s, spread {figures.spread:.0%}"
    yield f"  {'TFLOP/s':<18}{figures.tflops:>14.4g}   {total / shape.tokens / 1e9:.4g} GFLOP a token: {parts}"
    yield f"  {'MFU':<18}{mfu:>14}"
    yield f"  {'peak allocated':<18}{figures.allocated_bytes / 2**30:>10.2f} GiB"
    yield f"  {'peak reserved':<18}{figures.reserved_bytes / 2**30:>10.2f} GiB"
    for goal in job.goals:
        value = getattr(figures, goal.figure)
        verdict = "unknown" if value is None else "reached" if value >= goal.least else "not reached"
        yield f"  goal {goal.text}: {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--hardware", default="", help="of conf/hardware; default h200, with --tiny cpu")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--folder", type=Path, help="for data and runs; not deleted. Default: a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.jobs.split(",") if name not in JOBS]:
        parser.error(f"--jobs: {', '.join(unknown)} is not one of {', '.join(JOBS)}")
    if arguments.steps < 1 or any("=" not in override for override in arguments.overrides):
        parser.error("--steps must be at least 1, and overrides KEY=VALUE")
    if arguments.folder and (arguments.folder / "data").exists():
        parser.error(f"--folder: {arguments.folder} already contains a measurement; use another folder")
    arguments.hardware = arguments.hardware or ("cpu" if arguments.tiny else "h200")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = (arguments.folder or Path(temporary)).resolve()
        jobs = {name: make_tiny(name, JOBS[name]) if arguments.tiny else JOBS[name] for name in arguments.jobs.split(",")}
        found = [measure_job(name, job, arguments) for name, job in jobs.items()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
