"""Recorded tables of nvidia-smi and npu-smi, every layout, as devices."""

from pathlib import Path

import pytest

from launcher.doctor.smi import SmiDevice, UnreadableTable, nvidia_remarks, read_npu, read_npu_driver, read_nvidia

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "smi"


def recorded(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


# file -> driver, number of devices, and of one of them: place, physical number, name, GiB in all, MB used, health, processes
NPU_SAMPLES = {
    "npu-22.0.4.1-910.txt": ("22.0.4.1", 1, 0, 0, "910B", 32, 0, "OK", 0),
    "npu-22.0.2-310p3.txt": ("22.0.4", 1, 0, 0, "310P3", 21527 / 1024, 1807, "OK", 0),
    "npu-24.1.rc3.7-a3.txt": ("24.1.rc3.7", 16, 9, 9, "Ascend910", 64, 3200, "OK", 0),
    "npu-25.2.0-910b3.txt": ("25.2.0", 8, 2, 2, "910B3", 64, 41052, "OK", 1),
    "npu-25.2.0-910b4-1.txt": ("25.2.0", 2, 1, 7, "910B4-1", 64, 65000, "Alarm", 0),
    "npu-25.2.3-a3-busy.txt": ("25.2.3", 16, 1, 1, "Ascend910", 64, 52948, "OK", 1),
    "npu-25.5.2-910b4.txt": ("25.5.2", 1, 0, 5, "910B4", 32, 2922, "OK", 0),
    "npu-26.0.rc1-910b4.txt": ("26.0.rc1", 1, 0, 0, "910B4", 32, 2871, "OK", 0),
    "npu-26.0.rc1-a3.txt": ("26.0.rc1", 4, 3, 11, "Ascend910", 64, 2882, "OK", 0),
}


def test_every_recorded_npu_table_is_here() -> None:
    assert {path.name for path in GOLDEN.glob("npu-*.txt")} == set(NPU_SAMPLES)


@pytest.mark.parametrize("name", NPU_SAMPLES)
def test_npu(name: str) -> None:
    driver, count, place, physical, chip, total_gib, used_mb, health, processes = NPU_SAMPLES[name]
    devices = read_npu(recorded(name))
    device = devices[place]
    assert len(devices) == count and [each.index for each in devices] == list(range(count))
    assert (device.physical, device.name, device.health) == (physical, chip, health)
    assert device.memory_total_gib == pytest.approx(total_gib) and device.memory_used_gib == pytest.approx(used_mb / 1024)
    assert len(device.processes) == processes and {each.driver for each in devices} == {driver}


def test_npu_processes_are_on_their_die() -> None:
    devices = read_npu(recorded("npu-25.2.3-a3-busy.txt"))
    assert [process.pid for process in devices[0].processes] == [3325989, 3330598, 3328327, 3333165]
    assert [process.pid for process in devices[13].processes] == [3085961]
    assert sum(len(device.processes) for device in devices) == 14
    first = read_npu(recorded("npu-26.0.rc1-a3.txt"))[0].processes[0]
    assert (first.pid, first.name, first.memory_gib) == (1774110, "VLLMWorker_PP", pytest.approx(56684 / 1024))


def test_a_warning_before_the_table_is_no_harm() -> None:
    assert len(read_npu("DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n" + recorded("npu-26.0.rc1-910b4.txt"))) == 1


NO_NPU_TABLE = {
    "dcmi model initialized failed, because the device is used. ret is -8020\n": "ret is -8020",
    "": "unexpected output of npu-smi",
    recorded("npu-25.5.2-910b4.txt").replace("| 5     910B4", "| five  910B4"): "five  910B4",
    "\n".join(recorded("npu-25.5.2-910b4.txt").splitlines()[:7]): "is cut within a device: '5     910B4",
    recorded("npu-26.0.rc1-a3.txt").replace("1774110  ", "not a pid"): "not a pid",
}


@pytest.mark.parametrize("text", NO_NPU_TABLE)
def test_an_unreadable_npu_table_is_refused_with_the_line(text: str) -> None:
    with pytest.raises(UnreadableTable) as caught:
        read_npu(text)
    assert NO_NPU_TABLE[text] in str(caught.value)


def test_npu_driver_from_the_banner() -> None:
    assert read_npu_driver(recorded("npu-22.0.2-310p3.txt")) == "22.0.4"
    assert read_npu_driver("nothing") == ""


def facts(device: SmiDevice) -> tuple[object, ...]:
    return (device.name, device.memory_total_gib, device.health, device.driver, len(device.processes))


def test_nvidia() -> None:
    assert [facts(device) for device in read_nvidia(recorded("nvidia-p4.csv"))] == [("Tesla P4", 7.5, "OK", "580.173.02", 0)]
    assert facts(read_nvidia(recorded("nvidia-h200.csv"))[0]) == (
        "NVIDIA H200",
        pytest.approx(140.4, abs=0.01),
        "OK",
        "580.159.03",
        0,
    )
    assert facts(read_nvidia(recorded("nvidia-gb10.csv"))[0])[:3] == ("NVIDIA GB10", None, "OK")


def test_nvidia_processes_are_on_their_device() -> None:
    busy, idle = read_nvidia(recorded("nvidia-3090.csv"), recorded("nvidia-3090-apps.csv"))
    assert [(process.pid, process.name) for process in busy.processes] == [(3584667, "python")] and idle.processes == ()


def test_nvidia_that_is_ill() -> None:
    lost = "0, NVIDIA H200, GPU-1, [Unknown Error], [Unknown Error], 580.1, 9.0, [GPU requires reset]\n"
    assert read_nvidia(lost)[0].health == "Unknown Error" and read_nvidia(lost)[0].memory_total_gib is None


def test_a_line_that_is_no_row_is_a_remark() -> None:
    lost = "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost."
    text = recorded("nvidia-p4.csv") + lost + "\n"
    assert [device.name for device in read_nvidia(text)] == ["Tesla P4"] and nvidia_remarks(text) == (lost,)
    for text in ("No devices were found\n", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", ""):
        assert read_nvidia(text) == () and nvidia_remarks(text) == tuple(text.splitlines())


def test_a_driver_that_knows_fewer_fields_names_those_it_was_asked_for() -> None:
    text = "fields: index,name,uuid,memory.total,memory.used,driver_version,utilization.gpu\n0, Tesla P4, GPU-a, 7611, 0, 470.57.02, 0\n"
    (device,) = read_nvidia(text)
    assert (device.name, device.driver, device.mig, device.fabric) == ("Tesla P4", "470.57.02", False, "")
