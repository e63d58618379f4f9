"""The start under ZeRO 3: every rank gets what it would have had, and none but the first ever holds the model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import make_spec
from tests.trainer.models.conftest import TINY, Made, make_tiny, model_spec  # noqa: F401  # a fixture of the models' tests
from tests.trainer.mortal import run_ranks
from tests.trainer.spread import RANKS, Task, carry_out, compare, trace, weigh
from trainer.contract import Exit, FailureReport, Lora, ModelSpec, Source, StageSpec, TrainSpec, read
from trainer.models import find_family
from trainer.stages.group import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")))
FULL = StageSpec(name="full", kind="train", trainable=("projector", "lm", "head"))
RESET = StageSpec(name="projector", kind="train", trainable=("projector",), reset=("projector",))
CHECKPOINT = "checkpoints/step-000001"
# name -> precision, stage, whether the weights come from a folder, and whether the run goes on from a checkpoint
STARTS: dict[str, tuple[str, StageSpec, bool, str]] = {
    "random, fp32": ("fp32", FULL, False, ""),
    "random, bf16, LoRA": ("bf16", LORA, False, ""),
    "folder, fp32": ("fp32", FULL, True, ""),
    "folder, bf16": ("bf16", FULL, True, ""),
    "folder, bf16, LoRA": ("bf16", LORA, True, ""),
    "folder, fp32, a group reset": ("fp32", RESET, True, ""),
    "folder, pure_bf16, going on": ("pure_bf16", FULL, True, CHECKPOINT),
}
ADAPTERS = {"adapter, merged": FULL, "adapter, gone on with": LORA}
BIG = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4}


def spec_of(output: Path, model: ModelSpec, *, precision: str = "fp32", stage: StageSpec = FULL, folder: Path | None = None) -> TrainSpec:
    output.mkdir(parents=True, exist_ok=True)
    source = Source(kind="path", path=str(folder)) if folder else Source(kind="random")
    made = make_spec(output, output / "data", precision=precision, zero=3, ranks=RANKS, micro=4)
    return replace(made, model=replace(model, source=source), stage=stage)


# ------------------------------------------------------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[[str], Made]) -> dict[str, Task]:  # noqa: F811
    """Every start of every family."""
    root, tasks = tmp_path_factory.mktemp("starts"), dict[str, Task]()
    for name in TINY:
        tiny = make_tiny(name)
        for start, (precision, stage, stored, checkpoint) in STARTS.items():
            spec = spec_of(root / name / start, model_spec(name), precision=precision, stage=stage, folder=tiny.folder if stored else None)
            if checkpoint:
                write_changed(tiny, root / name / start / checkpoint)
            tasks[f"{name}: {start}"] = (compare, (spec, checkpoint))
    tiny = make_tiny(TINY[0])
    adapter = write_adapter(tiny, root / "adapter")
    for start, stage in ADAPTERS.items():
        spec = spec_of(root / start, model_spec(TINY[0]), stage=replace(stage, checkpoint=str(adapter)))
        tasks[f"{TINY[0]}: {start}"] = (compare, (spec, ""))
    return tasks


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, starts: dict[str, Task], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Those that this session asks for, by the same two ranks."""
    asked = {item.callspec.params.get("case") for item in request.session.items if item.path == request.path and hasattr(item, "callspec")}
    return carry_out({case: task for case, task in starts.items() if case in asked}, tmp_path_factory.mktemp("outcomes") / "log.txt")


def write_changed(tiny: Made, folder: Path) -> None:
    """A checkpoint of other weights than those that the run began from."""
    family, spec = tiny.family, tiny.spec.model
    torch.manual_seed(7)
    family.create(spec).save_pretrained(folder)


def write_adapter(tiny: Made, folder: Path) -> Path:
    """One that changes the weights that it is merged into, with a projector of its own."""
    model = tiny.family.load(tiny.folder, tiny.spec.model, torch.float32)
    staged = apply_stage(model, replace(tiny.spec, stage=LORA), tiny.family.unused(model)).model
    torch.manual_seed(3)
    for parameter in staged.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    staged.save_pretrained(folder)
    return folder


CASES = [*(f"{name}: {start}" for name in TINY for start in STARTS), *(f"{TINY[0]}: {start}" for start in ADAPTERS)]


# Every family and every start at least once without a mark: all of them are a minute and a half.
QUICK = {f"{name}: {list(STARTS)[number % len(STARTS)]}" for number, name in enumerate(TINY)} | {
    f"{TINY[0]}: {start}" for start in ADAPTERS
}


def test_no_start_is_left_out(starts: dict[str, Task]) -> None:
    assert list(starts) == CASES and len(CASES) == 8 * 7 + 2 == 58
    assert set(CASES) > QUICK and len(QUICK) == 8 + 2
    assert {case.split(": ")[0] for case in QUICK} == set(TINY) and {case.split(": ")[1] for case in QUICK} == {*STARTS, *ADAPTERS}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES])
def test_every_rank_starts_bit_by_bit_as_without_zero(case: str, outcomes: dict[str, list[Any]]) -> None:
    """Parameters in the dtype of the engine, what trains, buffers that no file holds, and the random numbers that come next."""
    for number, outcome in enumerate(outcomes[case]):
        assert outcome["differing"] == []
        assert outcome["random"], "the ranks would draw other numbers than without ZeRO"
        assert outcome["on_meta"] == (outcome["parameters"] if number else 0), "parameters on the meta device"
        assert outcome["held"] == 0, "elements that are not cut"
        assert outcome["parameters"] > 50 and outcome["rotary"] >= 2


