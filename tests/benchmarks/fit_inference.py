"""The error of the memory estimate of the stages that answer: infer, serve and evaluate, compared with real answers on the CPU.

    python tests/benchmarks/fit_inference.py [--only WORD]

Small models of every family, with patches and images of the published sizes, answer a batch of questions that fills the planned context, by the
code of the stage itself; memory_model.allocation_tracker records every tensor. Prints the table of docs/fit.md.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.memory.answering import answer_load
from launcher.memory.estimate import estimate_memory
from launcher.memory.tokens import read_answer_load
from launcher.plan.plan import LocalContext, train_spec
from trainer.contract import TrainSpec
from trainer.data.processor import Processor
from trainer.data.rows.sample import MARK, Message, Sample
from trainer.device.dtype import loading_dtype
from trainer.evaluation.evaluate import evaluate
from trainer.generation.answerer import Answerer
from trainer.generation.question import Question
from trainer.memory_model.allocation_tracker import AllocationTracker
from trainer.models.family import Limit
from trainer.models.registry import find_family
from trainer.models.weight import round_weights
from trainer.stages.group import apply_stage, assign_groups

ROOT = Path(__file__).resolve().parents[2]
HERE = LocalContext(project=ROOT, here=ROOT, interpreter=sys.executable, user="0:0")
HEADINGS = ("family", "stage", "precision", "questions x tokens", "images", "planned MiB", "measured MiB", "plan")
TEXT, VISION, OPTIONS, IMAGE = "model.architecture.text", "model.architecture.vision", "model.architecture.options", "model.image_tokens"
# Some 5 million parameters, most of them in the decoder; patches, tiles and image tokens as published.
SIZES = (
    *(f"{TEXT}.hidden_size=256", f"{TEXT}.intermediate_size=704", f"{TEXT}.num_hidden_layers=4", f"{TEXT}.num_attention_heads=4"),
    *(f"{TEXT}.vocab_size=2048", f"{TEXT}.max_position_embeddings=8192", "model.context=8192"),
    *(f"{VISION}.hidden_size=128", f"{VISION}.intermediate_size=512", f"{VISION}.num_hidden_layers=2", f"{VISION}.patch_size=14"),
)
GROUPED = f"{TEXT}.num_key_value_heads=2"
GRID = (
    *(f"{VISION}.options.window_size=112", f"{VISION}.options.out_hidden_size=256", GROUPED),
    *(f"{IMAGE}.unit=28", f"{IMAGE}.min_pixels=3136", f"{IMAGE}.max_pixels=1003520", "data.max_pixels=1003520"),
    f"{TEXT}.options.rope_parameters={{rope_type: default, rope_theta: 10000.0, mrope_section: [8, 12, 12]}}",
)
SLICED = (f"{VISION}.image_size=980", f"{IMAGE}.tokens=64", f"{IMAGE}.unit=448", f"{OPTIONS}.scale_resolution=448", GROUPED)
WHOLE = (f"{VISION}.image_size=448", f"{IMAGE}.tokens=66", f"{IMAGE}.unit=448", f"{OPTIONS}.num_query=64")
LAYERS = "layer_types=[linear_attention,linear_attention,linear_attention,full_attention]"
FAMILIES: dict[str, tuple[str, ...]] = {
    "llava": ("model=tiny_llava", f"{TEXT}.num_key_value_heads=4", f"{VISION}.image_size=336", f"{IMAGE}.tokens=576", f"{IMAGE}.unit=336"),
    "internvl": (
        *("model=tiny_internvl", GROUPED, f"{VISION}.image_size=448", f"{IMAGE}.tokens=256", f"{IMAGE}.unit=448"),
        f"{OPTIONS}.image_seq_length=256",
    ),
    "qwen2_5_vl": ("model=tiny_qwen2_5_vl", *GRID),
    "qwen2_5_omni": ("model=tiny_qwen2_5_omni", *GRID, "model.architecture.audio.output_dim=256"),
    "minicpm_v_2_6": ("model=tiny_minicpm_v_2_6", *SLICED, f"{OPTIONS}.num_query=64"),
    "minicpm_v_4_6": ("model=tiny_minicpm_v_4_6", *SLICED, f"{TEXT}.head_dim=64", f"{TEXT}.options.{LAYERS}"),
    "omnilmm_3b": ("model=tiny_omnilmm_3b", *WHOLE, f"{TEXT}.num_key_value_heads=4", f"{VISION}.options.positions=27"),
    "omnilmm": ("model=tiny_omnilmm_12b", *WHOLE, GROUPED, f"{VISION}.options.positions=16"),
}
# In pixels: as many tiles, slices or units as the plan counts.
LARGEST = {"qwen2_5_vl": (896, 1120), "qwen2_5_omni": (896, 1120), "llava": (336, 336), "omnilmm_3b": (448, 448), "omnilmm": (448, 448)}
TILED = (896, 896)
SHORT = 4  # tokens of the answers to questions that leave no more space in the context
STAGES = {
    "infer": ("stage=infer", "stage.inference.input=none.jsonl", "stage.inference.batch={rows}", "stage.inference.context={context}"),
    "serve": (
        "stage=serve",
        "stage.checkpoint=none",
        "stage.serving.max_batch={rows}",
        "stage.serving.context={context}",
        "stage.serving.max_images=1",
    ),
    "evaluate": ("stage=evaluate", "stage.checkpoint=none", "run.evaluation.batch={rows}", "data.max_length={context}"),
}
NEW = {
    "infer": "stage.inference.sampling.max_new_tokens={new}",
    "serve": "stage.serving.sampling.max_new_tokens={new}",
    "evaluate": "run.evaluation.max_new_tokens={new}",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`context`: of a question with its answer; for evaluate of the row alone. `new`: tokens of an answer."""

    family: str
    stage: str
    precision: str
    rows: int
    context: int
    new: int = 16

    @property
    def words(self) -> tuple[str, ...]:
        own = (*STAGES[self.stage], NEW[self.stage])
        numbers = {"rows": self.rows, "context": self.context, "new": self.new}
        tiles = ("data.max_tiles=4",) if self.family in ("internvl", "minicpm_v_2_6", "minicpm_v_4_6") else ()
        data = ("data=files", "data.evaluation=none.json", "data.images=none") if self.stage == "evaluate" else ()
        return (
            "tune=null",
            *FAMILIES[self.family],
            *SIZES,
            f"precision={self.precision}",
            *tiles,
            *data,
            *(word.format(**numbers) for word in own),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    case: Case
    planned_bytes: int
    measured_bytes: int
    planned_items: dict[str, int]

    @property
    def error(self) -> float:
        return self.planned_bytes / self.measured_bytes - 1


def configure(words: Sequence[str]) -> Config:
    """The config of the words. The tokens of an image are a fact about a model's processor, which no override sets: a model of another size
    has its own."""
    given = dict(word.removeprefix(f"{IMAGE}.").split("=") for word in words if word.startswith(IMAGE))
    config = compose([word for word in words if not word.startswith(IMAGE)], ROOT / "conf")
    tokens = replace(config.model.image_tokens, **{name: int(value) for name, value in given.items()})
    return replace(config, model=replace(config.model, image_tokens=tokens))


def case(family: str, stage: str, precision: str, rows: int, context: int, new: int = 16) -> Case:
    return Case(family=family, stage=stage, precision=precision, rows=rows, context=context, new=new)


CASES = (
    case("qwen2_5_vl", "serve", "bf16", 2, 1536),
    case("qwen2_5_vl", "infer", "fp32", 1, 2048),
    case("qwen2_5_vl", "evaluate", "bf16", 2, 1536),
    case("qwen2_5_vl", "serve", "bf16", 2, 8000),
    case("qwen2_5_omni", "serve", "bf16", 2, 1536),
    case("llava", "serve", "bf16", 4, 1024),
    case("llava", "infer", "fp32", 1, 4096),
    case("llava", "evaluate", "fp32", 4, 1024),
    case("llava", "evaluate", "bf16", 2, 700, 500),
    case("internvl", "serve", "bf16", 2, 1536),
    case("internvl", "infer", "fp32", 2, 1536),
    case("internvl", "evaluate", "bf16", 2, 2048),
    case("minicpm_v_2_6", "serve", "bf16", 2, 1024),
    case("minicpm_v_2_6", "evaluate", "fp32", 2, 1024),
    case("minicpm_v_4_6", "serve", "bf16", 2, 1024),
    case("minicpm_v_4_6", "infer", "fp32", 1, 2048),
    case("omnilmm_3b", "serve", "bf16", 4, 1024),
    case("omnilmm_3b", "infer", "fp32", 1, 1536),
    case("omnilmm", "serve", "bf16", 4, 1024),
    case("omnilmm", "evaluate", "fp32", 4, 1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose overrides contain this word")
    arguments = parser.parse_args()
    rows = []
    for each in (each for each in CASES if arguments.only in " ".join((each.family, *each.words))):
        rows.append(measure(each))
        print("  ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    show(rows)


def measure(each: Case, tracker: AllocationTracker | None = None) -> Row:
    """The plan's peak, and that of a real batch."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tracker = tracker or AllocationTracker()
    config = resolve(configure(each.words)).config
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(train_spec(config, HERE, run_id="fit"), output=folder)
        model, processor = build(spec)
        config = with_counts(config, spec, model)
        ask = ask_rows(each, config, spec, model, processor, Path(folder))
        with tracker:
            for tensor in (*model.parameters(), *model.buffers()):
                tracker.assign(tensor, "weights")
            with tracker.during("answer", "answer"):
                ask()
    planned = estimate_memory(config)
    return Row(
        case=each,
        planned_bytes=planned.total_bytes,
        measured_bytes=sum(tracker.peaks["answer"].kinds_bytes.values()),
        planned_items={item.name: item.size_bytes for item in planned.items},
    )


def build(spec: TrainSpec) -> tuple[nn.Module, Processor]:
    family, dtype = find_family(spec.model.family), loading_dtype(spec.precision)
    torch.manual_seed(0)
    model = round_weights(family.create(spec.model), dtype)
    staged = apply_stage(model, spec, family.unused(model))
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    return staged.model.to(dtype).eval(), family.create_processor(spec.model, limit)


def with_counts(config: Config, spec: TrainSpec, model: nn.Module) -> Config:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = dict.fromkeys(("vision", "projector", "lm", "head", "other"), 0)
    for name, group in assign_groups(spec.model.groups, sizes).items():
        found[group] += sizes[name]
    parameters = replace(config.model.parameters, total=sum(sizes.values()), **found)
    return replace(config, model=replace(config.model, parameters=parameters))


def ask_rows(each: Case, config: Config, spec: TrainSpec, model: nn.Module, processor: Processor, folder: Path):
    """A function that answers a batch of the planned size; the rows differ in length by one token, so that they need padding."""
    load = read_answer_load(config, rows=answer_load(config)[0], most_new=each.new)
    wanted = load.length - (each.new if each.stage == "evaluate" else SHORT)
    picture = Image.new("RGB", LARGEST.get(each.family, TILED))
    answerer = Answerer(model, processor, spec, torch.device("cpu"))
    empty = answerer.prepare(question("", picture, spec)).length
    texts = ["a" * (wanted - empty - number % 2) for number in range(each.rows)]
    if each.stage != "evaluate":
        prepared = [answerer.prepare(question(text, picture, spec)) for text in texts]
        return lambda: answerer.answer(prepared)
    file = folder / "image.png"
    picture.save(file)
    samples = [
        Sample(id=str(row), images=(file,), messages=(ask(text), Message(role="assistant", content="b")), file="rows.json", row=row)
        for row, text in enumerate(texts)
    ]
    ranks = {"rank": 0, "world_size": 1, "partitioned": False}
    return lambda: evaluate(model, samples, processor, spec, torch.device("cpu"), **ranks)


def ask(text: str) -> Message:
    return Message(role="user", content=f"{MARK}\n{text}")


def question(text: str, picture: Image.Image, spec: TrainSpec) -> Question:
    options = spec.stage.serving or spec.stage.inference
    return Question(messages=(ask(text),), images=(picture,), **({"sampling": options.sampling} if options else {}))


def cells(row: Row) -> tuple[str, ...]:
    each = row.case
    size = LARGEST.get(each.family, TILED)
    sizes = (f"{bytes_ / 2**20:.1f}" for bytes_ in (row.planned_bytes, row.measured_bytes))
    return (each.family, each.stage, each.precision, f"{each.rows} x {each.context}", f"{size[0]} x {size[1]}", *sizes, f"{row.error:+.1%}")


def show(rows: Sequence[Row]) -> None:
    """A Markdown table, and the errors."""
    for line in (HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)):
        print(f"| {' | '.join(line)} |")
    errors = [row.error for row in rows]
    print(f"mean {sum(map(abs, errors)) / len(errors):.1%}, {min(errors):+.1%} to {max(errors):+.1%}")


if __name__ == "__main__":
    main()
