"""Pinned cells state everything before they run, and those of conf/ do so."""

import shutil
from pathlib import Path

import pytest

from launcher.bench.cell import list_cells, load_cell
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import make_plan, refuse
from tests.launcher.conftest import PLACE

PROJECT = Path(__file__).resolve().parents[3]
CONF = PROJECT / "conf"
CELL = "cpu_tiny_llava_full"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    shutil.copytree(CONF, tmp_path / "conf")
    return tmp_path / "conf"


def plant(conf: Path, old: str, new: str) -> None:
    path = conf / f"experiment/{CELL}.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("name", list_cells(CONF))
def test_every_cell_is_pinned_and_can_be_launched_where_its_devices_are(name: str) -> None:
    cell = load_cell(name, ("cluster.delivery.accept_licence=true",), CONF)
    plan = make_plan(cell.config, load_stacks(PLACE.project / "images"), PLACE, run_id="planned", overrides=cell.overrides)
    refuse(plan.verdict, launching=True)
    assert cell.config.hardware.name == name.partition("_")[0]


def test_the_hardware_that_must_have_a_cell_has_one() -> None:
    assert {name.partition("_")[0] for name in list_cells(CONF)} >= {"cpu", "p4", "rtx3090", "h200", "ascend910b"}


def test_the_cells_of_two_vendors_do_the_same() -> None:
    """So that their results can be read side by side."""
    one, other = (load_cell(f"{hardware}_qwen2_5_vl_7b_lora", (), CONF).config for hardware in ("h200", "ascend910b"))
    assert (one.model, one.stage, one.data, one.run, one.precision, one.strategy) == (
        *(other.model, other.stage, other.data, other.run),
        *(other.precision, other.strategy),
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("repeats: 5", "repeats: 4", "run.repeats: 4, at least 5"),
        ("loss: 0.01, throughput: 0.2, ", "", "run.bands.loss, run.bands.throughput"),
        (", evaluation: 0.01}", "}", "run.bands.evaluation"),
        ("steps: 100", "steps: 19", "run.steps: 19, at least 20"),
        ("threads: 1", "threads: 0", "hardware.threads: a number"),
        ("/strategy: single", "/strategy: auto", "strategy (auto chooses by the machine)"),
        ("strategy: {micro_batch: 16}", "strategy: {}", "strategy.micro_batch"),
        ("/data: digits", "/data: files", "data: a built-in set; the files of data=files"),
        ("global_batch: 16", "global_batch: 16\n  checkpoint: other", "stage.checkpoint: ''"),
        ("/model: tiny_llava", "/model: llava_1_5_7b", "model.source.revision: which commit of"),
        ("seed: 1", "seed: 1\n  restarts: 2", "run.restarts: 0"),
        ("seed: 1", "seed: 1\n  force: because", "run.force: ''"),
    ],
)
def test_a_value_that_is_not_pinned_is_named(conf: Path, old: str, new: str, named: str) -> None:
    plant(conf, old, new)
    with pytest.raises(ConfigRefused) as refused:
        load_cell(CELL, (), conf)
    assert named in str(refused.value) and "not a benchmark yet, and nothing was started" in str(refused.value)


def test_everything_that_is_missing_is_reported_at_once(conf: Path) -> None:
    plant(conf, "repeats: 5", "repeats: 1")
    plant(conf, "threads: 1", "threads: 0")
    with pytest.raises(ConfigRefused, match=r"run\.repeats: 1(.|\n)*hardware\.threads"):
        load_cell(CELL, (), conf)


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(ConfigRefused, match=rf"no experiment 'cpu_tiny_llava_ful'.*did you mean '{CELL}'"):
        load_cell("cpu_tiny_llava_ful", (), CONF)


@pytest.mark.parametrize(
    "word", ["run.seed=2", "hardware=h200", "cluster.devices_per_node=2", "cluster.environment.MKL_CBWR=COMPATIBLE", "steps"]
)
def test_only_where_it_runs_can_be_chosen(word: str) -> None:
    with pytest.raises(ConfigRefused, match=r"a pinned cell cannot be changed.*omnilaunch launch experiment=NAME"):
        load_cell(CELL, (word,), CONF)


def test_the_cluster_is_not_a_part_of_the_cell() -> None:
    here, there = load_cell(CELL, (), CONF), load_cell(CELL, ("cluster=example", "cluster.root=/data"), CONF)
    assert here.config.run == there.config.run and there.config.cluster.root == "/data"
