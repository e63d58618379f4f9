"""The data of a stage after a training run is that of the run, unless the user names other data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.config.schema import Config, Data
from launcher.errors import ConfigRefused
from launcher.plan.data.rows import find_missing
from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint
from launcher.record.checkpoint.checkpoint_data import take_data
from launcher.record.record import SourceState, open_run
from trainer.contract import CHECKPOINTS, SCHEMA, SPEC_FILE, TrainSpec, read
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILE, fixed_settings

CONF = Path(__file__).resolve().parents[4] / "conf"
OWN = ("data=files", "data.train=train.json", "data.evaluation=held.json", "data.images=pictures")
STAGES = ["evaluate", "convert", "quantize", "infer", "serve", "lora", "lm", "full"]


@pytest.fixture
def make_run(plan_for: Callable[..., object], tmp_path: Path) -> Callable[..., Path]:
    def make(run_id: str, *words: str) -> Path:
        from dataclasses import replace

        from launcher.plan.plan import Plan

        plan = plan_for(f"cluster.root={tmp_path}", "run.force=for a test", *words)
        assert isinstance(plan, Plan)
        plan = replace(plan, run_id=run_id, folder=str(tmp_path / "runs" / run_id))
        plan = replace(plan, spec=replace(plan.spec, run_id=run_id, output=plan.folder))
        folder = open_run(plan, SourceState(commit="", dirty=False)) / CHECKPOINTS / CHECKPOINT_NAME.format(step=3)
        folder.mkdir(parents=True)
        return folder

    return make


def composed(tmp_path: Path, *words: str) -> Config:
    return compose_from_checkpoint((f"cluster.root={tmp_path}", *words), CONF, tmp_path)


def named(config: Config) -> tuple[str, str, str, str]:
    return config.data.name, config.data.builtin, Path(config.data.train).name, Path(config.data.evaluation).name


@pytest.mark.parametrize("stage", STAGES)
def test_the_files_of_the_run_with_whole_paths(stage: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run("A", *OWN, "data.max_length=300")
    config = composed(tmp_path, f"stage={stage}", f"stage.checkpoint={folder}")
    assert named(config) == ("files", "", "train.json", "held.json") and Path(config.data.train).is_absolute()
    assert config.data.max_length == 300 and config.stage.recorded is not None
    taken = config.stage.recorded.taken
    assert "data=files" in taken and f"data.train={config.data.train}" in taken and f"data.images={config.data.images}" in taken


def test_a_chain_of_derived_weights_leads_to_the_trained_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Merged and converted weights of earlier versions have the digits in their record."""
    full = make_run("A", "data=digits_large")
    lora = make_run("L", *OWN, "stage=lora", f"stage.checkpoint={full}")
    merged = make_run("M", "stage=merge", f"stage.checkpoint={lora}")
    made = make_run("C", "stage=convert", f"stage.checkpoint={merged}")
    assert named(composed(tmp_path, "stage=evaluate", f"stage.checkpoint={made}")) == ("files", "", "train.json", "held.json")


