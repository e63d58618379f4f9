"""Checks of states that only NVIDIA's GPUs have: instances, exclusive use, memory that waits for repair, and the switches of NVLink. Pure."""

from launcher.doctor.device_checks import NO_DEVICES, used
from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.smi import SmiDevice

MODES = {"Prohibited": "no process may use it", "Exclusive_Process": "one process may use it at a time"}


def numbers(devices: list[SmiDevice]) -> str:
    return ",".join(str(device.physical) for device in devices)


def check_mig(checked: CheckedNode) -> CheckResult:
    """A rank takes a whole GPU by its number. With MIG it would see one instance of it, or none."""
    divided = [device for device in used(checked) if device.mig]
    if not used(checked):
        return unchecked(NO_DEVICES)
    if not divided:
        return passed("no GPU is divided into instances")
    fix = f"sudo nvidia-smi -i {numbers(divided)} -mig 0, when no process uses them; then sudo nvidia-smi --gpu-reset -i {numbers(divided)}"
    return failed(f"MIG is on: device {numbers(divided)} is divided into instances, which a run cannot take", fix)


def check_compute_mode(checked: CheckedNode) -> CheckResult:
    limited = [device for device in used(checked) if device.compute_mode in MODES]
    if not used(checked):
        return unchecked(NO_DEVICES)
    if not limited:
        return passed("any process may use the GPUs")
    text = ", ".join(f"device {device.physical}: {device.compute_mode} ({MODES[device.compute_mode]})" for device in limited)
    fix = f"sudo nvidia-smi -i {numbers(limited)} -c DEFAULT"
    return (failed if any(device.compute_mode == "Prohibited" for device in limited) else warned)(text, fix)


def check_memory_repair(checked: CheckedNode) -> CheckResult:
    """Pages or rows of the memory with errors are replaced at the next reset (NVIDIA's GPU memory error management)."""
    failing = [device for device in used(checked) if device.repair == "failed"]
    pending = [device for device in used(checked) if device.repair == "pending"]
    if not used(checked):
        return unchecked(NO_DEVICES)
    if failing:
        return failed(
            f"rows of the memory of device {numbers(failing)} could not be replaced",
            "take the GPU out of the cluster file, and ask its vendor",
        )
    if pending:
        fix = f"sudo nvidia-smi --gpu-reset -i {numbers(pending)} when no process uses them, or restart the node"
        return warned(f"bad memory of device {numbers(pending)} waits for its replacement, which a reset does", fix)
    return passed("no memory waits for repair")


def check_fabric(checked: CheckedNode) -> CheckResult:
    """GPUs behind NVSwitch start CUDA only after the fabric manager has set up the switches: error 802 until then."""
    waiting = [device for device in used(checked) if device.fabric]
    if not used(checked):
        return unchecked(NO_DEVICES)
    if not waiting:
        return passed("the fabric works, or there is none")
    fix = (
        "sudo systemctl enable --now nvidia-fabricmanager; its version must be that of the driver "
        f"({checked.facts.driver or 'nvidia-smi'}); journalctl -u nvidia-fabricmanager has the reason"
    )
    return failed(f"NVLink's switches are not set up: device {numbers(waiting)}: {waiting[0].fabric}", fix)
