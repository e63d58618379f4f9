"""Checks of a node's accelerators and their driver: there, the right ones, sound, idle, and such that a container can have them. Pure."""

from collections.abc import Iterator

from launcher.doctor.findings import Case, CheckResult, fine, unchecked, warn, wrong
from launcher.doctor.host_checks import numbers
from launcher.doctor.node_facts import Mode
from launcher.doctor.smi import SmiDevice
from launcher.memory.states import device_count
from launcher.plan.devices import ASCEND_MANAGERS, ASCEND_RUNTIME, NPU_SMI, OTHER_NPU_SMI, Share, ascend_mounts, device_numbers, share_of

TOOL = {"cuda": "nvidia-smi", "npu": "npu-smi info", "cpu": ""}
LEAST_SHARE = 0.9  # of the memory in the hardware table: ECC and the driver keep some
BUSY_SHARE = 0.15  # in use by nobody who is seen; an idle 910B4 says 9 %
GROUP_USES = 0o060
NO_DEVICES = "no devices could be read"


def numbers_used(case: Case) -> tuple[int, ...]:
    """The devices that the run takes, by their numbers on the host."""
    return device_numbers(case.node, device_count(case.plan.config))


def used(case: Case) -> tuple[SmiDevice, ...]:
    """Those of them that are there."""
    wanted = numbers_used(case)
    return tuple(device for device in case.facts.devices if device.physical in wanted)


def share(case: Case) -> Share:
    return share_of(case.plan.config.cluster, case.node, device_count(case.plan.config))


def check_device_tool(case: Case) -> CheckResult:
    tool = TOOL[case.plan.config.hardware.accelerator]
    if not case.facts.devices_error:
        return fine(f"{tool} answers")
    fix = f"install the driver of the {case.plan.config.hardware.title} on the host; then {tool} must work for {case.facts.user}"
    return wrong(f"{tool}: {case.facts.devices_error}", fix)


def check_device_count(case: Case) -> CheckResult:
    wanted, there = numbers_used(case), tuple(device.physical for device in case.facts.devices)
    missing = [number for number in wanted if number not in there]
    if case.facts.devices_error:
        return unchecked(NO_DEVICES)
    if not missing:
        return fine(f"{len(there)} device(s), {len(wanted)} used")
    if not there or (len(there) < len(wanted) and not case.node.devices):
        fix = f"cluster.devices_per_node={len(there)}" if there else "look into dmesg for the driver's messages"
        return wrong(f"{len(there)} device(s), {len(wanted)} wanted on each node", fix)
    named = f"{{host: {case.node.host}, devices: [{', '.join(map(str, there[: len(wanted)]))}]}} in the cluster file"
    return wrong(f"no device {', '.join(map(str, missing))}; there are {', '.join(map(str, there))}", named)


def check_chip(case: Case) -> CheckResult:
    hardware = case.plan.config.hardware
    names = sorted({device.name for device in used(case)})
    if not names:
        return unchecked(NO_DEVICES)
    if set(names) <= set(hardware.chips):
        return fine(", ".join(names))
    fix = "choose the hardware that it is: omnilaunch options hardware"
    return wrong(f"it has {', '.join(names)}; hardware={hardware.name} is {', '.join(hardware.chips)}", fix)


def check_device_memory(case: Case) -> CheckResult:
    said = case.plan.config.hardware.memory_gib
    sizes = [device.memory_total_gib for device in used(case) if device.memory_total_gib is not None]
    if not used(case):
        return unchecked(NO_DEVICES)
    if not sizes or said is None:
        return unchecked("its tool says no size of memory")
    if min(sizes) >= LEAST_SHARE * said:
        return fine(f"{min(sizes):.1f} GiB each")
    # Whether it fits all the same is told by launcher.doctor.free_memory.
    return warn(f"{min(sizes):.1f} GiB, the plan counts on {said:g}", f"hardware.memory_gib={min(sizes):.0f}")


def check_device_health(case: Case) -> CheckResult:
    if not used(case):
        return unchecked(NO_DEVICES)
    ill = [f"device {device.physical}: {device.health}" for device in used(case) if device.health.upper() != "OK"]
    if not ill:
        return fine("all healthy")
    fix = {
        "cuda": "sudo nvidia-smi --gpu-reset -i INDEX while nothing uses it, or restart the node; dmesg | grep NVRM says why",
        "npu": "npu-smi info -t health -i NPU -c CHIP says more; npu-smi set -t reset -i NPU -c CHIP while nothing uses it",
    }
    return wrong(", ".join(ill), fix[case.plan.config.hardware.accelerator])


def check_device_idle(case: Case) -> CheckResult:
    """A process that is seen is in the way; memory in use by nobody may be one of another container, or a leak."""
    if not used(case):
        return unchecked(NO_DEVICES)
    busy = [(device, process) for device in used(case) for process in device.processes]
    if busy:
        text = ", ".join(f"device {device.physical}: process {process.pid} {process.name}".rstrip() for device, process in busy[:6])
        pids = " ".join(sorted({str(process.pid) for _, process in busy}))
        return wrong(f"in use: {text}", f"ps -o pid,user,etime,args -p {pids.replace(' ', ',')}; when nobody needs them: kill {pids}")
    full = [device for device in used(case) if taken_share(device) > BUSY_SHARE]
    if full:
        text = ", ".join(f"device {device.physical}: {device.memory_used_gib:.1f} GiB" for device in full)
        return warn(f"memory in use by no process that is seen: {text}", "docker ps on the node: a container may hold it")
    return fine("idle")


