import os
import platform
import random

import numpy
import pytest
import torch

from trainer.contract import DeviceSpec, RunFailed
from trainer.device.device import DEVICES, open_device, seed_all


def spec(accelerator: str, threads: int = 0) -> DeviceSpec:
    return DeviceSpec(accelerator=accelerator, backend="gloo", world_size=1, devices_per_node=1, threads=threads, timeout_s=1)  # type: ignore[arg-type]


def test_the_cpu_answers_every_question() -> None:
    device, place = open_device(spec("cpu"), local_rank=3)
    device.synchronize()
    free, total = device.memory()
    assert place == torch.device("cpu")
    assert 0 < free <= total
    assert 0 < device.peak_bytes() < total
    assert device.title(0) not in ("", "unknown") or platform.machine() == ""
    assert device.driver() == ""


def test_threads_are_set_only_where_the_plan_says_so() -> None:
    before = torch.get_num_threads()
    try:
        open_device(spec("cpu", threads=1), local_rank=0)
        assert torch.get_num_threads() == 1
        open_device(spec("cpu", threads=0), local_rank=0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test wants missing")
def test_a_missing_device_is_reported_with_what_to_check() -> None:
    with pytest.raises(RunFailed, match=r"no cuda device: 0 are visible.*CUDA_VISIBLE_DEVICES"):
        open_device(spec("cuda"), local_rank=0)


def test_every_accelerator_of_the_contract_has_its_adapter() -> None:
    assert set(DEVICES) == {"cpu", "cuda", "npu"}
    assert all(device.name == name for name, device in DEVICES.items())


def test_a_seed_fixes_python_numpy_and_torch() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    seed_all(7, deterministic=False)
    first = draw()
    seed_all(7, deterministic=False)
    assert draw() == first
    seed_all(8, deterministic=False)
    assert draw() != first


def test_deterministic_refuses_operators_without_a_reproducible_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        seed_all(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
