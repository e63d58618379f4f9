"""Ranks whose images differ in size and number, and rows without any: every tiny family under ZeRO 1 to 3, whole and with LoRA, on two and
three ranks, computes what it does without ZeRO.

Under ZeRO 3 a module that one rank calls more often than another hangs the run: its weights are gathered at each call.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.plan.plan import LocalContext, train_spec
from tests.trainer.spread import carry_out
from tests.trainer.unequal import RANKS, STEPS, take_steps, write_rows
from trainer.contract import TrainSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CONF = Path(__file__).resolve().parents[3] / "conf"
MODELS = tuple(sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml")))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")  # the first is the reference
STAGES = ("full", "lora")
WORST = "tiny_minicpm_v_4_6"  # transformers calls its merger once for each image


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    stage: str
    strategy: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.stage}-{self.strategy}-{self.ranks} ranks"

    @property
    def reference(self) -> "Case":
        return replace(self, strategy=STRATEGIES[0])


EVERY = tuple(
    Case(model=model, stage=stage, strategy=strategy, ranks=ranks)
    for ranks in RANKS
    for model in MODELS
    for stage in STAGES
    for strategy in STRATEGIES[1:]
)


def marks_of(case: Case) -> Any:
    if case == Case(model=WORST, stage="full", strategy="zero3", ranks=2):
        return ()
    return pytest.mark.slow if case.strategy == "zero3" and (case.ranks == 2 or case.model == WORST) else pytest.mark.long


def spec_of(case: Case, rows: Path) -> TrainSpec:
    words = [f"model={case.model}", f"stage={case.stage}", f"strategy={case.strategy}", "tune=null", "precision=fp32", "run.steps=4"]
    words += [
        f"cluster.devices_per_node={case.ranks}",
        "hardware.threads=1",
        f"stage.global_batch={2 * case.ranks}",
        "strategy.micro_batch=2",
    ]
    words += ["data=files", f"data.train={rows}", f"data.images={rows.parent}", "data.max_length=1000", "run.collective_timeout_s=120"]
    words += ["stage.optimizer.lr=1e-3", "stage.optimizer.eps=1e-2", "stage.optimizer.warmup=0"]
    words += ["stage.lora.dropout=0", "stage.lora.r=4"] if case.stage == "lora" else []
    place = LocalContext(project=CONF.parent, here=CONF.parent, interpreter="python", user="")
    return train_spec(resolve(compose(words, CONF)).config, place, run_id="unequal")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cases that this session asks for and their references, by name: each is run once."""
    cases = {item.callspec.params.get("case") for item in request.session.items if item.path == request.path and hasattr(item, "callspec")}
    asked = {case.name: case for found in cases if isinstance(found, Case) for case in (found.reference, found)}
    outcomes: dict[str, Any] = {}
    for ranks in RANKS:
        tasks = {name: (take_steps, (spec_of(case, rows),)) for name, case in asked.items() if case.ranks == ranks}
        outcomes |= carry_out(tasks, tmp_path_factory.mktemp("log") / "log.txt", ranks=ranks) if tasks else {}
    return outcomes


def test_every_family_is_run_and_hit_by_unequal_images() -> None:
    assert len(EVERY) == 9 * 2 * 3 * 2 == 108 and len(STEPS) == 4
    counts = [[sum(map(len, rank)) for rank in step] for step in STEPS]
    assert counts == [[0, 2, 3], [2, 3, 0], [0, 0, 0], [1, 0, 3]], "images of each rank in each step"


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks_of(case), id=case.name) for case in EVERY])
def test_unequal_images_train_as_without_zero(case: Case, outcomes: dict[str, Any]) -> None:
    found, expected = outcomes[case.name], outcomes[case.reference.name]
    assert len(found) == case.ranks and all(rank == found[0] for rank in found)
    assert torch.tensor(found[0]).isfinite().all()
    for step, (own, other) in enumerate(zip(found[0], expected[0], strict=True), start=1):
        assert own == pytest.approx(other, rel=1e-5, abs=1e-6), f"loss and gradient norm of step {step}"
