"""What nvidia-smi and npu-smi print when something is wrong, by the node that printed it: the real script, with a stand-in for the tool."""

import re
from pathlib import Path

import pytest

from launcher.config.schema import Accelerator
from launcher.doctor.parse import NOT_ASKED, CommandOutput, read_devices
from launcher.doctor.questions import read_script
from launcher.doctor.smi import NVIDIA_FIELDS
from launcher.doctor.smi_fault import MOST_GROUPS, TABLE, find_faults, known_faults
from launcher.ssh.transport import Local

ROW = "0, Tesla P4, GPU-aa, 7680, 0, 535.104.05, 6.1, 0"
NPU = (Path(__file__).parents[2] / "golden" / "smi" / "npu-25.5.2-910b4.txt").read_text()
# accelerator, exit code, output -> number of devices, a part of the meaning, a part of the fix
SITUATIONS: dict[str, tuple[Accelerator, int, str, int, str, str]] = {
    "infoROM": ("cuda", 14, f"{ROW}\nWARNING: infoROM is corrupted at gpu 0000:3B:00.0\n", 1, "infoROM of GPU 0000:3B:00.0 is", "nothing"),
    "infoROM by its code": ("cuda", 14, f"{ROW}\n", 1, "infoROM of GPU (not named) is", "nothing"),
    "mismatch": (
        *("cuda", 18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n"),
        *(0, "different versions", "restart the node"),
    ),
    "lost": (
        *("cuda", 15, f"{ROW}\nUnable to determine the device handle for GPU1: 0000:27:00.0: GPU is lost.  Reboot the system to recover this GPU\n"),
        *(1, "GPU 0000:27:00.0 does not respond any more (GPU is lost)", "restart the node"),
    ),
    "lost, as newer drivers print it": (
        *("cuda", 255, f"{ROW}\nUnable to determine the device handle for GPU 0000:02:00.0: Unknown Error\n"),
        *(1, "GPU 0000:02:00.0 does not respond any more (Unknown Error)", "restart the node"),
    ),
    "not loaded": (
        *("cuda", 9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that it is installed.\n"),
        *(0, "kernel module is not loaded", "dkms autoinstall"),
    ),
    "not allowed": ("cuda", 4, "Failed to initialize NVML: Insufficient Permissions\n", 0, "this user may not ask it", "usermod"),
    "WSL": ("cuda", 17, "Failed to initialize NVML: GPU access blocked by the operating system\n", 0, "WSL", "on the host"),
    "other NVML": ("cuda", 255, "Failed to initialize NVML: Unknown Error\n", 0, "could not start: Unknown Error", "dmesg"),
    "no GPU": ("cuda", 6, "No devices were found\n", 0, "it could start no GPU", "lspci"),
    "missing": ("cuda", 127, "", 0, "not installed", "install the NVIDIA driver"),
    "hangs": ("cuda", 124, "", 0, "did not end in time", "xid"),
    "crash": ("cuda", 139, "", 0, "crashed", "one version"),
    "unknown": ("cuda", 99, "something new\n", 0, "something new", ""),
    "nothing": ("cuda", 0, "", 0, "no devices are listed", ""),
    "npu not allowed": ("npu", 187, "DrvMngGetConsoleLogLevel failed. (ret=4)\ndcmi module initialize failed. ret is -8005\n", 0, "answer this user", "HwHiAiUser"),
    "npu held": ("npu", 1, "dcmi model initialized failed, because the device is used. ret is -8020\n", 0, "another container", "namespace_node"),
    "npu ioctl": ("npu", 1, "dcmi module initialize failed. ret is -8009\n", 0, "driver and firmware", "version.info"),
    "npu other": ("npu", 1, "dcmi module initialize failed. ret is -8099\n", 0, "DCMI error -8099", "dmesg"),
    "npu library": (
        *("npu", 127, "npu-smi: error while loading shared libraries: libdrvdsmi_host.so: cannot open shared object file\n"),
        *(0, "does not find libdrvdsmi_host.so", "ldconfig"),
    ),
    "npu missing": ("npu", 127, "sh: npu-smi: not found\n", 0, "not installed", "--install-for-all"),
    "npu warns": ("npu", 0, f"[WARN] dcmi version is older than npu-smi, some fields may be missing\n{NPU}", 1, "", ""),
    "npu cut": ("npu", 0, NPU[: len(NPU) // 2], 0, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_it_means(name: str) -> None:
    accelerator, code, output, count, meaning, fix = SITUATIONS[name]
    devices, faults = read_devices(accelerator, CommandOutput(code=code, output=output, errors=""), NOT_ASKED)
    assert len(devices) == count
    assert meaning in "\n".join(fault.described for fault in faults) and fix in "\n".join(fault.fix for fault in faults)
    assert bool(faults) == bool(meaning or not count)


def test_each_fault_is_named_once_and_those_of_several_gpus_apart() -> None:
    lines = [f"WARNING: infoROM is corrupted at gpu 0000:{bus}:00.0" for bus in ("3B", "3B", "5E")]
    assert [fault.meaning.split(" is ")[0] for fault in find_faults("nvidia-smi", 14, lines)] == [
        "the infoROM of GPU 0000:3B:00.0",
        "the infoROM of GPU 0000:5E:00.0",
    ]


def test_hostile_output_is_bounded() -> None:
    (fault,) = find_faults("nvidia-smi", 1, ["Unable to determine the device handle for GPU" + " :" * 5_000_000])
    assert len(fault.described) < 1000


def test_the_table() -> None:
    """Each row has something to match, no pattern has a repetition within a repetition, and each has a source."""
    for tool in ("nvidia-smi", "npu-smi"):
        for fault in known_faults(tool):
            assert (fault.pattern or fault.codes) and fault.source and fault.fix, fault.name
            assert re.compile(fault.pattern).groups <= MOST_GROUPS and not re.search(r"[+*]\)[+*]", fault.pattern)
    assert TABLE.is_file()


# --------------------------------------------------------------------------------------------------------- the script itself

TOOL = """#!/bin/sh
for word; do case $word in --query-gpu=*) fields=${word#--query-gpu=};; esac; done
for unknown in @unknown@; do
  case ",$fields," in *",$unknown,"*) echo "Field \\"$unknown\\" is not a valid field to query."; exit 2;; esac
done
echo "$fields" | tr ',' '\\n' | sed 's/^index$/0/' | paste -sd , - | sed 's/,/, /g'
"""


def ask_tool(folder: Path, *unknown: str) -> CommandOutput:
    tool = folder / "nvidia-smi"
    tool.write_text(TOOL.replace("@unknown@", " ".join(unknown)))
    tool.chmod(0o755)
    done = Local({"PATH": f"{folder}:/usr/bin:/bin"}).run(("sh", "-c", read_script("nvidia.sh"), "sh", ",".join(NVIDIA_FIELDS)))
    return CommandOutput(code=done.code, output=done.output, errors=done.errors)


@pytest.mark.parametrize("unknown", [(), ("compute_cap",), ("fabric.state", "remapped_rows.failure", "compute_cap", "fabric.status")])
def test_fields_that_the_driver_does_not_know_are_left_out(tmp_path: Path, unknown: tuple[str, ...]) -> None:
    said = ask_tool(tmp_path, *unknown)
    devices, faults = read_devices("cuda", said, NOT_ASKED)
    assert [device.name for device in devices] == ["name"] and faults == () and said.code == 0
    assert said.output.splitlines()[0].removeprefix("fields: ").split(",") == [name for name in NVIDIA_FIELDS if name not in unknown]


def test_a_driver_that_knows_no_field_ends(tmp_path: Path) -> None:
    said = ask_tool(tmp_path, *NVIDIA_FIELDS)
    devices, (fault,) = read_devices("cuda", said, NOT_ASKED)
    assert devices == () and "is so old" in fault.meaning and "upgrade the driver" in fault.fix
