"""Config -> Plan: pure, byte-stable, and without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.commands.plan import plan_of
from launcher.config.compose import compose
from launcher.config.schema import Run
from launcher.errors import ConfigRefused
from launcher.image.lock import read_lock
from launcher.image.stack import load_stacks
from launcher.plan.plan import LocalContext, Plan, absolute, move_plan, to_plain, with_container_options
from trainer.contract import TrainSpec, decode

PROJECT = Path(__file__).resolve().parents[3]
PLACE = LocalContext(project=PROJECT, here=Path("/home/ann/work"), interpreter="/venv/bin/python", user="1000:1000")
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "deepspeed", "peft", "numpy"):
            raise ImportError(f"{name} is not for the launcher")
sys.meta_path.insert(0, Refuse())
from launcher.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_same_inputs_give_an_equal_plan(plan_for: Callable[..., Plan]) -> None:
    first, second = (json.dumps(to_plain(plan_for("hardware=p4"))) for _ in range(2))
    assert first == second


def test_spec_survives_the_disk(plan_for: Callable[..., Plan]) -> None:
    spec = plan_for("stage=lora", "stage.checkpoint=/some/where").spec
    assert decode(TrainSpec, json.loads(json.dumps(to_plain(plan_for("stage=lora", "stage.checkpoint=/some/where"))["spec"]))) == spec


def test_plan_runs_where_torch_cannot_be_imported() -> None:
    argv = (
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        "plan",
        "--full",
        "hardware=ascend910b",
        "model=qwen2_5_vl_32b",
        "stage=lora",
        "precision=bf16",
        "cluster=example",
    )
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in (
        "== config",
        "== DeepSpeed config",
        "== node 1: 192.0.2.12",
        "images/rendered/ascend910b/Dockerfile",
        "== verdict",
        "16 ranks",
    ):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("overrides", "batch", "stage"),
    [
        ((), (64, 64, 1), 0),
        (("cluster.devices_per_node=2",), (64, 32, 1), 0),
        (("cluster.devices_per_node=2", "strategy=zero2", "strategy.micro_batch=4"), (64, 4, 8), 2),
        (("strategy.micro_batch=16", "precision=bf16"), (64, 16, 4), 1),
        (("strategy.micro_batch=16", "precision=pure_bf16"), (64, 16, 4), 1),
    ],
)
def test_the_global_batch_is_divided_once(
    plan_for: Callable[..., Plan], overrides: tuple[str, ...], batch: tuple[int, int, int], stage: int
) -> None:
    spec = plan_for(*overrides).spec
    assert (spec.batch.global_batch, spec.batch.micro_batch, spec.batch.accumulation) == batch
    assert spec.deepspeed["train_batch_size"] == spec.batch.micro_batch * spec.batch.accumulation * spec.device.world_size == 64
    assert spec.deepspeed["zero_optimization"]["stage"] == stage
    assert spec.deepspeed.get("zero_allow_untested_optimizer", False) == (spec.precision.rounding == "stochastic")
    assert (spec.loss_chunk, spec.checkpoint_every, spec.checkpoint_groups) == (1024, 1, ())


@pytest.mark.parametrize(
    ("overrides", "trackers", "named"),
    [
        ((), ("tensorboard",), False),
        (("hardware=ascend910b",), ("tensorboard",), False),
        (("run.trackers=[tensorboard]",), ("tensorboard",), True),
        (("run.trackers=[tensorboard,wandb]",), ("tensorboard", "wandb"), True),
        (("run.trackers=[]",), (), True),
    ],
)
def test_the_trackers_and_whether_somebody_asked_for_them(
    plan_for: Callable[..., Plan], overrides: tuple[str, ...], trackers: tuple[str, ...], named: bool
) -> None:
    plan = plan_for(*overrides)
    assert (plan.spec.trackers, plan.spec.trackers_named) == (trackers, named)
    moved = move_plan(plan, plan.config.cluster, load_stacks(PROJECT / "images"), PLACE) if plan.verdict.launchable else plan
    assert moved.spec == plan.spec


def test_the_default_trackers_are_in_every_lock_and_agree_with_the_file() -> None:
    locks = {lock for stack in load_stacks(PROJECT / "images").values() for lock in stack.locks.values() if lock}
    assert len(locks) == 6
    assert all(set(Run.trackers) <= set(read_lock(PROJECT / "images" / lock)) for lock in locks)
    assert compose([], PROJECT / "conf").run.trackers == Run.trackers


@pytest.mark.parametrize(
    ("overrides", "kernels"),
    [
        ((), "plain"),
        (("hardware=p4",), "plain"),
        (("hardware=h200",), "auto"),
        (("hardware=ascend910b",), "auto"),
        (("hardware=ascend910b", "strategy.kernels=plain"), "plain"),
        (("hardware=ascend910b", "strategy.kernels=fused"), "fused"),
    ],
)
def test_the_chip_decides_on_kernels_before_what_is_installed(
    plan_for: Callable[..., Plan], overrides: tuple[str, ...], kernels: str
) -> None:
    assert plan_for(*overrides).spec.kernels == kernels


def test_the_command_plans_what_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["hardware=p4", "run.force=it's fine"]
    plan = plan_of(overrides, "")
    assert plan.overrides == tuple(overrides) and plan.run_id.endswith("-tiny_llava-full-p4-" + plan.run_id[-4:])
    assert plan_of(overrides, "monday").run_id == "monday"
    for run_id in ("a/b", "..", "a b"):
        with pytest.raises(ConfigRefused, match=r"--run-id"):
            plan_of(overrides, run_id)
    with pytest.raises(ConfigRefused, match=r"stage\.checkpoint=mondy: there is no folder and no run of this name in"):
        plan_of(["stage=lora", "stage.checkpoint=mondy"], "")


def test_two_problems_are_reported_together(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused) as caught:
        plan_for("hardware=p4", "precision=bf16", "run.steps=0")
    text = str(caught.value)
    assert "2 reasons" in text and "precision" in text and "run.steps" in text and "precision=fp16" in text


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("a/b", "/home/ann/a/b"),
        ("/data", "/data"),
        (".", "/home/ann"),
        ("../x", "/home/x"),
        ("../../../../x", "/x"),
        ("./a/./b", "/home/ann/a/b"),
    ],
)
def test_absolute(path: str, wanted: str) -> None:
    assert absolute(path, Path("/home/ann")) == wanted


def test_a_plan_of_an_earlier_version_gets_the_same_container_options(plan_for: Callable[..., Plan]) -> None:
    """Its commands do not hold them. They are made again, never parsed out of the argv."""
    plan = plan_for("hardware=ascend910b", "cluster=example", "cluster.user=1000:1000")
    earlier = to_plain(plan)
    for command in earlier["commands"]:
        del command["container"]
    read: Plan = decode(Plan, earlier)
    assert [command.container for command in read.commands] == [None, None] and read.container_user == "1000:1000"
    assert with_container_options(read, PLACE).commands == plan.commands


def test_a_run_elsewhere_is_not_local_even_with_the_same_path(plan_for: Callable[..., Plan]) -> None:
    """Where the nodes have the launcher's own folder under the same path, the two folders have equal names."""
    plan = plan_for("hardware=cpu", "cluster=example", "cluster.root=/home/ann/work")
    assert plan.folder == plan.spec.output and not plan.is_local
    assert plan_for().is_local and plan_for("cluster.runtime=docker").is_local
