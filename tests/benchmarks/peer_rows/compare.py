"""Our own ids and labels of the rows of a set, beside those of the peer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Literal

from tests.benchmarks.peer_rows.golden import Expected, PeerSet, answers_only, fold, read_expected
from tests.benchmarks.peer_rows.model import spec_of
from trainer.contract import (
    SCHEMA,
    Batch,
    DataProblem,
    DataSpec,
    DeviceSpec,
    Evaluation,
    InputRefused,
    Optimizer,
    Precision,
    StageSpec,
    TrainSpec,
)
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import encode_cached
from trainer.data.batch.load import image_sizes
from trainer.data.length import open_processor
from trainer.data.processor import Processor
from trainer.data.rows.row_rules import rules_of
from trainer.data.rows.sample import Sample, read_samples

Outcome = Literal["equal", "both refuse", "ids differ", "labels differ", "refused by us", "refused by the peer"]
SAME: tuple[Outcome, ...] = ("equal", "both refuse")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """`why`: our problems, or the peer's."""

    row: int
    outcome: Outcome
    why: str = ""


def compare(each: PeerSet, model: Path, expected: Mapping[int, Expected] | None = None) -> tuple[Compared, ...]:
    """`model`: the folder that `write_model` wrote."""
    theirs = read_expected(each) if expected is None else expected
    spec = train_spec(each, model)
    processor = open_once(each.model, model)
    samples, problems = read_samples(each.file, each.folder, rules=rules_of(spec.data))
    ours = {sample.row: sample for sample in samples}
    return tuple(compare_row(row, each, spec, processor, ours.get(row), problems, made) for row, made in theirs.items())


def compare_row(
    row: int,
    each: PeerSet,
    spec: TrainSpec,
    processor: Processor,
    sample: Sample | None,
    problems: tuple[DataProblem, ...],
    theirs: Expected,
) -> Compared:
    own = [problem for problem in problems if problem.row in (row, 0)]
    try:
        made = encode_sample(sample, processor, spec) if sample and not own else None
        why = "; ".join(f"{problem.field}: {problem.problem}" for problem in own) or ("" if made else "no sample")
    except InputRefused as error:
        made, why = None, str(error).removeprefix(f"{each.file} ")
    if made is None or theirs.refused:
        both = made is None and theirs.refused
        outcome: Outcome = "both refuse" if both else "refused by us" if made is None else "refused by the peer"
        return Compared(row=row, outcome=outcome, why=why.replace(f"{each.folder}/", "") or theirs.refused)
    marks = marks_of(spec, processor)
    wanted = answers_only(theirs, marks[0] if each.header else (), marks[1], marks[2] if each.separator else ())
    if made.ids != wanted.ids:
        return Compared(row=row, outcome="ids differ", why=first_difference(made, wanted, processor))
    return Compared(row=row, outcome="equal" if made.trained == wanted.trained else "labels differ", why=f"{made.trained} {wanted.trained}")


def encode_sample(sample: Sample, processor: Processor, spec: TrainSpec) -> Expected:
    sizes = image_sizes(*(sample, spec)[: len(signature(image_sizes).parameters)])
    found = encode_cached(sample, processor, spec, sizes, Cache(0))
    return fold(found.input_ids, found.labels, image_token_id(spec, processor))


def image_token_id(spec: TrainSpec, processor: Processor) -> int:
    """The token that is repeated for the patches of an image."""
    own = {"minicpm_v_2_6": "<unk>"}.get(spec.model.family, spec.model.image_token)
    return int(processor.tokenizer.convert_tokens_to_ids(own))


def marks_of(spec: TrainSpec, processor: Processor) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The ids of the opening of an answer, of its end mark, and of what stands before the next message."""
    tokenizer, template = processor.tokenizer, spec.model.template

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return ids(template.assistant_open), ids(template.end_mark)[-1], ids(template.separator)


def first_difference(ours: Expected, theirs: Expected, processor: Processor) -> str:
    at = next(
        (place for place, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), min(len(ours.ids), len(theirs.ids))
    )
    start = max(0, at - 8)
    show = [processor.tokenizer.decode(list(made.ids[start : at + 24])) for made in (ours, theirs)]
    return f"at {at}: ours {show[0]!r}, theirs {show[1]!r}"


def share(found: Mapping[str, tuple[Compared, ...]]) -> tuple[int, int]:
    """(rows with the same result, all rows)."""
    rows = [compared for rows in found.values() for compared in rows]
    return sum(compared.outcome in SAME for compared in rows), len(rows)


def summarise(found: Mapping[str, tuple[Compared, ...]]) -> str:
    lines = []
    for name, rows in found.items():
        counts = Counter(compared.outcome for compared in rows)
        same = sum(counts[outcome] for outcome in SAME)
        rest = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if outcome not in SAME)
        lines.append(f"{name:42} {same:4} of {len(rows):4}  {rest}")
    same, total = share(found)
    return "\n".join([*lines, f"{'all':42} {same:4} of {total:4}  {100 * same / max(total, 1):.1f} %"])


# -------------------------------------------------------------------------------------------------------------------- spec


@cache
def open_once(name: str, folder: Path) -> Processor:
    return open_processor(make_spec(name, folder, folder, "rows"))


def train_spec(each: PeerSet, model: Path) -> TrainSpec:
    spec = make_spec(each.model, model, each.folder, each.rows)
    return replace(spec, data=replace(spec.data, **each.options))


def make_spec(name: str, model: Path, root: Path, train: str) -> TrainSpec:
    return TrainSpec(
        schema=SCHEMA,
        run_id="peer-rows",
        output=str(root / "run"),
        seed=1,
        deterministic=True,
        steps=1,
        save_every=0,
        keep_checkpoints=1,
        gradient_checkpointing=False,
        model=spec_of(name, model),
        stage=StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head")),
        precision=Precision(name="fp32", weights="float32", compute="float32", optimizer="float32", gradients="float32"),
        optimizer=Optimizer(lr=1e-3),
        batch=Batch(global_batch=1, micro_batch=1, accumulation=1),
        data=DataSpec(name="files", builtin="", root=str(root), train=train, evaluation="", images="", max_length=100_000, workers=0),
        device=DeviceSpec(accelerator="cpu", backend="gloo", world_size=1, devices_per_node=1, threads=1, timeout_s=60),
        evaluation=Evaluation(),
        deepspeed={},
    )
