"""What `nvidia-smi` and `npu-smi info` print, as devices. Pure.

npu-smi draws a table whose columns move with its version (91 characters wide in 22.x, 96 in 23 to 25, 114 in 26), so a line is cut at
its bars and each cell read by what is in it. Recorded samples of every layout: tests/golden/smi.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

NVIDIA_FIELDS = ("index", "name", "uuid", "memory.total", "memory.used", "driver_version", "compute_cap", "utilization.gpu")
# Where the tools may lie beside the PATH of a login without a profile: npu-smi in /usr/local/sbin with some drivers, nvidia-smi in WSL's.
TOOL_FOLDERS = "/usr/local/bin:/usr/local/sbin:/usr/bin:/bin:/usr/sbin:/sbin:/usr/lib/wsl/lib"
FIND = ("sh", "-c", f'PATH="$PATH:{TOOL_FOLDERS}"; exec "$@"', "sh")
NVIDIA_QUERY = (*FIND, "nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader,nounits")
NVIDIA_APPS_QUERY = (*FIND, "nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits")
NPU_QUERY = (*FIND, "npu-smi", "info")

MIB_PER_GIB = 1024
NOT_SAID = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "")
SICK = re.compile(r"\[?(ERR!|Unknown Error|GPU is lost|GPU requires reset|Reset Required)[^\]]*\]?", re.IGNORECASE)
NO_NVIDIA_DEVICE = "No devices were found"

BANNER = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")
NPU_CELL = re.compile(r"(\d+)\s+(\S+)$")  # 0     910B3
CHIP_CELL = re.compile(r"(\d+)(?:\s+(\S+))?$")  # 0          or with the physical number:  0     10
USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")  # 41052/ 65536, in MB


class UnreadableTable(ValueError):
    """The text is no table of this tool; holds the first line that does not fit."""


@dataclass(frozen=True, kw_only=True)
class DeviceProcess:
    """`name` is empty where the tool hides it, `memory_gib` None where it says none."""

    pid: int
    name: str
    memory_gib: float | None


@dataclass(frozen=True, kw_only=True)
class SmiDevice:
    """One accelerator. `index`: as printed, from 0, which is what a process counts by; `physical`: as /dev/davinciN and docker count.
    Memory is None where the tool says none (unified memory); `health` is OK, or what the tool says instead."""

    index: int
    physical: int
    name: str
    memory_total_gib: float | None
    memory_used_gib: float | None
    health: str
    utilization_percent: float | None = None
    uuid: str = ""
    driver: str = ""
    processes: tuple[DeviceProcess, ...] = ()


# --------------------------------------------------------------------------------------------------------------- NVIDIA


def read_nvidia(text: str, apps: str = "") -> tuple[SmiDevice, ...]:
    """Devices from the output of NVIDIA_QUERY, and who is on them from that of NVIDIA_APPS_QUERY. Raises UnreadableTable."""
    if NO_NVIDIA_DEVICE in text:
        return ()
    rows = [(line, [cell.strip() for cell in line.split(",")]) for line in text.splitlines() if line.strip()]
    odd = next((line for line, cells in rows if len(cells) != len(NVIDIA_FIELDS) or not cells[0].isdigit()), "" if rows else text)
    if odd or not rows:
        raise UnreadableTable(f"no line of nvidia-smi ({', '.join(NVIDIA_FIELDS)}): {odd!r}")
    processes = tuple(nvidia_processes(apps))
    return tuple(nvidia_device(cells, processes) for _, cells in rows)


def nvidia_device(cells: list[str], processes: tuple[tuple[str, DeviceProcess], ...]) -> SmiDevice:
    index, name, uuid, total, used, driver, _, utilization = cells
    sick = next((cell for cell in cells if SICK.fullmatch(cell)), "")
    return SmiDevice(
        index=int(index),
        physical=int(index),
        name=name,
        memory_total_gib=mib(total),
        memory_used_gib=mib(used),
        health=sick.strip("[]") or "OK",
        utilization_percent=float(utilization) if utilization.isdigit() else None,
        uuid=uuid,
        driver="" if driver in NOT_SAID or SICK.fullmatch(driver) else driver,
        processes=tuple(process for owner, process in processes if owner == uuid),
    )


def nvidia_processes(text: str) -> Iterator[tuple[str, DeviceProcess]]:
    """Device uuid and process of each line; a line that is none (a warning) says nothing about the devices and is passed over."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= 4 and cells[1].isdigit():
            yield cells[0], DeviceProcess(pid=int(cells[1]), name=",".join(cells[2:-1]), memory_gib=mib(cells[-1]))


