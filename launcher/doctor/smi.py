"""Reads the output of `nvidia-smi` and `npu-smi info` into devices. Pure.

npu-smi prints a table whose columns depend on its version (91 characters wide in 22.x, 96 in 23 to 25, 114 in 26), so a line is split at
its bars and each cell is read by its content. Recorded samples of every layout: tests/golden/smi.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

# The first eight are those of every driver since 510; a node is asked for the others too, and leaves out what its driver does not know.
FIRST_FIELDS = ("index", "name", "uuid", "memory.total", "memory.used", "driver_version", "compute_cap", "utilization.gpu")
NVIDIA_FIELDS = (
    *FIRST_FIELDS,
    *("mig.mode.current", "compute_mode", "retired_pages.pending", "remapped_rows.pending", "remapped_rows.failure"),
    *("fabric.state", "fabric.status"),
)
NAMED_FIELDS = "fields: "  # begins the first line of nvidia.sh
# Folders of the tools that may not be on the PATH of an SSH command: npu-smi in /usr/local/sbin with some drivers, nvidia-smi in WSL.
TOOL_FOLDERS = "/usr/local/bin:/usr/local/sbin:/usr/bin:/bin:/usr/sbin:/sbin:/usr/lib/wsl/lib"
FIND = ("sh", "-c", f'PATH="$PATH:{TOOL_FOLDERS}"; exec "$@"', "sh")
NVIDIA_QUERY = ("nvidia.sh", ",".join(NVIDIA_FIELDS))  # a file of node_scripts/
NVIDIA_APPS_QUERY = (*FIND, "nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits")
NPU_QUERY = (*FIND, "npu-smi", "info")

MIB_PER_GIB = 1024
UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "")
UNHEALTHY = re.compile(r"\[?(ERR!|Unknown Error|GPU is lost|GPU requires reset|Reset Required)[^\]]*\]?", re.IGNORECASE)
YES = ("Yes", "1")
FABRIC_WORKS = ("Completed", "Success")

BANNER = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")
NPU_CELL = re.compile(r"(\d+)\s+(\S+)$")  # 0     910B3
CHIP_CELL = re.compile(r"(\d+)(?:\s+(\S+))?$")  # 0          or with the physical number:  0     10
USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")  # 41052/ 65536, in MB


class UnreadableTable(ValueError):
    """The text is not a table of this tool. The message has the first line that could not be read."""


@dataclass(frozen=True, kw_only=True)
class DeviceProcess:
    """`name` is '' and `memory_gib` None where the tool does not print them."""

    pid: int
    name: str
    memory_gib: float | None


@dataclass(frozen=True, kw_only=True)
class SmiDevice:
    """One accelerator. `index`: its position in the table, from 0, by which a process addresses it; `physical`: its number in
    /dev/davinciN and for docker. Memory is None where the tool does not print it (unified memory). `health`: OK, or what the tool prints
    instead. NVIDIA only: `mig`: whether it is divided into instances; `compute_mode`: Default, Exclusive_Process or Prohibited; `repair`: of its
    memory, waiting for a restart, or not possible; `fabric`: why NVLink through switches does not work, '' where it does or there is none."""

    index: int
    physical: int
    name: str
    memory_total_gib: float | None
    memory_used_gib: float | None
    health: str
    driver: str = ""
    processes: tuple[DeviceProcess, ...] = ()
    mig: bool = False
    compute_mode: str = ""
    repair: Literal["", "pending", "failed"] = ""
    fabric: str = ""


# --------------------------------------------------------------------------------------------------------------- NVIDIA


def read_nvidia(text: str, apps: str = "") -> tuple[SmiDevice, ...]:
    """Devices from the output of NVIDIA_QUERY, and their processes from that of NVIDIA_APPS_QUERY. Lines that are no rows are skipped:
    `nvidia_remarks`."""
    fields, rows, _ = split_nvidia(text)
    processes = tuple(nvidia_processes(apps))
    return tuple(nvidia_device(dict(zip(fields, cells, strict=True)), processes) for cells in rows)


def nvidia_remarks(text: str) -> tuple[str, ...]:
    """The lines that are no rows of devices: warnings, and why there are no rows."""
    return split_nvidia(text)[2]


def split_nvidia(text: str) -> tuple[tuple[str, ...], list[list[str]], tuple[str, ...]]:
    """(fields, the cells of each row, other lines)."""
    lines = [line for line in text.splitlines() if line.strip()]
    fields: tuple[str, ...] = FIRST_FIELDS
    if lines and lines[0].startswith(NAMED_FIELDS):
        fields = tuple(lines.pop(0).removeprefix(NAMED_FIELDS).split(","))
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    is_row = [len(row) == len(fields) and row[0].isdecimal() for row in cells]
    rows = [row for row, good in zip(cells, is_row, strict=True) if good]
    return fields, rows, tuple(line for line, good in zip(lines, is_row, strict=True) if not good)


def nvidia_device(row: Mapping[str, str], processes: tuple[tuple[str, DeviceProcess], ...]) -> SmiDevice:
    """`row`: field -> cell; a field that the driver does not know is missing."""
    said = {field: "" if cell in UNKNOWN else cell for field, cell in row.items()}
    unhealthy = next((cell for cell in said.values() if UNHEALTHY.fullmatch(cell)), "")
    driver, fabric = said.get("driver_version", ""), [said.get(field, "") for field in ("fabric.state", "fabric.status")]
    failed = said.get("remapped_rows.failure") in YES
    pending = {said.get("retired_pages.pending"), said.get("remapped_rows.pending")} & set(YES)
    return SmiDevice(
        index=int(said["index"]),
        physical=int(said["index"]),
        name=said["name"],
        memory_total_gib=mib(said["memory.total"]),
        memory_used_gib=mib(said["memory.used"]),
        health=unhealthy.strip("[]") or "OK",
        driver="" if UNHEALTHY.fullmatch(driver) else driver,
        processes=tuple(process for owner, process in processes if owner == said["uuid"]),
        mig=said.get("mig.mode.current") == "Enabled",
        compute_mode=said.get("compute_mode", ""),
        repair="failed" if failed else "pending" if pending else "",
        fabric=" ".join(word for word in fabric if word and not word.endswith(FABRIC_WORKS)),
    )


def nvidia_processes(text: str) -> Iterator[tuple[str, DeviceProcess]]:
    """Device uuid and process of each line; other lines, such as warnings, are skipped."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= 4 and cells[1].isdigit():
            yield cells[0], DeviceProcess(pid=int(cells[1]), name=",".join(cells[2:-1]), memory_gib=mib(cells[-1]))


