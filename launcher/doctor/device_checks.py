"""Checks of a node's accelerators and their driver: present, of the right kind, healthy, idle, usable in a container. Pure."""

from collections.abc import Collection, Iterator

from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.host_checks import NO_ENGINE, version_numbers
from launcher.doctor.node_facts import FileMode
from launcher.doctor.offers import offer, offer_devices
from launcher.doctor.smi import SmiDevice
from launcher.memory.states import device_count
from launcher.plan.devices import ASCEND_RUNTIME, NPU_SMI, OTHER_NPU_SMI, ascend_device_files, ascend_mounts, device_numbers, share_of
from trainer.contract.listing import list_some
from trainer.contract.wording import plural

TOOL = {"cuda": "nvidia-smi", "npu": "npu-smi info", "cpu": ""}
LEAST_SHARE = 0.9  # of the memory in the hardware table: ECC and the driver take some
BUSY_SHARE = 0.15  # memory in use without a visible process; an idle 910B4 reports 9 %
GROUP_READ_WRITE = 0o060
MILD = "warning"  # of npu-smi, below Alarm and Critical: the device computes
NO_DEVICES = "no devices could be read"


def wanted_numbers(checked: CheckedNode) -> tuple[int, ...]:
    """The devices that the run takes, by their numbers on the host."""
    return device_numbers(checked.node, device_count(checked.plan.config))


def used(checked: CheckedNode) -> tuple[SmiDevice, ...]:
    """The devices that the run takes, as far as the node has them."""
    wanted = wanted_numbers(checked)
    return tuple(device for device in checked.facts.devices if device.physical in wanted)


def check_device_tool(checked: CheckedNode) -> CheckResult:
    """What each way to fail means is in smi_faults.yaml."""
    tool, faults = TOOL[checked.plan.config.hardware.accelerator], checked.facts.device_faults
    if not faults:
        return passed(f"{tool} works")
    evidence = "\n".join(f"{tool}: {fault.described}" for fault in faults)
    fix = "\n".join(dict.fromkeys(fault.fix for fault in faults if fault.fix)).replace("USER", checked.facts.user or "USER")
    if checked.facts.devices:
        return warned(evidence, fix)
    usual = f"install the driver of the {checked.plan.config.hardware.title} on the host; then {tool} must work for {checked.facts.user}"
    return failed(evidence, fix or usual)


def check_device_count(checked: CheckedNode) -> CheckResult:
    wanted, there = wanted_numbers(checked), tuple(device.physical for device in checked.facts.devices)
    missing = [number for number in wanted if number not in there]
    if not there and checked.facts.device_faults:
        return unchecked(NO_DEVICES)
    if not missing:
        return passed(f"{plural(len(there), 'device')}, {len(wanted)} used")
    if not there or (len(there) < len(wanted) and not checked.node.devices):
        fix = offer_devices(checked, len(there)) or "look for the driver's messages in dmesg, or take the node out of the cluster file"
        return failed(f"{plural(len(there), 'device')}, the plan takes {len(wanted)} of each node", fix)
    named = f"{{host: {checked.host}, devices: [{', '.join(map(str, there[: len(wanted)]))}]}} in the cluster file"
    return failed(f"no device {', '.join(map(str, missing))}; the node has {', '.join(map(str, there))}", named)


def check_chip(checked: CheckedNode) -> CheckResult:
    hardware = checked.plan.config.hardware
    names = sorted({device.name for device in used(checked)})
    if not names:
        return unchecked(NO_DEVICES)
    if set(names) <= set(hardware.chips):
        return passed(", ".join(names))
    fix = "choose the hardware of the node; omnilaunch options hardware lists the names"
    return failed(f"it has {', '.join(names)}; hardware={hardware.name} is {', '.join(hardware.chips)}", fix)


def check_device_memory(checked: CheckedNode) -> CheckResult:
    planned_gib = checked.plan.config.hardware.memory_gib
    sizes = [device.memory_total_gib for device in used(checked) if device.memory_total_gib is not None]
    if not used(checked):
        return unchecked(NO_DEVICES)
    if not sizes or planned_gib is None:
        return unchecked("the tool of the devices does not print the size of their memory")
    if min(sizes) >= LEAST_SHARE * planned_gib:
        return passed(f"{min(sizes):.1f} GiB each")
    # Whether the plan fits all the same is checked by launcher.doctor.free_memory.
    fix = offer(checked, {"hardware.memory_gib": round(min(sizes))}) or "the check fit reports whether the plan fits all the same"
    return warned(f"{min(sizes):.1f} GiB, the plan assumes {planned_gib:g}", fix)