# ------------------------------------------------------------------------------------------------------------- what it takes


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """87 million parameters, 333 MiB in float32; the largest of them a fourteenth."""
    root = tmp_path_factory.mktemp("big")
    model = model_spec("tiny_qwen2_5_vl")
    parts = model.architecture
    text, vision = {**parts["text"], **BIG, "vocab_size": 8000}, {**parts["vision"], "out_hidden_size": BIG["hidden_size"]}
    model = replace(model, architecture={**parts, "text": text, "vision": vision})
    family = find_family(model.family)
    torch.manual_seed(0)
    family.create(model).save_pretrained(root / "model")
    family.create_processor(model).save(root / "model")
    small = spec_of(root / "small", model_spec("tiny_qwen2_5_vl"))
    exact, rounded = (spec_of(root / name, model, precision=name, folder=root / "model") for name in ("fp32", "bf16"))
    try:
        return carry_out(
            {
                "imports": (weigh, (small, "scattered")),
                "scattered": (weigh, (exact, "scattered")),
                "built": (weigh, (exact, "built")),
                "scattered, another dtype": (weigh, (rounded, "scattered")),
                "whole": (weigh, (exact, "whole")),
                "traced": (trace, (exact,)),
            },
            root / "log.txt",
        )
    finally:
        shutil.rmtree(root / "model")


def test_only_one_rank_of_the_run_holds_the_model(loads: dict[str, list[Any]]) -> None:
    """On a CPU a rank's part, half the model here, lies in the same memory. The first rank maps the file and reads what it sends; where
    the file has another dtype, here one twice as wide, it makes a copy, of which it lets go parameter by parameter."""
    for name in (name for name in loads if name != "traced"):
        print(f"{name}: " + ", ".join(f"{found['share']:.2f} ({found['own']:.2f} without files)" for found in loads[name]))
    first, second = loads["scattered"]
    assert first["bytes"] == second["bytes"] > 300 * 2**20
    assert first["share"] < 1.0 + 0.5 + 0.2 and first["own"] < 0.5 + 0.2
    assert second["share"] < 0.5 + 0.2
    first, second = loads["scattered, another dtype"]
    assert first["own"] < 1.0 + 0.2
    assert second["share"] < 0.5 + 0.2
    assert loads["built"][1]["share"] < 0.1
    whole = [found["share"] for found in loads["whole"]]
    assert min(whole) > 0.9, "the gauge does not see a model that is there"


def test_the_device_never_holds_more_than_its_part_and_one_parameter(loads: dict[str, list[Any]]) -> None:
    print(loads["traced"])
    for number, found in enumerate(loads["traced"]):
        assert 0.05 < found["largest"] < 0.1 and found["parameters"] > 100
        assert found["whole"] == found["largest"], "more than one parameter stood whole on the device"
        assert found["moved"] == 0, "DeepSpeed moved parameters to the device"
        assert found["left"] == pytest.approx(0.5, abs=0.02)
        assert found["built"] < 0.01, "a rank without values made some" if number else "the first rank maps its file, and copies none of it"
        assert found["highest"] < 0.5 + 2 * found["largest"]


# -------------------------------------------------------------------------------------------------------------- what is refused


def test_what_the_first_rank_alone_sees_ends_all_of_them_with_its_words(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:  # noqa: F811
    """Rows of a group that stays frozen are drawn by the rank that has values; the other one would wait for them in a broadcast."""
    frozen = StageSpec(name="lm", kind="train", trainable=("lm",), reset=("projector",))
    spec = spec_of(tmp_path / "run", model_spec("tiny_llava"), stage=frozen, folder=make_tiny("tiny_llava").folder)
    gone = run_ranks(with_digits(spec, tmp_path))
    assert gone.codes == (Exit.USAGE, Exit.USAGE), gone.text
    for rank in range(RANKS):
        failure: FailureReport = read(FailureReport, Path(spec.output) / f"failure-rank{rank}.json")
        assert failure.kind == "InputRefused" and failure.message.startswith(
            "stage.reset: projector would be drawn again and never trained"
        )


def with_digits(spec: TrainSpec, root: Path) -> TrainSpec:
    return replace(spec, data=replace(spec.data, root=str(root / "data")))


def other_config() -> None:
    """Rank 1 finds a folder whose config.json says other things than that of rank 0."""
    import os

    import trainer.models.llava

    if os.environ["RANK"] == "1":
        load = trainer.models.llava.LLAVA.load
        family = replace(trainer.models.llava.LLAVA, load=lambda *a, **k: drop_layer(load(*a, **k)))
        trainer.models.FAMILIES["llava"] = family


def drop_layer(model: torch.nn.Module) -> torch.nn.Module:
    del model.model.language_model.layers[-1]
    return model


def test_a_rank_with_another_model_is_named_before_anything_is_sent(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:  # noqa: F811
    spec = spec_of(tmp_path / "run", model_spec("tiny_llava"), folder=make_tiny("tiny_llava").folder)
    gone = run_ranks(with_digits(spec, tmp_path), meddle=other_config)
    assert gone.codes == (Exit.USAGE, Exit.USAGE), gone.text
    failure: FailureReport = read(FailureReport, Path(spec.output) / "failure-rank0.json")
    assert "rank 1 has another model than rank 0: it lacks model.language_model.layers." in failure.message
