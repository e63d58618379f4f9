"""One small adapter per kind of accelerator, so that nothing else in the trainer asks which one it runs on.

`torch.cuda` and `torch.npu` have the same functions by design of torch_npu, so both are one table entry over a namespace.
`torch.accelerator` would do, but has no memory functions before torch 2.9 and we run on 2.7.
"""

import os
import platform
import random
import re
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from trainer.contract import DeviceSpec, RunFailed

ASCEND_DRIVER = Path("/usr/local/Ascend/driver/version.info")
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the trainer asks of an accelerator. `local_rank` counts from 0 on each node; sizes are in bytes."""

    name: str
    prepare: Callable[[], None]
    count: Callable[[], int]
    place: Callable[[int], torch.device]
    activate: Callable[[int], None]
    synchronize: Callable[[], None]
    peak_bytes: Callable[[], int]
    reserved_bytes: Callable[[], int]  # the peak of what the allocator holds; 0 where there is none
    reset_peaks: Callable[[], None]
    profiler: Callable[[], Any]  # the module with `profile` and `ProfilerActivity`
    memory: Callable[[], tuple[int, int]]  # free, total
    title: Callable[[int], str]
    driver: Callable[[], str]


def open_device(spec: DeviceSpec, local_rank: int) -> tuple[Device, torch.device]:
    """Take this rank's device. Raises RunFailed when it is not there."""
    device = DEVICES[spec.accelerator]
    device.prepare()
    if local_rank >= device.count():
        raise RunFailed(
            f"rank with local number {local_rank} has no {device.name} device: {device.count()} are visible here, the plan counts on "
            f"{spec.devices_per_node}. Check CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES and the driver, or plan with fewer devices."
        )
    device.activate(local_rank)
    if spec.threads:
        torch.set_num_threads(spec.threads)
    return device, device.place(local_rank)


def seed_all(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch (every device); `deterministic` also refuses operators without a reproducible kernel."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when the first handle is made: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def processor_title() -> str:
    """The CPU's name as /proc/cpuinfo has it, or its architecture where that file has none (aarch64)."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def system_memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def resident_peak() -> int:
    """Since the start or the last `reset_resident_peak`, in bytes."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # both count in KiB


def reset_resident_peak() -> None:
    """Where the kernel lets a process do so; elsewhere every peak is that of the whole run."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets VmHWM to what is resident now


def host_memory_bytes() -> int:
    """What the host can still give to this process: free, or taken by nothing but caches, and within the container's limit."""
    free, _ = system_memory()
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", MEMORY.read_text(encoding="ascii"), re.MULTILINE)
    free = int(found.group(1)) * 1024 if found else free
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return free
    return min(free, max(0, limit - used))


def nvidia_driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""  # a container without nvidia-smi trains all the same
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else ""


def ascend_driver() -> str:
    try:
        found = re.search(r"^Version=(\S+)", ASCEND_DRIVER.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1) if found else ""


def import_torch_npu() -> None:
    import torch_npu  # noqa: F401  # its import adds torch.npu


def torch_profiler() -> Any:
    return torch.profiler


def npu_profiler() -> Any:
    """The same words as torch's (Ascend/op-plugin, docs/zh/custom_APIs/torch_npu-profiler)."""
    import torch_npu.profiler

    return torch_npu.profiler


def on_accelerator(
    name: str, prepare: Callable[[], None], driver: Callable[[], str], profiler: Callable[[], Any] = torch_profiler
) -> Device:
    """`torch.<name>` is looked up at call time: torch.npu exists only after `prepare`."""

    def api() -> Any:
        return getattr(torch, name)

    return Device(
        name=name,
        prepare=prepare,
        count=lambda: api().device_count(),
        place=lambda local_rank: torch.device(name, local_rank),
        activate=lambda local_rank: api().set_device(local_rank),
        synchronize=lambda: api().synchronize(),
        peak_bytes=lambda: api().max_memory_allocated(),
        reserved_bytes=lambda: api().max_memory_reserved(),
        reset_peaks=lambda: api().reset_peak_memory_stats(),
        profiler=profiler,
        memory=lambda: api().mem_get_info(),
        title=lambda local_rank: api().get_device_name(local_rank),
        driver=driver,
    )


DEVICES = {
    "cpu": Device(
        name="cpu",
        prepare=lambda: None,
        count=lambda: 2**31,  # as many ranks as the plan wants share the processor
        place=lambda _: torch.device("cpu"),
        activate=lambda _: None,
        synchronize=lambda: None,
        peak_bytes=resident_peak,
        reserved_bytes=lambda: 0,
        reset_peaks=reset_resident_peak,
        profiler=torch_profiler,
        memory=system_memory,
        title=lambda _: processor_title(),
        driver=lambda: "",
    ),
    "cuda": on_accelerator("cuda", lambda: None, nvidia_driver),
    "npu": on_accelerator("npu", import_torch_npu, ascend_driver, npu_profiler),
}
