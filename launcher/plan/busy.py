"""A note for a run on CPUs that are busy: its threads wait for each other by spinning, which then takes the cores that they wait for."""

from launcher.plan.plan import Plan

POLICY = "OMP_WAIT_POLICY"  # of OpenMP 3.0; GNU's and Intel's libraries read it
SLEEPING = f"cluster.environment.{POLICY}=passive"


def describe_busy(plan: Plan, *, load: float, cores: int) -> tuple[str, ...]:
    """`load`: the load average of this machine, `cores`: those that this process may use. () where waiting threads cannot be in the way."""
    device, cluster = plan.spec.device, plan.config.cluster
    threads = device.threads or cores
    if not plan.is_local or device.accelerator != "cpu" or threads == 1 or POLICY in cluster.environment:
        return ()
    wanted = threads * device.devices_per_node
    if load <= cores and wanted <= cores:
        return ()
    why = f"its load is {load:.1f}" if load > cores else f"the ranks have {wanted} threads"
    return (
        f"this machine has {cores} core(s), and {why}: threads that wait for each other would spin, and each step may take many times as long. "
        f"{SLEEPING} avoids it with the same results, hardware.threads=1 with other rounding",
    )