def check_device_health(checked: CheckedNode) -> CheckResult:
    if not used(checked):
        return unchecked(NO_DEVICES)
    states = {device.physical: device.health for device in used(checked) if device.health.upper() != "OK"}
    if not states:
        return passed("all healthy")
    unhealthy = [f"device {number}: {health}" for number, health in states.items()]
    fix = {
        "cuda": "sudo nvidia-smi --gpu-reset -i INDEX when no process uses it, or restart the node; dmesg | grep NVRM has the reason",
        "npu": "npu-smi info -t health -i NPU -c CHIP has details; npu-smi set -t reset -i NPU -c CHIP when no process uses it",
    }
    mild = all(health.casefold() == MILD for health in states.values())
    return (warned if mild else failed)(", ".join(unhealthy), fix[checked.plan.config.hardware.accelerator])


def check_device_idle(checked: CheckedNode) -> CheckResult:
    """A visible process is an error. Memory in use without one may belong to a container, or be a leak."""
    if not used(checked):
        return unchecked(NO_DEVICES)
    busy = [(device, process) for device in used(checked) for process in device.processes]
    if busy:
        text = ", ".join(f"device {device.physical}: process {process.pid} {process.name}".rstrip() for device, process in busy[:6])
        pids = " ".join(sorted({str(process.pid) for _, process in busy}))
        return failed(f"in use: {text}", f"ps -o pid,user,etime,args -p {pids.replace(' ', ',')}; if they are not needed: kill {pids}")
    full = [device for device in used(checked) if taken_share(device) > BUSY_SHARE]
    if full:
        text = ", ".join(f"device {device.physical}: {device.memory_used_gib:.1f} GiB" for device in full)
        return warned(f"memory in use without a visible process: {text}", "docker ps on the node: a container may use it")
    return passed("idle")


def taken_share(device: SmiDevice) -> float:
    return (device.memory_used_gib or 0.0) / device.memory_total_gib if device.memory_total_gib else 0.0


def check_driver(checked: CheckedNode) -> CheckResult:
    """Within the range of the hardware table and of the stack's row (CANN's release notes, CUDA's compatibility)."""
    driver = checked.facts.driver
    if not driver:
        return unchecked("the node does not report a driver version")
    problems = list(outside_range(checked))
    if problems:
        return failed("\n".join(f"driver {driver} is {text}" for text in problems), driver_fix(checked))
    return passed(f"driver {driver} fits {checked.stack.toolkit or checked.stack.name}")


def outside_range(checked: CheckedNode) -> Iterator[str]:
    hardware, stack = checked.plan.config.hardware, checked.stack
    for who, low, high in (
        (hardware.title, hardware.driver.minimum, hardware.driver.maximum),
        (stack.toolkit or stack.name, stack.driver_minimum, stack.driver_maximum),
    ):
        if is_older(checked.facts.driver, low):
            yield f"older than {low}, the oldest for {who}"
        if is_newer(checked.facts.driver, high):
            yield f"newer than {high}, the newest for {who}"


def is_older(driver: str, low: str) -> bool:
    return bool(low) and version_numbers(driver) < version_numbers(low)


def is_newer(driver: str, high: str) -> bool:
    """Only the digits that the bound has are compared: 580.159 is not above 580."""
    return bool(high) and version_numbers(driver)[: len(version_numbers(high))] > version_numbers(high)


def driver_fix(checked: CheckedNode) -> str:
    """The drivers that would do; and another stack, if the plan can have it and it takes the driver that is there."""
    driver, bounds = checked.facts.driver, (checked.plan.config.hardware.driver, checked.stack)
    low = max((bounds[0].minimum, bounds[1].driver_minimum), key=version_numbers)
    highs = [high for high in (bounds[0].maximum, bounds[1].driver_maximum) if high]
    kind = checked.stack.driver_kind
    fitting = (
        name
        for name, stack in checked.stacks.items()
        if stack.driver_kind == kind and not is_older(driver, stack.driver_minimum) and not is_newer(driver, stack.driver_maximum)
    )
    other = next(filter(None, (offer(checked, {"hardware.stack": name}) for name in fitting)), "")
    newest = min(highs, key=version_numbers, default="")
    upgrade = f"upgrade the driver to {low} or newer" if is_older(driver, low) else f"install a driver up to {newest}"
    return f"{upgrade}; or {other}, which takes driver {driver}" if other else upgrade


