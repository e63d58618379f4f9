"""The arithmetic of MFU: FLOPs of real forward and backward passes counted by torch, rates from given rows, samples of exact length."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.plan.plan import LocalContext, train_spec
from tests.benchmarks.flop import Shape, count_sample
from tests.benchmarks.gpu_train import JOBS, ROOT, Job, describe, make_tiny, summarise, write_data
from trainer.contract import SCHEMA, PhasePeak, StepRow, TrainResult

TOLERANCE = 0.01  # norms, biases and position tables are not matrices; with LoRA the first layer needs no gradient of its inputs
# peft 0.21.2 uses an old name of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
DEEPER = (
    "model.architecture.text.num_hidden_layers=12",
    "model.architecture.vision.num_hidden_layers=6",
    "hardware.capability.attention=[eager]",
)
TRAINED = {
    "projector": ("stage=projector",),
    "full": ("stage=full",),
    "all": ("stage=full", "stage.trainable=[vision,projector,lm,head]"),
    "lora": ("stage=lora", "stage.needs=[]"),
}
PLACE = LocalContext(project=ROOT, here=Path("/"), interpreter="", user="")


def configure(*overrides: str) -> Config:
    config = compose(overrides, ROOT / "conf")
    return resolve(config).config


def count_by_torch(config: Config, folder: Path) -> int:
    """For one sample, forward and backward, with the loss of the trainer. Attention is eager: it computes complete matrices, as in the formula,
    and torch counts them on every device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.data.batch.collate import collate
    from trainer.data.rows.sample import read_samples
    from trainer.distributed.engine import Engine
    from trainer.models.registry import find_family
    from trainer.stages.group import apply_stage

    spec = train_spec(config, PLACE, run_id="flop")
    family = find_family(spec.model.family)
    model, processor = family.create(spec.model), family.create_processor(spec.model)
    model = apply_stage(model, spec, family.unused(model)).model
    (sample, *_), problems = read_samples(folder / "train.json", folder / "images")
    assert not problems
    engine = Engine(handle=model, model=model, device=torch.device("cpu"), rank=0, world_size=1)
    with FlopCounterMode(display=False) as counter:
        engine.loss_sum(collate([sample], processor, spec)).backward()
    return counter.get_total_flops()


def with_image(name: str) -> Job:
    return replace(make_tiny(name, JOBS[name]), image=(32, 32))


# A text without images would get a dummy image, which the formula does not count, if vision or projector are trained.
CELLS = [*((with_image(name), trained) for name, trained in product(JOBS, TRAINED)), (make_tiny("lora", JOBS["lora"]), "lora")]


@pytest.mark.parametrize(
    ("job", "trained"), CELLS, ids=lambda value: value if isinstance(value, str) else f"{value.model}{value.image or ''}"
)
def test_flops_are_those_that_torch_counts(job: Job, trained: str, tmp_path: Path) -> None:
    config = configure(f"model={job.model}", f"data.max_length={job.row}", *DEEPER, *TRAINED[trained])
    shape = write_data(tmp_path / "data", job, 1)
    assert (shape.tokens, shape.image_tokens > 0) == (job.tokens, job.image is not None)
    assert sum(count_sample(config, shape).values()) == pytest.approx(count_by_torch(config, tmp_path / "data"), rel=TOLERANCE)


def test_the_cells_are_all_there() -> None:
    assert len(CELLS) == 2 * 4 + 1


# ------------------------------------------------------------------------------------------------------------ at real size


@pytest.mark.parametrize(
    ("name", "gflop"),
    (
        # 6 N of 7.07e9 in the decoder without its 0.545e9 of embeddings, and 2 N of 0.63e9 for 3 patches per token
        ("vlm", 6 * 6.5256 + 2 * 0.6315 * 3 + 2.24),
        # NeMo AutoModel has 402 TFLOP/s at 12,473 tokens/s for an 8B decoder with LoRA, docs/performance-summary.mdx: 32.2 per token
        ("lora", 402e3 / 12473),
    ),
)
def test_a_token_at_real_size_costs_what_others_count(name: str, gflop: float) -> None:
    job = JOBS[name]
    config = configure(
        "hardware=h200", f"model={job.model}", "model.source.kind=random", *(f"{key}={job.overrides[key]}" for key in job.overrides)
    )
    answer = 184 if job.image else 955
    shape = Shape(tokens=job.tokens, trained=answer, image_tokens=768 if job.image else 0)
    assert sum(count_sample(config, shape).values()) / shape.tokens / 1e9 == pytest.approx(gflop, rel=0.01)