def mib(cell: str) -> float | None:
    """MiB as GiB; None for [N/A] and its like."""
    return int(cell) / MIB_PER_GIB if cell.isdigit() else None


# --------------------------------------------------------------------------------------------------------------- Ascend


def read_npu_driver(text: str) -> str:
    """The driver's version from the banner; '' when there is none."""
    found = BANNER.search(text)
    return found.group(2) if found else ""


def read_npu(text: str) -> tuple[SmiDevice, ...]:
    """Devices from `npu-smi info`: two lines each, then the table of processes. On an A3 each of a module's two dies is a device.
    Raises UnreadableTable, with the first odd line of the table, or of the whole text when there is no table."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    split = next((place for place, row in enumerate(rows) if any("Process id" in cell for cell in row)), len(rows))
    table = [row for row in rows[:split] if not is_heading(row)]
    if not BANNER.search(text) or not table:
        raise UnreadableTable(f"no table of npu-smi: {next((line for line in text.splitlines() if is_odd(line)), text)!r}")
    heads, chips = table[::2], table[1::2]
    if len(heads) != len(chips):
        raise UnreadableTable(f"the table of npu-smi ends within a device: {' | '.join(heads[-1])!r}")
    found = [npu_device(head, chip, index) for index, (head, chip) in enumerate(zip(heads, chips, strict=True))]
    processes = [npu_process(row) for row in rows[split + 1 :] if not row[0].startswith("No running processes")]
    driver = read_npu_driver(text)
    return tuple(
        replace(device, driver=driver, processes=tuple(process for owner, process in processes if owner == place))
        for place, device in found
    )


def is_heading(row: list[str]) -> bool:
    return row[0].startswith(("npu-smi", "NPU", "Chip"))


def is_odd(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("|", "+"))


def npu_device(head: list[str], chip: list[str], index: int) -> tuple[tuple[int, int], SmiDevice]:
    """(NPU, chip), which the table of processes counts by, and the device. A number after the chip's is the physical one; where there
    is none, the NPU's is."""
    first, second = NPU_CELL.match(head[0]), CHIP_CELL.match(chip[0])
    if not first or len(head) < 3:
        raise UnreadableTable(f"odd line in the table of npu-smi: {' | '.join(head)!r}")
    if not second or len(chip) < 3:
        raise UnreadableTable(f"odd line in the table of npu-smi: {' | '.join(chip)!r}")
    npu, physical = int(first.group(1)), second.group(2) or ""
    usage = [(int(used), int(total)) for used, total in USAGE.findall(chip[2]) if int(total)]
    used_mb, total_mb = usage[-1] if usage else (None, None)  # HBM stands last; the other pair is the memory of its control CPU
    busy = chip[2].split()[0] if chip[2] else ""
    return (npu, int(second.group(1))), SmiDevice(
        index=index,
        physical=int(physical) if physical.isdigit() else npu,
        name=first.group(2),
        memory_total_gib=None if total_mb is None else total_mb / MIB_PER_GIB,
        memory_used_gib=None if used_mb is None else used_mb / MIB_PER_GIB,
        health=head[1],
        utilization_percent=float(busy) if busy.isdigit() else None,
    )


def npu_process(row: list[str]) -> tuple[tuple[int, int], DeviceProcess]:
    place = CHIP_CELL.match(row[0])
    if not place or not (place.group(2) or "").isdigit() or len(row) < 4 or not row[1].isdigit():
        raise UnreadableTable(f"odd line in the process table of npu-smi: {' | '.join(row)!r}")
    return (int(place.group(1)), int(place.group(2))), DeviceProcess(pid=int(row[1]), name=row[2], memory_gib=mib(row[3]))
