"""The error of the memory estimate: the plan's formula and the trace, compared with real steps on the CPU.

    python tests/benchmarks/fit_error.py [--rows FILE.json] [--only WORD]

Small models of every family take two real steps in the real engine, on one rank and on two; memory_model.allocation_tracker records every tensor that is
allocated and freed, including weights, DeepSpeed's buffers and the optimizer; the peak of the second step is compared. Workspace inside a
kernel and the context of a device are not measured. Prints the table of docs/fit.md, and the errors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.memory.estimate import estimate_memory
from launcher.plan.plan import LocalContext, train_spec
from trainer.contract import TrainSpec
from trainer.device.dtype import loading_dtype
from trainer.distributed.engine import start_distributed, start_engine
from trainer.memory_model.allocation_tracker import AllocationTracker
from trainer.memory_model.synthetic_batch import make_synthetic_batch
from trainer.memory_model.trace import trace
from trainer.models.registry import find_family
from trainer.models.weight import round_weights
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import apply_stage, assign_groups
from trainer.train.loop import accumulate

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.03  # by which an estimate may be below the measurement
HEADINGS = (
    *("family", "stage", "precision", "rows x tokens", "checkpointing", "strategy x ranks"),
    *("planned MiB", "traced MiB", "measured MiB", "plan", "trace"),
)
LINEAR = torch.nn.functional.linear  # ZeRO 3 of one case replaces it
HERE = LocalContext(project=ROOT, here=ROOT, interpreter=sys.executable, user="0:0")
TEXT = "model.architecture.text"
VISION = "model.architecture.vision"
# About 5 million parameters, most of them in the decoder.
SIZES = (
    *(f"{TEXT}.hidden_size=256", f"{TEXT}.intermediate_size=704", f"{TEXT}.num_hidden_layers=4", f"{TEXT}.num_attention_heads=4"),
    *(f"{TEXT}.vocab_size=2048", f"{VISION}.hidden_size=128", f"{VISION}.intermediate_size=512", f"{VISION}.num_hidden_layers=2"),
    "model.context=4096",
)
ALL = "stage.trainable=[vision,projector,lm,head]"
ROTARY = "rope_parameters={rope_type: default, rope_theta: 10000.0, mrope_section: [8, 12, 12]}"
FAMILIES: dict[str, tuple[str, ...]] = {
    "llava": ("model=tiny_llava", f"{TEXT}.num_key_value_heads=4"),
    "internvl": ("model=tiny_internvl", f"{TEXT}.num_key_value_heads=2"),
    "qwen2_5_vl": (
        "model=tiny_qwen2_5_vl",
        f"{TEXT}.num_key_value_heads=2",
        f"{VISION}.options.out_hidden_size=256",
        f"{TEXT}.options.{ROTARY}",
    ),
    "qwen2_5_omni": (
        *("model=tiny_qwen2_5_omni", f"{TEXT}.num_key_value_heads=2", f"{VISION}.options.out_hidden_size=256", f"{TEXT}.options.{ROTARY}"),
        "model.architecture.audio.output_dim=256",
    ),
    "minicpm_v_4_6": (
        *("model=tiny_minicpm_v_4_6", f"{TEXT}.num_key_value_heads=2", f"{TEXT}.head_dim=64"),
        f"{TEXT}.options.layer_types=[linear_attention,linear_attention,linear_attention,full_attention]",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    stage: str
    precision: str
    length: int
    checkpointing: bool = False
    strategy: str = "ddp"
    ranks: int = 1
    rows: int = 1
    more: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        strategy = "single" if self.ranks == 1 and self.strategy == "ddp" else self.strategy
        again = str(self.checkpointing).lower()
        return (
            *("tune=null", *FAMILIES[self.family], *SIZES, f"stage={self.stage}", f"precision={self.precision}", *self.more),
            *(f"strategy={strategy}", f"strategy.gradient_checkpointing={again}", f"strategy.micro_batch={self.rows}"),
            *(f"stage.global_batch={self.rows * self.ranks}", f"cluster.devices_per_node={self.ranks}"),
            *("data=files", "data.train=none.json", "data.images=none", f"data.max_length={self.length}"),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    case: Case
    planned_bytes: int
    traced_bytes: int
    measured_bytes: int
    planned_items: dict[str, int]
    traced_items: dict[str, int]
    measured_items: dict[str, int]


def case(family: str, stage: str, precision: str, length: int, **more: object) -> Case:
    return Case(family=family, stage=stage, precision=precision, length=length, **more)  # type: ignore[arg-type]


CASES = (
    case("llava", "full", "fp32", 256),
    case("llava", "full", "fp32", 512, checkpointing=True),
    case("llava", "full", "bf16", 256),
    case("llava", "full", "bf16", 512, checkpointing=True),
    case("llava", "full", "pure_bf16", 512, strategy="zero1"),
    case("llava", "full", "bf16", 512, strategy="zero2"),
    case("llava", "full", "fp32", 128, more=(ALL,)),
    case("llava", "lora", "bf16", 512),
    case("llava", "lora", "fp32", 256, checkpointing=True),
    case("llava", "projector", "bf16", 512),
    case("llava", "projector", "fp32", 256, checkpointing=True),
    case("internvl", "full", "fp32", 256),
    case("internvl", "full", "bf16", 512, checkpointing=True),
    case("internvl", "lora", "bf16", 512),
    case("internvl", "projector", "bf16", 256),
    case("internvl", "full", "bf16", 256, more=(ALL,)),
    case("qwen2_5_vl", "full", "fp32", 512),
    case("qwen2_5_vl", "full", "bf16", 256),
    case("qwen2_5_vl", "full", "bf16", 1024, checkpointing=True),
    case("qwen2_5_vl", "full", "fp32", 128, rows=4),
    case("qwen2_5_vl", "lora", "bf16", 512),
    case("qwen2_5_vl", "lora", "fp32", 256, checkpointing=True),
    case("qwen2_5_vl", "projector", "bf16", 256, checkpointing=True),
    case("qwen2_5_vl", "full", "bf16", 256, more=(ALL,)),
    case("qwen2_5_omni", "full", "bf16", 512),
    case("qwen2_5_omni", "lora", "bf16", 256, checkpointing=True),
    case("minicpm_v_4_6", "full", "bf16", 256),
    case("minicpm_v_4_6", "full", "fp32", 512, checkpointing=True),
    case("minicpm_v_4_6", "lora", "bf16", 256),
    case("minicpm_v_4_6", "projector", "bf16", 512, checkpointing=True),
    case("llava", "full", "fp32", 256, strategy="ddp", ranks=2),
    case("llava", "full", "bf16", 256, strategy="zero1", ranks=2),
    case("llava", "full", "bf16", 256, strategy="zero2", ranks=2),
    case("llava", "full", "bf16", 256, strategy="zero3", ranks=2),
    case("qwen2_5_vl", "full", "fp32", 256, strategy="zero2", ranks=2),
    case("qwen2_5_vl", "full", "bf16", 512, strategy="zero3", ranks=2, checkpointing=True),
    case("qwen2_5_vl", "lora", "bf16", 512, strategy="zero3", ranks=2),
    case("llava", "lora", "fp32", 512, strategy="zero2", ranks=2),
    case("internvl", "lora", "pure_bf16", 256, strategy="zero3", ranks=2),
    case("qwen2_5_vl", "projector", "bf16", 256, strategy="zero3", ranks=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="write the measured rows to this JSON file")
    parser.add_argument("--only", default="", help="only cases whose overrides contain this word")
    parser.add_argument("--ranks", type=int, default=0, help="measure the cases with this number of ranks in this process")
    arguments = parser.parse_args()
    if arguments.ranks:
        measure_all(arguments.ranks, arguments.only, Path(arguments.rows))
        return
    rows: list[dict[str, Any]] = []
    for ranks in sorted({each.ranks for each in chosen(arguments.only)}):
        with tempfile.TemporaryDirectory() as folder:
            start_ranks(ranks, arguments.only, Path(folder) / "rows.json")
            rows += json.loads((Path(folder) / "rows.json").read_text())
    if arguments.rows:
        Path(arguments.rows).write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


def chosen(only: str, ranks: int = 0) -> tuple[Case, ...]:
    return tuple(each for each in CASES if only in " ".join(each.words) and ranks in (0, each.ranks))


def start_ranks(ranks: int, only: str, rows: Path) -> None:
    argv = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__)
    more = ("--ranks", str(ranks), "--only", only, "--rows", str(rows))
    subprocess.run((*argv, *more), cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"})


# --------------------------------------------------------------------------------------------------------------- measuring


def measure_all(ranks: int, only: str, target: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    joined = False
    for each in chosen(only, ranks):
        config = sized(each)
        with tempfile.TemporaryDirectory() as folder:
            spec = train_spec(config, replace(HERE, here=Path(folder)), run_id="fit")
            if not joined:
                start_distributed(spec.device)
                joined = True
            planned = estimate_memory(config)
            report = trace(spec)
            measured = measure(spec)
        highest = next(phase for phase in report.phases if phase.phase == report.peak_phase)
        rows.append(
            Row(
                case=each,
                planned_bytes=planned.total_bytes,
                traced_bytes=report.peak_bytes,
                measured_bytes=sum(measured.values()),
                planned_items={item.name: item.size_bytes for item in planned.items},
                traced_items={"phase " + report.peak_phase: 0, **highest.items_bytes},
                measured_items=measured,
            )
        )
        if torch.distributed.get_rank() == 0:
            print("  ".join(cells(asdict(rows[-1]))), flush=True)
    if torch.distributed.get_rank() == 0:
        target.write_text(json.dumps([asdict(row) for row in rows]))
    torch.distributed.destroy_process_group()


def sized(each: Case) -> Config:
    """The config of the case, with the actual parameter counts of its model."""
    config = compose(each.words, ROOT / "conf")
    spec = train_spec(config, HERE, run_id="fit")
    with torch.device("meta"):
        model = find_family(spec.model.family).create(spec.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = dict.fromkeys(("vision", "projector", "lm", "head", "other"), 0)
    for name, group in assign_groups(spec.model.groups, sizes).items():
        found[group] += sizes[name]
    parameters = replace(config.model.parameters, total=sum(sizes.values()), **found)
    config = replace(config, model=replace(config.model, parameters=parameters))
    return resolve(config).config


def measure(spec: TrainSpec) -> dict[str, int]:
    """Kind -> bytes at the peak of the second step."""
    family, dtype = find_family(spec.model.family), loading_dtype(spec.precision)
    torch.manual_seed(0)
    model = round_weights(family.create(spec.model), dtype)
    if spec.gradient_checkpointing:
        checkpoint_layers(model, spec)
    staged = apply_stage(model, spec, family.unused(model))
    batch = make_synthetic_batch(family.create_processor(spec.model), spec).batch
    tracker = AllocationTracker()
    with tracker:
        for tensor in (*staged.model.parameters(), *staged.model.buffers()):
            tracker.assign(tensor, "weights")
        with tracker.during("start", "engine"):
            engine = start_engine(staged.model.to(dtype), spec, torch.device("cpu"), rates=staged.rates)
        engine.model.train()
        for phase in ("first step", "second step"):
            with tracker.during(phase, phase):
                accumulate(engine, (batch,))
                engine.step(1e-4)
    engine.handle.destroy()
    torch.nn.functional.linear = LINEAR
    return dict(tracker.peaks["second step"].kinds_bytes)


# --------------------------------------------------------------------------------------------------------------- output


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    each, measured = row["case"], row["measured_bytes"]
    stage = f"{each['stage']}, vision too" if ALL in each["more"] else each["stage"]
    strategy = each["strategy"] if each["ranks"] > 1 or each["strategy"] != "ddp" else "single"
    sizes = (row["planned_bytes"], row["traced_bytes"], measured)
    return (
        *(each["family"], stage, each["precision"], f"{each['rows']} x {each['length']}", "yes" if each["checkpointing"] else "no"),
        *(f"{strategy} x {each['ranks']}", *(f"{size / 2**20:.1f}" for size in sizes)),
        *(f"{size / measured - 1:+.1%}" for size in sizes[:2]),
    )


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A Markdown table, and the errors."""
    for line in (HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)):
        print(f"| {' | '.join(line)} |")
    for key, most in (("planned", 0.10), ("traced", 0.05)):
        errors = [row[f"{key}_bytes"] / row["measured_bytes"] - 1 for row in rows]
        within = sum(-LEAST <= error <= most for error in errors)
        spread = f"mean {sum(map(abs, errors)) / len(errors):.1%}, {min(errors):+.1%} to {max(errors):+.1%}"
        print(f"{key}: {spread}; between {-LEAST:+.0%} and {most:+.0%}: {within} of {len(errors)}")


if __name__ == "__main__":
    main()