def mib(cell: str) -> float | None:
    """MiB as GiB; None for [N/A] and similar texts."""
    return int(cell) / MIB_PER_GIB if cell.isdecimal() else None


# --------------------------------------------------------------------------------------------------------------- Ascend


def read_npu_driver(text: str) -> str:
    """The driver's version from the banner; '' without a banner."""
    found = BANNER.search(text)
    return found.group(2) if found else ""


def read_npu(text: str) -> tuple[SmiDevice, ...]:
    """Devices from `npu-smi info`: two lines each, then the table of processes. On an A3, each of the two dies of a module is a device.
    Raises UnreadableTable with the first line that could not be read."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    split = next((index for index, row in enumerate(rows) if any("Process id" in cell for cell in row)), len(rows))
    table = [row for row in rows[:split] if not row[0].startswith(("npu-smi", "NPU", "Chip"))]
    if not BANNER.search(text) or not table:
        other = next((line for line in text.splitlines() if line.strip() and not line.startswith(("|", "+"))), text)
        raise UnreadableTable(f"unexpected output of npu-smi: {other!r}")
    heads, chips = table[::2], table[1::2]
    if len(heads) != len(chips):
        raise UnreadableTable(f"the table of npu-smi is cut within a device: {' | '.join(heads[-1])!r}")
    found = [npu_device(head, chip, index) for index, (head, chip) in enumerate(zip(heads, chips, strict=True))]
    processes = [npu_process(row) for row in rows[split + 1 :] if not row[0].startswith("No running processes")]
    driver = read_npu_driver(text)
    return tuple(
        replace(device, driver=driver, processes=tuple(process for owner, process in processes if owner == key)) for key, device in found
    )


def npu_device(head: list[str], chip: list[str], index: int) -> tuple[tuple[int, int], SmiDevice]:
    """(NPU, chip), the key of the process table, and the device. Its physical number is printed after the chip's; where it is not, it is
    the number of the NPU."""
    first, second = NPU_CELL.match(head[0]), CHIP_CELL.match(chip[0])
    if not first or len(head) < 3:
        raise UnreadableTable(f"unexpected line in the table of npu-smi: {' | '.join(head)!r}")
    if not second or len(chip) < 3:
        raise UnreadableTable(f"unexpected line in the table of npu-smi: {' | '.join(chip)!r}")
    npu, physical = int(first.group(1)), second.group(2) or ""
    usage = [(int(used), int(total)) for used, total in USAGE.findall(chip[2]) if int(total)]
    used_mb, total_mb = usage[-1] if usage else (None, None)  # HBM is printed last; the other pair is the memory of its control CPU
    return (npu, int(second.group(1))), SmiDevice(
        index=index,
        physical=int(physical) if physical.isdigit() else npu,
        name=first.group(2),
        memory_total_gib=None if total_mb is None else total_mb / MIB_PER_GIB,
        memory_used_gib=None if used_mb is None else used_mb / MIB_PER_GIB,
        health=head[1],
    )


def npu_process(row: list[str]) -> tuple[tuple[int, int], DeviceProcess]:
    key = CHIP_CELL.match(row[0])
    if not key or not (key.group(2) or "").isdigit() or len(row) < 4 or not row[1].isdigit():
        raise UnreadableTable(f"unexpected line in the process table of npu-smi: {' | '.join(row)!r}")
    return (int(key.group(1)), int(key.group(2))), DeviceProcess(pid=int(row[1]), name=row[2], memory_gib=mib(row[3]))
