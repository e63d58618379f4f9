"""One adapter per kind of accelerator (CPU, CUDA, NPU): no other module of the trainer asks which one it runs on.

torch_npu gives `torch.npu` the functions of `torch.cuda`, so both are one table entry over a namespace. `torch.accelerator` would also do,
but has no memory functions before torch 2.9, and we run on 2.7.
"""

import os
import platform
import random
import re
import resource
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from trainer.contract import DeviceSpec, InputRefused, RunFailed
from trainer.contract.determinism import deterministic_variables

ASCEND_DRIVER = Path("/usr/local/Ascend/driver/version.info")
ASCEND_FIRMWARE = Path("/usr/local/Ascend/firmware/version.info")
ASCEND_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
# Application clocks come last: newer drivers may not know them any more.
NVIDIA_SETTINGS = (
    *("name", "vbios_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "power.max_limit", "ecc.mode.current"),
    *("persistence_mode", "mig.mode.current"),
)
NVIDIA_APPLICATION_CLOCKS = ("clocks.applications.graphics", "clocks.applications.memory")
EMPTY_ANSWERS = ("", "N/A", "[N/A]", "[Not Supported]", "[Insufficient Permissions]", "[Unknown Error]")
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the trainer needs of an accelerator. `local_rank` counts from 0 on each node; sizes are in bytes."""

    name: str
    prepare: Callable[[], None]
    count: Callable[[], int]
    torch_device: Callable[[int], torch.device]
    activate: Callable[[int], None]
    synchronize: Callable[[], None]
    peak_bytes: Callable[[], int]
    reserved_bytes: Callable[[], int]  # the peak of the allocator's reserved memory; 0 where there is no allocator
    reset_peaks: Callable[[], None]
    profiler: Callable[[], Any] = lambda: torch.profiler  # the module with `profile` and `ProfilerActivity`
    memory: Callable[[], tuple[int, int]]  # free, total
    title: Callable[[int], str]
    driver: Callable[[], str] = str
    firmware: Callable[[], str] = str
    toolkit: Callable[[], dict[str, str]] = dict  # versions of compute and communication libraries
    settings: Callable[[], dict[str, str]] = dict  # clocks and power caps per device; {} where they cannot be read


def open_device(spec: DeviceSpec, local_rank: int) -> tuple[Device, torch.device]:
    """Select this rank's device. Raises RunFailed if it does not exist."""
    device = DEVICES[spec.accelerator]
    device.prepare()
    if local_rank >= device.count():
        raise RunFailed(
            f"the rank with local number {local_rank} has no {device.name} device: {device.count()} are visible here, the plan needs "
            f"{spec.devices_per_node}. Check CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES and the driver, or plan with fewer devices."
        )
    device.activate(local_rank)
    if spec.threads:
        torch.set_num_threads(spec.threads)
    return device, device.torch_device(local_rank)


def seed_all(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch (every device). `deterministic`: operators without a reproducible kernel raise an error."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when its first handle is created: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def find_determinism(accelerator: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Every determinism switch of the accelerator and its current value; '' for a variable that is not set."""
    switches = {
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "cudnn.deterministic": str(torch.backends.cudnn.deterministic),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
    }
    return switches | {name: environ.get(name, "") for name in deterministic_variables(accelerator)}


def require_determinism(accelerator: str, environ: Mapping[str, str]) -> None:
    """Raises InputRefused that names the switches whose value breaks run.deterministic=true."""
    found = find_determinism(accelerator, environ)
    wanted = {"deterministic_algorithms": ("True",), "cudnn.deterministic": ("True",), "cudnn.benchmark": ("False",)}
    wanted |= deterministic_variables(accelerator)
    wrong = [f"{name} is {found[name]!r}, not {' or '.join(values)}" for name, values in wanted.items() if found[name] not in values]
    if wrong:
        raise InputRefused(
            f"run.deterministic=true does not hold: {'; '.join(wrong)}. Remove these variables from cluster.environment, "
            "hardware.environment and this shell, or set run.deterministic=false"
        )


def processor_title() -> str:
    """The CPU's name from /proc/cpuinfo, or its architecture where that file has none (aarch64)."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def system_memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def resident_peak() -> int:
    """Peak resident memory in bytes, since the start or the last `reset_resident_peak`."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # both count in KiB


def reset_resident_peak() -> None:
    """If the kernel allows it; otherwise every peak is that of the whole run."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets VmHWM to the current resident size


def host_memory_bytes() -> int:
    """Host memory that this process can still get: free or used only by caches, and within the container's limit."""
    free, _ = system_memory()
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", MEMORY.read_text(encoding="ascii"), re.MULTILINE)
    free = int(found.group(1)) * 1024 if found else free
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return free
    return min(free, max(0, limit - used))


def nvidia_driver() -> str:
    return next(iter(query_nvidia_smi("driver_version")), [""])[0]


def query_nvidia_smi(*fields: str) -> list[list[str]]:
    """One row per device; [] if nvidia-smi is missing (as in some containers, which train all the same) or fails."""
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(answer.stdout, len(fields))


def parse_nvidia_smi(text: str, columns: int) -> list[list[str]]:
    """The rows of a query; other lines, such as warnings, are skipped."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]


def nvidia_settings() -> dict[str, str]:
    fields = (*NVIDIA_SETTINGS, *NVIDIA_APPLICATION_CLOCKS)
    rows = query_nvidia_smi(*fields)
    if not rows:
        fields = NVIDIA_SETTINGS
        rows = query_nvidia_smi(*fields)
    return name_settings(fields, rows)


def name_settings(fields: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """`<device> <field>` -> value; fields without a value are left out."""
    return {
        f"{index} {field}": value
        for index, row in enumerate(rows)
        for field, value in zip(fields, row, strict=True)
        if value not in EMPTY_ANSWERS
    }


def cuda_toolkit() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    return {"CUDA": torch.version.cuda or "", "cuDNN": str(cudnn or ""), "NCCL": nccl}


def read_version(path: Path) -> str:
    """From Ascend's *.info files: `Version=25.5.2`, or `version=` in those of the toolkit. '' if there is no file."""
    try:
        found = re.search(r"^version=(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)
    except OSError:
        return ""
    return found.group(1) if found else ""


def npu_toolkit() -> dict[str, str]:
    """HCCL is part of CANN and has its version."""
    homes = [Path(os.environ[name]) for name in ASCEND_HOMES if os.environ.get(name)]
    files = [path for home in homes for path in sorted(home.glob("*-linux/ascend_toolkit_install.info"))]
    cann = next((version for path in files if (version := read_version(path))), "")
    return {"CANN": cann, "HCCL": cann, "torch_npu": str(getattr(torch.npu, "__version__", ""))}


def torch_build() -> dict[str, str]:
    """The same on every device. `cpu`: the widest vector instructions that torch's kernels use here, which changes the order of sums."""
    return {"torch": torch.__version__, "torch commit": str(torch.version.git_version), "cpu": torch.backends.cpu.get_cpu_capability()}


def import_torch_npu() -> None:
    import torch_npu  # noqa: F401  # its import adds torch.npu


def npu_profiler() -> Any:
    """The same interface as torch's (Ascend/op-plugin, docs/zh/custom_APIs/torch_npu-profiler)."""
    import torch_npu.profiler

    return torch_npu.profiler


def accelerator_device(name: str, *, prepare: Callable[[], None], **facts: Any) -> Device:
    """`torch.<name>` is looked up on each call: torch.npu exists only after `prepare`. `facts`: profiler, driver, firmware, toolkit, settings."""

    def api() -> Any:
        return getattr(torch, name)

    return Device(
        name=name,
        prepare=prepare,
        count=lambda: api().device_count(),
        torch_device=lambda local_rank: torch.device(name, local_rank),
        activate=lambda local_rank: api().set_device(local_rank),
        synchronize=lambda: api().synchronize(),
        peak_bytes=lambda: api().max_memory_allocated(),
        reserved_bytes=lambda: api().max_memory_reserved(),
        reset_peaks=lambda: api().reset_peak_memory_stats(),
        memory=lambda: api().mem_get_info(),
        title=lambda local_rank: api().get_device_name(local_rank),
        **facts,
    )


DEVICES = {
    "cpu": Device(
        name="cpu",
        prepare=lambda: None,
        count=lambda: 2**31,  # any number of ranks can share the processor
        torch_device=lambda _: torch.device("cpu"),
        activate=lambda _: None,
        synchronize=lambda: None,
        peak_bytes=resident_peak,
        reserved_bytes=lambda: 0,
        reset_peaks=reset_resident_peak,
        memory=system_memory,
        title=lambda _: processor_title(),
    ),
    "cuda": accelerator_device("cuda", prepare=lambda: None, driver=nvidia_driver, toolkit=cuda_toolkit, settings=nvidia_settings),
    "npu": accelerator_device(
        "npu",
        prepare=import_torch_npu,
        profiler=npu_profiler,
        driver=lambda: read_version(ASCEND_DRIVER),
        firmware=lambda: read_version(ASCEND_FIRMWARE),
        toolkit=npu_toolkit,
    ),
}
