"""Every hardware x model x stage x precision cell is planned, or refused with a key and a change."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from launcher.check.rules import Verdict, check
from launcher.check.strategy import resolve
from launcher.config.compose import choose_runtime, compose, options
from launcher.config.schema import Config
from launcher.image.stack import Stack, load_stacks

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"
GRID = ("hardware", "model", "stage", "precision")
STAGES = ("evaluate", "full", "lm", "lora", "projector")  # those that come after training have test_deployment
Cell = tuple[str, str, str, str]


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


@cache
def taken(axis: str, name: str) -> Config:
    return compose([f"{axis}={name}", "tune=null"], CONF)


@cache
def tuned(model: str, stage: str) -> Config:
    """The part that does not depend on hardware and precision. A measured cell changes more than its axes, so it is composed as a whole."""
    if f"{model}_{stage}" in options(CONF)["tune"]:
        return compose([f"model={model}", f"stage={stage}"], CONF)
    return replace(taken("cluster", "local"), model=taken("model", model).model, stage=taken("stage", stage).stage)


def assemble(cell: Cell) -> Config:
    """The cell without composing it again, which would take minutes for all of them."""
    hardware, model, stage, precision = cell
    config = tuned(model, stage)
    config = replace(config, cluster=replace(config.cluster, runtime="auto"), hardware=taken("hardware", hardware).hardware)
    return choose_runtime(replace(config, precision=taken("precision", precision).precision))


@cache
def judged() -> dict[Cell, Verdict]:
    return {cell: check(assemble(cell), stacks()) for cell in product(*(values(axis) for axis in GRID))}


def values(axis: str) -> tuple[str, ...]:
    return STAGES if axis == "stage" else options(CONF)[axis]


def test_the_grid_has_its_size() -> None:
    assert [len(values(axis)) for axis in GRID] == [6, 21, 5, 4]
    assert len(judged()) == 6 * 21 * 5 * 4 == 2520


def test_every_cell_is_planned_or_refused_with_a_key_and_a_change() -> None:
    outcomes = Counter(verdict.ok for verdict in judged().values())
    assert outcomes[True] + outcomes[False] == 2520 and min(outcomes.values()) > 300
    for cell, verdict in judged().items():
        assert verdict.ok == all(problem.launch_only for problem in verdict.problems), cell
        for problem in verdict.problems:
            # Answers of a model that no single device holds, however small the batch, have no change that fits on this hardware.
            assert problem.key and problem.what and (problem.changes or cell[2] == "evaluate"), (cell, problem)


@pytest.mark.parametrize(
    "cell",
    [
        ("p4", "tiny_llava", "full", "fp16"),
        ("ascend910b", "qwen2_5_vl_32b", "lora", "bf16"),
        ("h200", "llava_1_5_7b", "projector", "pure_bf16"),
        ("cpu", "omnilmm_12b", "evaluate", "fp32"),
    ],
)
def test_an_assembled_cell_is_the_composed_one(cell: Cell) -> None:
    assert assemble(cell) == compose([f"{axis}={name}" for axis, name in zip(GRID, cell, strict=True)], CONF)


def test_a_p4_never_computes_in_bfloat16() -> None:
    cells = [cell for cell in judged() if cell[0] == "p4" and cell[3] in ("bf16", "pure_bf16")]
    assert len(cells) == 21 * 5 * 2
    for cell in cells:
        refused = [problem for problem in judged()[cell].problems if problem.key == "precision"]
        assert refused and refused[0].changes == ("precision=fp16", "precision=fp32"), cell


def test_a_cpu_never_trains_in_float16() -> None:
    cells = [cell for cell in judged() if cell[0] == "cpu" and cell[3] == "fp16"]
    assert len(cells) == 21 * 5
    assert all("precision=bf16" in problem.changes for cell in cells for problem in judged()[cell].problems if problem.key == "precision")
    assert not any(judged()[cell].ok for cell in cells)


@pytest.mark.parametrize(
    "cell",
    [
        ("cpu", "tiny_llava", "full", "fp32"),
        ("p4", "tiny_llava", "full", "fp16"),
        ("rtx3090", "qwen2_5_vl_3b", "lora", "bf16"),
        ("h200", "llava_1_5_7b", "full", "bf16"),
        ("ascend910b", "qwen2_5_vl_32b", "lora", "bf16"),
        ("ascend910c", "omnilmm_12b", "full", "bf16"),
    ],
)
def test_planned(cell: Cell) -> None:
    assert judged()[cell].ok, judged()[cell].problems


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        (("cpu", "tiny_llava", "lm", "fp32"), "stage.checkpoint"),
        (("p4", "llava_1_5_7b", "full", "fp16"), "strategy"),
        (("p4", "minicpm_v_4_6", "evaluate", "fp16"), "strategy"),  # 64 questions with images at a time
        (("p4", "omnilmm_12b", "evaluate", "fp16"), "strategy"),  # 12B in 16 bit on 8 GiB
        (("rtx3090", "minicpm_o_2_6", "full", "bf16"), "strategy"),  # two 24 GiB cards
        (("rtx3090", "minicpm_o_2_6", "full", "pure_bf16"), "strategy"),
    ],
)
def test_refused(cell: Cell, key: str) -> None:
    assert key in [problem.key for problem in judged()[cell].problems if not problem.launch_only]


def test_only_ready_models_can_be_launched() -> None:
    launchable = {cell[1] for cell, verdict in judged().items() if verdict.launchable}
    waiting: set[str] = set()
    assert launchable == set(options(CONF)["model"]) - waiting


def test_changes_pass_where_they_are_offered() -> None:
    """One cell for each kind of refusal: the first suggested change is composed and passes."""
    kinds = {
        (problem.key, problem.changes[0]): (cell, problem)
        for cell, verdict in judged().items()
        for problem in verdict.problems
        if problem.changes
    }
    assert len(kinds) >= 5
    for cell, problem in kinds.values():
        given = {axis: f"{axis}={name}" for axis, name in zip(GRID, cell, strict=True)}
        changed = {part.split("=")[0]: part for part in problem.changes[0].split()}
        verdict = check(compose([*(given | changed).values()], CONF), stacks())
        assert problem.key not in [other.key for other in verdict.problems], (cell, problem)


def test_auto_is_resolved_in_every_planned_cell() -> None:
    for cell, verdict in judged().items():
        if verdict.ok:
            config = assemble(cell)
            strategy = resolve(config).config.strategy
            assert strategy.name != "auto" and strategy.micro_batch
            assert check(replace(config, strategy=strategy), stacks()).ok, cell