@pytest.mark.parametrize(("word", "expected"), [("data=digits_even", "digits_even"), ("data.builtin=digits", "digits")])
def test_typed_data_is_kept(word: str, expected: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run("A", *OWN)
    config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", word)
    assert config.data.builtin == expected and config.stage.recorded is not None
    assert not [text for text in config.stage.recorded.taken if text.startswith("data=")]


def test_a_limit_that_was_typed_is_kept_with_the_recorded_files(make_run: Callable[..., Path], tmp_path: Path) -> None:
    config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={make_run('A', *OWN)}", "data.max_length=77")
    assert named(config)[0] == "files" and config.data.max_length == 77


def test_built_in_sets(make_run: Callable[..., Path], tmp_path: Path) -> None:
    same = composed(tmp_path, "stage=lora", f"stage.checkpoint={make_run('A')}")
    assert same.data == compose(["stage=lora"], CONF).data
    other = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={make_run('B', 'data=digits_large')}")
    assert other.data.builtin == "digits_large" and other.stage.recorded is not None
    assert "data=digits_large" in other.stage.recorded.taken


def test_an_experiment_names_the_data() -> None:
    config = compose([], CONF)
    other: Data = compose(["data=digits_even"], CONF).data
    assert take_data(config, other, ["experiment=x"]) == (config, ())
    assert take_data(config, other, ["experiment=null"])[0].data.builtin == "digits_even"


@pytest.mark.parametrize(
    ("stage", "keys"), [("evaluate", ["data.evaluation"]), ("quantize", ["data.train", "data.evaluation"]), ("infer", [])]
)
def test_files_that_are_gone_are_asked_for(stage: str, keys: list[str], make_run: Callable[..., Path], tmp_path: Path) -> None:
    config = composed(tmp_path, f"stage={stage}", f"stage.checkpoint={make_run('A', *OWN)}")
    found = find_missing(config, tmp_path)
    assert [problem.key for problem in found] == keys
    for problem in found:
        assert f"from the record of run A: type data=files {problem.key}=FILE with its place now" in problem.what


def copied(make_run: Callable[..., Path], tmp_path: Path, *words: str) -> Path:
    """A checkpoint that was copied out of its run, which is gone."""
    folder, plan = make_run("A", *words), read_plan(tmp_path)
    state = {"schema": SCHEMA, "step": 3, "weights_sha256": "", "data_sha256": "", "world_size": 0, "files": {}, "run_id": "A"}
    (folder / STATE_FILE).write_text(json.dumps({**state, "spec": fixed_settings(plan)}), encoding="utf-8")
    shutil.move(folder, tmp_path / "copied")
    shutil.rmtree(tmp_path / "runs")
    return tmp_path / "copied"


def read_plan(tmp_path: Path) -> TrainSpec:
    return read(TrainSpec, tmp_path / "runs/A" / SPEC_FILE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_copied_checkpoint_has_the_model_and_the_data_in_its_own_files(stage: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    size = "model.architecture.text.num_hidden_layers=5"
    folder = copied(make_run, tmp_path, "model=tiny_internvl", size, *OWN, "data.max_length=300")
    config = composed(tmp_path, f"stage={stage}", f"stage.checkpoint={folder}")
    assert named(config) == ("files", "", "train.json", "held.json") and Path(config.data.train).is_absolute()
    assert (config.data.max_length, config.model.name) == (300, "tiny_internvl")
    assert config.model.architecture.text.num_hidden_layers == 5


@pytest.mark.parametrize(("stage", "needs"), [(stage, stage in ("evaluate", "quantize", "lora", "lm", "full")) for stage in STAGES])
def test_where_the_data_of_weights_is_unknown_a_stage_that_reads_rows_asks_for_it(stage: str, needs: bool, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    words = (f"stage={stage}", f"stage.checkpoint={folder}")
    if not needs:
        assert composed(tmp_path, *words).data.builtin == "digits", "which it does not read"
        return
    with pytest.raises(ConfigRefused, match=r"do not say which data it was trained on\. Name yours: data=files data") as caught:
        composed(tmp_path, *words)
    assert str(folder) in str(caught.value)
    assert composed(tmp_path, *words, "data=digits").data.builtin == "digits"
    assert composed(tmp_path, *words, *OWN).data.train == "train.json"


def test_one_file_takes_the_place_of_the_recorded_one(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """It was refused `together with the built-in set digits`, which was not named."""
    folder = make_run("A", *OWN, "data.max_length=300")
    config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", "data.evaluation=mine/other.json")
    assert named(config) == ("files", "", "train.json", "other.json") and config.data.max_length == 300
    assert config.stage.recorded is not None
    keys = [word.partition("=")[0] for word in config.stage.recorded.taken]
    assert "data.train" in keys and "data.images" in keys and "data.evaluation" not in keys
    other = make_run("B")
    assert named(composed(tmp_path, "stage=evaluate", f"stage.checkpoint={other}", "data.evaluation=x.json"))[:2] == ("digits", "digits")
