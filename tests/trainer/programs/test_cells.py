"""Every tiny family x stage x precision x ZeRO stage, two ranks, one step: it runs, gradients are where the stage says and nowhere else,
and what is sharded is equal to what is not.

fp16 has no cells: conf/hardware/cpu.yaml says that a CPU does not train in it. DeepSpeed 0.19.8 keeps masters of 16-bit weights in its
ZeRO optimizers alone, so that the 16-bit cells are compared with ZeRO 1.

`make test` has two cells of each family, `make test-slow` a third of all cells, and `make test-all` has every one.
"""

import multiprocessing
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.plan.plan import LocalContext, train_spec
from tests.trainer.cell import RANKS, Cell, Outcome, run_cells, with_root
from tests.trainer.mortal import free_port
from trainer.contract import TrainSpec
from trainer.models import FAMILIES

CONF = Path(__file__).resolve().parents[3] / "conf"
MODELS = tuple(sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml")))
STAGES = ("projector", "lm", "lora", "full")
ZERO = {"fp32": (0, 2, 3), "bf16": (1, 2, 3), "pure_bf16": (1, 2, 3)}  # the first is the reference
STRATEGIES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
EVERY = tuple(
    Cell(model=model, stage=stage, precision=precision, zero=zero)
    for model in MODELS
    for stage in STAGES
    for precision, stages in ZERO.items()
    for zero in stages
)


def is_in_third(cell: Cell) -> bool:
    """Each stage of a family in one precision and each of its ZeRO stages, so that a family meets every precision."""
    return list(ZERO).index(cell.precision) == (MODELS.index(cell.model) + STAGES.index(cell.stage)) % len(ZERO)


def is_quick(cell: Cell) -> bool:
    """Of that third one stage of each family, in the reference and one other ZeRO stage."""
    number, (first, *others) = MODELS.index(cell.model), ZERO[cell.precision]
    return is_in_third(cell) and cell.stage == STAGES[number % len(STAGES)] and cell.zero in (first, others[number % len(others)])


def marked(cells: Iterable[Cell]) -> list[Any]:
    """As parameters: the quick cells without a mark, the rest of the third slow, all others long (four minutes on two quiet cores)."""
    marks = {cell: () if is_quick(cell) else pytest.mark.slow if is_in_third(cell) else pytest.mark.long for cell in cells}
    return [pytest.param(cell, marks=mark, id=cell.name) for cell, mark in marks.items()]


# Of the loss and of a weight after the step, against the reference: sums in another order, and in 16 bit one rounding (2**-8 of a value).
LOSS_BOUND = {"fp32": 1e-5, "bf16": 1e-2, "pure_bf16": 1e-2}
WEIGHT_BOUND = {"fp32": (1e-5, 1e-6), "bf16": (2**-7, 1e-5), "pure_bf16": (2**-7, 1e-4)}  # relative, absolute
SILENT_S = 180


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    """The cells of the tests that this session runs, and their references: each is run once."""
    asked = {cell for item in request.session.items if item.path == request.path for cell in cells_of(item)}
    cells = [cell for cell in EVERY if cell in asked]
    log = tmp_path_factory.mktemp("cells") / "log.txt"
    specs = {cell: with_root(spec, digits) for cell, spec in make_specs(cells)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.cell", "deepspeed", "peft"])
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=run_cells, args=(rank, port, specs, log, answers)) for rank in range(RANKS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        for rank in ranks:
            rank.start()
    try:
        return collect(answers, ranks, log, len(cells))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def cells_of(item: Any) -> tuple[Cell, ...]:
    cell = item.callspec.params["cell"] if hasattr(item, "callspec") else None
    return (cell, reference_of(cell)) if cell else ()


def reference_of(cell: Cell) -> Cell:
    return replace(cell, zero=ZERO[cell.precision][0])


def collect(answers: Any, ranks: list[Any], log: Path, count: int) -> dict[Cell, Outcome]:
    """Until all have come, one has failed, or the ranks say nothing more."""
    found: dict[Cell, Outcome] = {}
    until = time.monotonic() + SILENT_S
    while len(found) < count and time.monotonic() < until and not any(outcome.error for outcome in found.values()):
        try:
            cell, outcome = answers.get(timeout=1)
        except queue.Empty:
            if all(rank.exitcode is not None for rank in ranks):
                break
            continue
        found[cell], until = outcome, time.monotonic() + SILENT_S
    if len(found) < count or any(outcome.error for outcome in found.values()):
        errors = "\n".join(f"{cell.name}: {outcome.error}" for cell, outcome in found.items() if outcome.error)
        raise AssertionError(f"{len(found)} of {count} cells ran. {errors}\n{log.read_text(errors='replace')[-3000:]}")
    return found


def make_specs(cells: Iterable[Cell]) -> Iterator[tuple[Cell, TrainSpec]]:
    """As the launcher plans them. A large epsilon makes the first step of Adam a smooth function of the gradient: with 1e-8 it is the
    gradient's sign, and a gradient that is zero up to rounding would move a weight either way."""
    place = LocalContext(project=CONF.parent, here=CONF.parent, interpreter="python", user="")
    configs = {(model, stage): compose_cell(model, stage) for model in MODELS for stage in STAGES}
    precisions = {name: compose([f"precision={name}"], CONF).precision for name in ZERO}
    strategies = {zero: compose([f"strategy={name}"], CONF).strategy for zero, name in STRATEGIES.items()}
    for cell in cells:
        config = replace(configs[cell.model, cell.stage], precision=precisions[cell.precision], strategy=strategies[cell.zero])
        yield cell, train_spec(resolve(config).config, place, run_id=cell.name)


def compose_cell(model: str, stage: str) -> Config:
    words = [f"model={model}", f"stage={stage}", "tune=null", "cluster.devices_per_node=2", "hardware.threads=1", "run.steps=4"]
    fixed = ["stage.global_batch=4", "strategy.micro_batch=2", "stage.optimizer.lr=1e-3", "stage.optimizer.eps=1e-2"]
    more = ["stage.optimizer.warmup=0", "stage.optimizer.weight_decay=0.01"]
    dropout = ["stage.lora.dropout=0", "stage.lora.r=4"] if stage == "lora" else []
    return compose([*words, *fixed, *more, *dropout], CONF)


def test_every_family_has_a_tiny_model_and_every_cell_is_there() -> None:
    families = {compose([f"model={model}"], CONF).model.family for model in MODELS}
    assert families == set(FAMILIES)
    assert len(EVERY) == len(set(EVERY)) == 9 * 4 * 3 * 3 == 324, "families x stages x precisions x ZeRO stages"
    third, quick = [cell for cell in EVERY if is_in_third(cell)], [cell for cell in EVERY if is_quick(cell)]
    assert len(third) == 108 and len(quick) == 2 * len(MODELS) == 18 and set(quick) < set(third)
    for axis in ("stage", "precision", "zero"):
        assert {(cell.model, getattr(cell, axis)) for cell in third} == {(cell.model, getattr(cell, axis)) for cell in EVERY}
        assert {getattr(cell, axis) for cell in quick} == {getattr(cell, axis) for cell in EVERY}
    assert {cell.model for cell in quick} == set(MODELS) and {reference_of(cell) for cell in quick} < set(quick)
    assert {reference_of(cell) for cell in third} < set(third)
    marks = [{mark.name for mark in parameter.marks} for parameter in marked(EVERY)]
    assert [marks.count(names) for names in (set(), {"slow"}, {"long"})] == [18, 90, 216]


@pytest.mark.parametrize("cell", marked(EVERY))
def test_gradients_are_where_the_stage_says_and_nowhere_else(cell: Cell, outcomes: dict[Cell, Outcome]) -> None:
    outcome = outcomes[cell]
    assert numpy.isfinite([outcome.loss, outcome.grad_norm]).all() and outcome.grad_norm > 0
    assert outcome.trained and outcome.reached == outcome.trained
    assert outcome.changed <= outcome.trained, "a frozen parameter is not what it was"
    assert outcome.changed, "nothing was trained"


@pytest.mark.parametrize("cell", marked(cell for cell in EVERY if cell != reference_of(cell)))
def test_what_is_sharded_is_equal_to_what_is_not(cell: Cell, outcomes: dict[Cell, Outcome]) -> None:
    outcome, reference = outcomes[cell], outcomes[reference_of(cell)]
    relative, absolute = WEIGHT_BOUND[cell.precision]
    assert outcome.trained == reference.trained and outcome.names == reference.names
    assert outcome.loss == pytest.approx(reference.loss, rel=LOSS_BOUND[cell.precision])
    assert outcome.weights and reference.weights and outcome.weights.keys() == reference.weights.keys() == outcome.trained
    for name, weights in outcome.weights.items():
        numpy.testing.assert_allclose(weights, reference.weights[name], rtol=relative, atol=absolute, err_msg=name)