def taken_share(device: SmiDevice) -> float:
    return (device.memory_used_gib or 0.0) / device.memory_total_gib if device.memory_total_gib else 0.0


def check_driver(case: Case) -> CheckResult:
    """Within what the hardware table and the stack's row (CANN's release notes, CUDA's compatibility) allow."""
    driver = case.facts.driver
    if not driver:
        return unchecked("the node says no driver version")
    out = list(out_of_range(case))
    if out:
        fix = "install a driver in that range, or choose another stack: hardware.stack=NAME (docs/images.md has the ranges)"
        return wrong("\n".join(f"driver {driver} is {text}" for text in out), fix)
    return fine(f"driver {driver} fits {case.stack.toolkit or case.stack.name}")


def out_of_range(case: Case) -> Iterator[str]:
    """A bound counts as far as it is written: 580.159 is not above 580."""
    hardware, stack, driver = case.plan.config.hardware, case.stack, numbers(case.facts.driver)
    for who, low, high in (
        (hardware.title, hardware.driver.minimum, hardware.driver.maximum),
        (stack.toolkit or stack.name, stack.driver_minimum, stack.driver_maximum),
    ):
        if low and driver < numbers(low):
            yield f"older than {low}, the oldest for {who}"
        if high and driver[: len(numbers(high))] > numbers(high):
            yield f"newer than {high}, the newest for {who}"


def check_device_files(case: Case) -> CheckResult:
    """What is mapped into the container must be there, by the numbers that the start command uses."""
    accelerator, wanted = case.plan.config.hardware.accelerator, numbers_used(case)
    if accelerator == "npu":
        files = (*(f"/dev/davinci{number}" for number in wanted), *ASCEND_MANAGERS)
    else:
        files = (*(f"/dev/nvidia{number}" for number in wanted), "/dev/nvidiactl", "/dev/nvidia-uvm")
    missing = [name for name in files if name not in case.facts.files]
    if not missing:
        return fine(f"{len(files)} device files")
    if accelerator == "cuda":
        return warn(f"missing: {', '.join(missing)}", "sudo nvidia-modprobe -u -c=0 (the container toolkit does it when it can)")
    return wrong(
        f"missing: {', '.join(missing)}", "install or reload the Ascend driver, or name the devices that are there: cluster.nodes.N.devices"
    )


def check_device_access(case: Case) -> CheckResult:
    """A container sees the device files with the owner and the bits that they have on the host, and its user is not root."""
    argv = case.plan.commands[0].start
    uid, gid = (int(word) for word in argv[argv.index("--user") + 1].split(":"))
    wanted = (*(f"/dev/davinci{number}" for number in numbers_used(case)), *ASCEND_MANAGERS)
    closed = [
        (name, case.facts.modes[name]) for name in wanted if name in case.facts.modes and not may_use(case.facts.modes[name], uid, gid)
    ]
    if not case.facts.modes:
        return unchecked("the node does not say whose the device files are")
    if not closed:
        return fine(f"user {uid}:{gid} of the container may use the device files")
    groups = sorted({mode.gid for _, mode in closed if mode.bits & GROUP_USES == GROUP_USES})
    fix = "install the driver with --install-for-all, which opens the device files to every user"
    if len(groups) == 1:
        fix = f"cluster.user={uid or 1000}:{groups[0]} runs as the device files' group; or {fix}"
    text = ", ".join(f"{name} ({mode.bits:o}, owner {mode.uid}:{mode.gid})" for name, mode in closed[:3])
    return wrong(f"user {uid}:{gid} of the container may not use {text}" + (f" and {len(closed) - 3} more" if len(closed) > 3 else ""), fix)


def may_use(mode: Mode, uid: int, gid: int) -> bool:
    """Read and write, as the kernel decides: the first of owner, group and others that fits, and root always."""
    shift = 6 if uid == mode.uid else 3 if gid == mode.gid else 0
    return uid == 0 or (mode.bits >> shift) & 0o6 == 0o6


def check_driver_mounts(case: Case) -> CheckResult:
    """Docker refuses to start a container whose bind mount has no source."""
    wanted = ascend_mounts(share(case))
    missing = [path for path in wanted if path not in case.facts.files]
    if not missing:
        return fine(f"{len(wanted)} files of the driver")
    if missing == [NPU_SMI] and OTHER_NPU_SMI in case.facts.files:
        return wrong(f"missing: {NPU_SMI}; it lies at {OTHER_NPU_SMI}", f"sudo ln -s {OTHER_NPU_SMI} {NPU_SMI}")
    return wrong(
        f"missing: {', '.join(missing)}", "install the Ascend driver with --full --install-for-all, or link the path to where it lies"
    )


def check_ascend_runtime(case: Case) -> CheckResult:
    """An engine that lacks it refuses every container that asks for it."""
    docker = case.facts.docker
    if not docker or not docker.engine:
        return unchecked("the engine does not answer")
    if ASCEND_RUNTIME in docker.runtimes:
        return fine(f"the engine has the runtime {ASCEND_RUNTIME}")
    fix = "install Ascend Docker Runtime and sudo systemctl restart docker, or cluster.ascend_runtime=false"
    return wrong(f"the engine knows no runtime {ASCEND_RUNTIME!r}, only {', '.join(docker.runtimes)}", fix)