def test_no_formula_is_said_and_not_guessed() -> None:
    shape = Shape(tokens=64, trained=8)
    with pytest.raises(ValueError, match="no FLOP formula for Tiny MiniCPM"):
        count_sample(configure("model=tiny_minicpm_v_4_6"), shape)
    with pytest.raises(ValueError, match="are not one tile"):
        count_sample(configure("model=tiny_internvl"), replace(shape, image_tokens=20))
    with pytest.raises(ValueError, match="targets"):
        count_sample(configure("model=tiny_internvl", "stage=lora", "stage.needs=[]", "stage.lora.targets=['re:.*q_proj']"), shape)


# ---------------------------------------------------------------------------------------------------------------- the rates

SHAPE = Shape(tokens=1024, trained=955)
PEAKS = (
    PhasePeak(phase="load", allocated_bytes=90, reserved_bytes=95),
    PhasePeak(phase="first step", allocated_bytes=50, reserved_bytes=80),
    PhasePeak(phase="steps", allocated_bytes=60, reserved_bytes=70),
    PhasePeak(phase="saving", allocated_bytes=99, reserved_bytes=99),
)


def make_rows(*seconds: float, tokens: int = 32 * 1024) -> list[StepRow]:
    fields = {"steps": len(seconds), "loss": 1.0, "lr": 0.0, "grad_norm": 1.0, "samples": 32, "tokens": tokens, "peak_bytes": 0}
    return [StepRow(step=step, seconds=value, **fields) for step, value in enumerate(seconds, start=1)]  # type: ignore[arg-type]


def make_result() -> TrainResult:
    fields = {"steps": 4, "seconds": 0.0, "samples_per_s": 0.0, "final_loss": 1.0, "checkpoint": "", "weights_sha256": "", "evaluation": {}}
    return TrainResult(schema=SCHEMA, status="finished", peaks=PEAKS, **fields)  # type: ignore[arg-type]


def lora_config(*overrides: str) -> Config:
    job = JOBS["lora"]
    given = {"model": job.model, "model.source.kind": "random", **job.overrides, "stage.global_batch": "32"}
    return configure(*(f"{key}={value}" for key, value in given.items()), *overrides)


def test_rates_leave_the_first_steps_out() -> None:
    """Two steps of 2 and 3 s count: 2 x 32,768 tokens of 32.2 GFLOP in 5 s, on a device with 989 TFLOP/s."""
    config = lora_config("hardware=h200")
    figures = summarise(make_rows(100.0, 50.0, 2.0, 3.0), make_result(), config, SHAPE, warm_up=2)
    assert (figures.steps, figures.tokens_per_s, figures.step_s) == (2, pytest.approx(13107.2), 2.5)
    assert figures.spread == pytest.approx(0.4)
    assert figures.tflops == pytest.approx(13107.2 * 32.178e9 / 1e12, rel=1e-3)
    assert figures.mfu == pytest.approx(figures.tflops / 989)
    assert (figures.allocated_bytes, figures.reserved_bytes) == (60, 80)  # without loading and saving
    text = "\n".join(describe("lora", JOBS["lora"], figures, count_sample(config, SHAPE), SHAPE))
    assert "42.6% of 989 TFLOP/s" in text and ">= 12,500 tokens/s: reached" in text


def test_without_a_peak_there_is_no_mfu() -> None:
    config = lora_config("hardware=cpu")
    figures = summarise(make_rows(2.0, 3.0), make_result(), config, SHAPE, warm_up=1)
    assert figures.mfu is None and figures.peak_tflops is None
    text = "\n".join(describe("lora", JOBS["lora"], figures, count_sample(config, SHAPE), SHAPE))
    assert "no peak known" in text and ">= 12,500 tokens/s: not reached" in text


@pytest.mark.parametrize(("rows", "warm_up"), ((make_rows(1.0, 1.0, tokens=32000), 1), (make_rows(1.0), 1)))
def test_steps_of_another_size_or_none_are_no_measurement(rows: list[StepRow], warm_up: int) -> None:
    with pytest.raises(ValueError, match="expected 32768"):
        summarise(rows, make_result(), lora_config(), SHAPE, warm_up=warm_up)


# ------------------------------------------------------------------------------------------------------------ the whole path


@pytest.mark.long
def test_a_tiny_job_goes_the_whole_way(tmp_path: Path) -> None:
    """A real launch as a separate command; a folder with a measurement is refused."""
    argv = (sys.executable, "tests/benchmarks/gpu_train.py", "--tiny", "--jobs", "lora", "--warm-up", "1", "--steps", "1")
    argv = (*argv, "--folder", str(tmp_path), "hardware.threads=1", "cluster.environment.PYTHONPATH=")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no peak known" in done.stdout and "lora: tiny_internvl, 8 samples of 192 tokens" in done.stdout
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 1 and found["tokens_per_s"] > 0 and found["mfu"] is None and found["allocated_bytes"] > 2**20
    again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2 and "already contains a measurement" in again.stderr
