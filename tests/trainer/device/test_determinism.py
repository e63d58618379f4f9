"""run.deterministic=true: every switch is set and then asked back; and what is asked of a machine that has an accelerator."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.config.compose import compose
from launcher.image.stack import load_stacks
from launcher.plan.plan import make_plan
from tests.launcher.conftest import PLACE, PROJECT
from trainer.contract import InputRefused
from trainer.contract.determinism import deterministic_variables
from trainer.device import device
from trainer.device.device import (
    DEVICES,
    find_determinism,
    name_settings,
    parse_nvidia_smi,
    read_version,
    require_determinism,
    seed_all,
)

HARDWARE = {"cpu": "cpu", "cuda": "h200", "npu": "ascend910b"}  # one of each kind of accelerator
# Of a query of `nvidia-smi`, in its layout; an H200's own figures, and a P4's, which has no memory clock to ask for and no MIG.
FIELDS = ("name", "clocks.max.sm", "power.limit", "mig.mode.current")
PRINTED = """NVIDIA H200, 1980 MHz, 700.00 W, Disabled
Warning: persistence mode is disabled on device 00000000:01:00.0
Tesla P4, 1531 MHz, 75.00 W, [N/A]
"""


def planned_variables(accelerator: str) -> dict[str, str]:
    """The environment that the launcher gives the ranks of a deterministic run."""
    config = compose((f"hardware={HARDWARE[accelerator]}", "run.deterministic=true", "cluster.runtime=docker"), PROJECT / "conf")
    plan = make_plan(config, load_stacks(PROJECT / "images"), PLACE, run_id="R")
    return plan.commands[0].environment


@pytest.fixture
def switched() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("accelerator", DEVICES)
def test_what_the_launcher_sets_is_what_the_trainer_asks_for(switched: None, accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_all(1, deterministic=True)
    planned = planned_variables(accelerator)
    require_determinism(accelerator, planned)
    found = find_determinism(accelerator, planned)
    names = set(deterministic_variables(accelerator))
    assert found["deterministic_algorithms"] == "True" and names <= set(found) and names <= set(planned)


@pytest.mark.parametrize(
    ("accelerator", "name"), [(accelerator, name) for accelerator in DEVICES for name in deterministic_variables(accelerator)]
)
def test_a_variable_that_somebody_changed_is_named(switched: None, accelerator: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_all(1, deterministic=True)
    planned = planned_variables(accelerator)
    for environ in ({**planned, name: "no"}, {key: value for key, value in planned.items() if key != name}):
        with pytest.raises(InputRefused, match=rf"run\.deterministic=true does not hold: {name} is '(no)?', not .*cluster\.environment"):
            require_determinism(accelerator, environ)


def test_a_switch_that_is_off_is_named(switched: None) -> None:
    torch.use_deterministic_algorithms(False)
    with pytest.raises(InputRefused, match="deterministic_algorithms is 'False', not True"):
        require_determinism("cpu", {})


def test_clocks_and_power_caps_as_nvidia_smi_prints_them() -> None:
    assert name_settings(FIELDS, parse_nvidia_smi(PRINTED, len(FIELDS))) == {
        "0 name": "NVIDIA H200", "0 clocks.max.sm": "1980 MHz", "0 power.limit": "700.00 W", "0 mig.mode.current": "Disabled",
        "1 name": "Tesla P4", "1 clocks.max.sm": "1531 MHz", "1 power.limit": "75.00 W",
    }  # fmt: skip


def test_a_driver_that_knows_fewer_clocks_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        device, "query_nvidia_smi", lambda *fields: asked.append(fields) or ([] if len(asked) == 1 else [["x"] * len(fields)])
    )
    assert len(device.nvidia_settings()) == len(device.NVIDIA_SETTINGS) and len(asked[0]) == len(asked[1]) + 2


@pytest.mark.parametrize(
    ("text", "version"),
    [("Version=25.5.2\nascendhal_version=7.35.23\n", "25.5.2"), ("package_name=x\nversion=8.2.RC1\n", "8.2.RC1"), ("", "")],
)
def test_versions_in_ascends_files(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version.info").write_text(text)
    assert read_version(tmp_path / "version.info") == version and read_version(tmp_path / "missing") == ""


def test_the_cpu_has_no_toolkit_and_no_settings() -> None:
    assert DEVICES["cpu"].toolkit() == DEVICES["cpu"].settings() == {} and DEVICES["cpu"].firmware() == ""
    assert device.torch_build()["torch"] == torch.__version__ and device.torch_build()["cpu"]
