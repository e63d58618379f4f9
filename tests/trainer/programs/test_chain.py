"""A chain of stages, each from what the one before has saved: what it began with is known, what it does not train stays as it was."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import GROUPS
from tests.trainer.mortal import run_ranks
from trainer.checkpoint.lineage import find_lineage, fingerprint_weights
from trainer.contract import ENVIRONMENT_FILE, EnvReport, Evaluation, Exit, FailureReport, InputRefused, Lora, StageSpec, TrainSpec, read
from trainer.contract.checkpoint_files import STATE_FILE, CheckpointState, newest_checkpoint

LORA = Lora(r=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))
STAGES = {
    "full": StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head")),
    "projector": StageSpec(name="projector", kind="train", trainable=("projector",), reset=("projector",)),
    "lm": StageSpec(name="lm", kind="train", trainable=("projector", "lm", "head"), needs=("projector",)),
    "lora": StageSpec(name="lora", kind="train", trainable=(), lora=LORA, needs=("projector",)),
    "evaluate": StageSpec(name="evaluate", kind="evaluate", trainable=()),
}
Run = Callable[..., TrainSpec]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tiny_spec: Any) -> Run:
    """A run of two steps of a stage, from `checkpoint`, which must end with `code`."""

    def start(name: str, stage: StageSpec, checkpoint: Path | str = "", *, code: int = 0, **changes: Any) -> TrainSpec:
        values = {"steps": 2, "run_id": name, "evaluation": Evaluation(enabled=False), **changes}
        spec = tiny_spec(name, changes={**values, "stage": replace(stage, checkpoint=str(checkpoint))}, zero=2)
        gone = run_ranks(spec)
        assert gone.codes == (code,), gone.text
        return spec

    return start


def saved(spec: TrainSpec) -> Path:
    state = newest_checkpoint(Path(spec.output))
    assert state is not None
    return Path(spec.output) / state.path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """By the names in memory; what a LLaVA is saved under has the head inside the language model, and no model. in front."""
    found = load_file(folder / "model.safetensors")
    heads = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
    renamed = {}
    for name, tensor in found.items():
        old = next((old for old in heads if name.startswith(old)), "")
        renamed[heads[old] + name.removeprefix(old) if old else f"model.{name}"] = tensor
    return renamed


def changed_groups(before: Path, after: Path) -> set[str]:
    first, second = weights_of(before), weights_of(after)
    assert first.keys() == second.keys()
    names = {name for name in first if not torch.equal(first[name], second[name])}
    return {group for group, regex in GROUPS.items() for name in names if re.match(regex, name)}


def refusal(spec: TrainSpec) -> str:
    report: FailureReport = read(FailureReport, Path(spec.output) / "failure-rank0.json")
    assert report.code == Exit.USAGE
    assert not (Path(spec.output) / "checkpoints").exists() and not (Path(spec.output) / ENVIRONMENT_FILE).exists()
    return report.message


def test_four_stages_each_from_the_one_before(run: Run) -> None:
    full = saved(run("full", STAGES["full"]))
    projector = saved(run("projector", STAGES["projector"], full))
    lm = saved(run("lm", STAGES["lm"], projector))
    assert changed_groups(full, projector) == {"projector"}
    assert changed_groups(projector, lm) == {"projector", "lm", "head"}
    base = {path.name: path.read_bytes() for path in lm.iterdir() if path.is_file()}
    tuned = run("lora", STAGES["lora"], lm)
    origin = read(EnvReport, Path(tuned.output) / ENVIRONMENT_FILE).origin
    state: CheckpointState = read(CheckpointState, lm / STATE_FILE)
    assert (origin.run_id, origin.step, origin.stage, origin.weights_sha256) == ("lm", 2, "lm", state.weights_sha256)
    assert set(origin.trained) == set(GROUPS) and origin.mark == fingerprint_weights(lm)
    assert {path.name: path.read_bytes() for path in lm.iterdir() if path.is_file()} == base, "an adapter leaves its base alone"
    again = run("again", STAGES["lora"], saved(tuned))
    before, after = (load_file(saved(spec) / "adapter_model.safetensors") for spec in (tuned, again))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    origin = read(EnvReport, Path(again.output) / ENVIRONMENT_FILE).origin
    assert (origin.run_id, origin.base, origin.mark) == ("lora", str(lm), fingerprint_weights(lm))
    assert json.loads((saved(again) / "adapter_config.json").read_text())["base_model_name_or_path"] == str(lm)
    whole = saved(run("merged", STAGES["lm"], saved(again)))
    assert (whole / "model.safetensors").is_file() and not (whole / "adapter_config.json").exists()


def test_a_lora_run_goes_on_with_the_adapter_that_it_is_given(run: Run) -> None:
    """At a rate of next to nothing: what it saves is what it was given, up to that rate."""
    lm = saved(run("full", STAGES["full"]))
    first = run("first", STAGES["lora"], lm)
    still = run("still", STAGES["lora"], saved(first), optimizer=replace(first.optimizer, lr=1e-12))
    a, b = (load_file(saved(spec) / "adapter_model.safetensors") for spec in (first, still))
    assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in a) and any(a[name].any() for name in a if "lora_B" in name)


def test_what_does_not_fit_is_refused_before_the_first_step(run: Run, tiny_spec: Any, tmp_path: Path) -> None:
    blind = saved(run("blind", replace(STAGES["full"], trainable=("lm", "head"))))
    said = refusal(run("a", STAGES["lm"], blind, code=Exit.USAGE))
    assert "stage lm needs a trained projector" in said and "(stage full of run blind)" in said
    assert "stage=projector" in said
    assert "a random start" in refusal(run("b", STAGES["lm"], code=Exit.USAGE))
    adapter = saved(run("adapter", STAGES["lora"], saved(run("full", STAGES["full"]))))
    said = refusal(run("c", replace(STAGES["lora"], lora=replace(LORA, r=4)), adapter, code=Exit.USAGE))
    assert "stage.lora.r is 4, the adapter has 2" in said and "Set stage.lora.r=2, or start a new adapter" in said
    said = refusal(run("d", replace(STAGES["lora"], trainable=("projector",), reset=("projector",), needs=()), adapter, code=Exit.USAGE))
    assert "stage.reset: projector cannot be reset in a stage that continues with an adapter" in said


@pytest.fixture
def adapter(run: Run) -> Path:
    return saved(run("adapter", STAGES["lora"], saved(run("base", STAGES["full"]))))


def test_an_adapter_is_for_the_base_that_it_was_trained_on(adapter: Path, run: Run, tiny_spec: Any, tmp_path: Path) -> None:
    spec = tiny_spec("asked", changes={"stage": replace(STAGES["evaluate"], checkpoint=str(adapter))})
    assert find_lineage(spec, adapter).base
    other = saved(run("other", STAGES["full"], seed=5))
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    shutil.copy(other / "model.safetensors", base / "model.safetensors")
    with pytest.raises(InputRefused, match=r"was trained on other weights than those now in "):
        find_lineage(spec, adapter)
    shutil.rmtree(base)
    with pytest.raises(InputRefused, match=r"its base .* is not there\. Name the folder that has it now: stage\.base=FOLDER"):
        find_lineage(spec, adapter)


def test_a_checkpoint_of_another_family_or_a_newer_schema_is_refused(adapter: Path, tiny_spec: Any) -> None:
    spec = tiny_spec("asked", changes={"stage": replace(STAGES["evaluate"], checkpoint=str(adapter))})
    other = replace(spec, model=replace(spec.model, name="tiny_other", family="other"))
    with pytest.raises(
        InputRefused, match=r"is of model tiny_llava, family llava, but tiny_other is of family other\. Set model=tiny_llava"
    ):
        find_lineage(other, adapter)
    state = json.loads((adapter / STATE_FILE).read_text())
    (adapter / STATE_FILE).write_text(json.dumps({**state, "schema": 999}))
    spec = replace(spec, stage=replace(spec.stage, checkpoint=str(adapter)))
    gone = run_ranks(spec)
    assert gone.codes == (Exit.USAGE,)
    said = refusal(spec)
    assert "stage.checkpoint: " in said and "the schema of its omnilaunch_state.json is 999, this version reads 1" in said
    assert "not a complete checkpoint" not in said and "image build" not in said


def test_marks_tell_trained_weights_apart(run: Run) -> None:
    full = saved(run("full", STAGES["full"]))
    projector = saved(run("projector", STAGES["projector"], full))
    assert fingerprint_weights(full) == fingerprint_weights(full) != fingerprint_weights(projector)