def check_device_files(checked: CheckedNode) -> CheckResult:
    """The device files that the start command passes to the container."""
    accelerator, wanted = checked.plan.config.hardware.accelerator, wanted_numbers(checked)
    nvidia = (*(f"/dev/nvidia{number}" for number in wanted), "/dev/nvidiactl", "/dev/nvidia-uvm")
    files = ascend_device_files(wanted) if accelerator == "npu" else nvidia
    missing = ", ".join(name for name in files if name not in checked.facts.files)
    if not missing:
        return passed(f"{len(files)} device files")
    if accelerator == "cuda":
        return warned(f"missing: {missing}", "sudo nvidia-modprobe -u -c=0 (the container toolkit does it when it can)")
    return failed(f"missing: {missing}", "install or reload the Ascend driver, or name devices that exist: cluster.nodes.N.devices")


def check_device_access(checked: CheckedNode) -> CheckResult:
    """A container sees the device files with the owner and permissions of the host, and its user is not root."""
    uid, gid = map(int, checked.plan.container_user.split(":"))
    modes = modes_of(checked)
    groups = {gid, *(checked.node.groups or device_groups(checked))}
    closed = [(name, mode) for name, mode in modes.items() if not may_use(mode, uid, groups)]
    if not checked.facts.modes:
        return unchecked("the node does not report the owners of the device files")
    if not closed:
        added = f", in group {', '.join(map(str, sorted(groups - {gid})))} of the node" if groups - {gid} else ""
        return passed(f"user {uid}:{gid} of the container{added} may use the device files")
    fix = "install the driver with --install-for-all, which opens the device files to every user"
    text = list_some([f"{name} ({mode.bits:o}, owner {mode.uid}:{mode.gid})" for name, mode in closed], 3)
    return failed(f"user {uid}:{gid} of the container may not use {text}", fix)


def modes_of(checked: CheckedNode) -> dict[str, FileMode]:
    """Of the device files that the run's container gets."""
    return {name: checked.facts.modes[name] for name in ascend_device_files(wanted_numbers(checked)) if name in checked.facts.modes}


def device_groups(checked: CheckedNode) -> tuple[int, ...]:
    """The groups that own device files which the container's user may not use otherwise. Not root's: a process of that group could read much
    that is not a device."""
    if not checked.plan.container_user:
        return ()
    uid, gid = map(int, checked.plan.container_user.split(":"))
    closed = (mode for mode in modes_of(checked).values() if not may_use(mode, uid, {gid}))
    return tuple(sorted({mode.gid for mode in closed if mode.bits & GROUP_READ_WRITE == GROUP_READ_WRITE and mode.gid}))


def may_use(mode: FileMode, uid: int, groups: Collection[int]) -> bool:
    """Read and write, as the kernel decides: the first of owner, group and others that applies; root always."""
    shift = 6 if uid == mode.uid else 3 if mode.gid in groups else 0
    return uid == 0 or (mode.bits >> shift) & 0o6 == 0o6


def check_driver_mounts(checked: CheckedNode) -> CheckResult:
    """Docker refuses to start a container with a bind mount whose source is missing."""
    wanted = ascend_mounts(share_of(checked.plan.config.cluster, checked.node, device_count(checked.plan.config)))
    missing = [path for path in wanted if path not in checked.facts.files]
    if not missing:
        return passed(f"{len(wanted)} files of the driver")
    if missing == [NPU_SMI] and OTHER_NPU_SMI in checked.facts.files:
        return failed(f"missing: {NPU_SMI}; it is at {OTHER_NPU_SMI}", f"sudo ln -s {OTHER_NPU_SMI} {NPU_SMI}")
    fix = "install the Ascend driver with --full --install-for-all, or link each path to where the file is"
    return failed(f"missing: {', '.join(missing)}", fix)


def check_ascend_runtime(checked: CheckedNode) -> CheckResult:
    """An engine without it refuses every container that asks for it."""
    docker = checked.facts.docker
    if not docker or not docker.engine:
        return unchecked(NO_ENGINE)
    if ASCEND_RUNTIME in docker.runtimes:
        return passed(f"the engine has the runtime {ASCEND_RUNTIME}")
    fix = "install Ascend Docker Runtime, then: sudo systemctl restart docker"
    if without := offer(checked, {"cluster.ascend_runtime": False}):
        fix = f"{fix}; or {without}"
    return failed(f"the engine has no runtime {ASCEND_RUNTIME!r}, only {', '.join(docker.runtimes)}", fix)
