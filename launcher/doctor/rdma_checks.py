"""Which network NCCL will take between the nodes: RDMA over InfiniBand or Ethernet, or sockets. Pure.

NCCL uses a port that is active, by /dev/infiniband and the libraries of rdma-core, and takes sockets without a word where one of them is missing
(NVIDIA/nccl issues 451 and 952).
"""

from collections.abc import Sequence

from launcher.doctor.cross_node_checks import same
from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, warned
from launcher.doctor.node_facts import RdmaPort

OFF = "NCCL_IB_DISABLE"
UNLIMITED = "-1"


def wants_rdma(checked: CheckedNode) -> bool:
    return checked.command.environment.get(OFF, "0") == "0"


def active_ports(checked: CheckedNode) -> tuple[RdmaPort, ...]:
    return tuple(port for port in checked.facts.rdma_ports if port.state == "ACTIVE")


def uses_rdma(checked: CheckedNode) -> bool:
    """Whether the run's container gets /dev/infiniband: of a run on several nodes, where a port is active and has its device file."""
    several = len(checked.plan.config.cluster.working) > 1
    return several and wants_rdma(checked) and bool(active_ports(checked) and checked.facts.rdma_files)


def check_rdma(checked: CheckedNode) -> CheckResult:
    ports, active = checked.facts.rdma_ports, active_ports(checked)
    if not wants_rdma(checked):
        return passed(f"{OFF} is set: NCCL uses sockets")
    if not ports:
        return passed("no RDMA device: NCCL uses sockets")
    named = ", ".join(f"{port.device} port {port.number} ({port.kind}, {port.state})" for port in active or ports)
    if not active:
        fix = "ibstat shows why; cable, switch, or for InfiniBand a subnet manager (sudo systemctl start opensm); or NCCL_IB_DISABLE=1"
        return warned(f"no RDMA port is active, so NCCL would use sockets: {named}", fix)
    if not checked.facts.rdma_files:
        return warned(f"{named}, but there is no /dev/infiniband/uverbs*, so NCCL would use sockets", "sudo modprobe ib_uverbs rdma_ucm")
    limit = checked.plan.config.cluster.ulimits.get("memlock", UNLIMITED)
    if checked.plan.config.cluster.runtime == "docker" and limit not in (UNLIMITED, f"{UNLIMITED}:{UNLIMITED}"):
        return failed(
            f"{named}: RDMA registers memory, and cluster.ulimits.memlock={limit} forbids it", f"cluster.ulimits.memlock={UNLIMITED}"
        )
    return passed(f"NCCL takes {named}")


def check_same_rdma(nodes: Sequence[CheckedNode]) -> dict[str, CheckResult]:
    """Between a node with RDMA and one without, or with another link layer, NCCL takes sockets."""
    kinds = {node.host: "+".join(sorted({port.kind for port in active_ports(node)})) if uses_rdma(node) else "sockets" for node in nodes}
    usual = max(kinds.values(), key=list(kinds.values()).count)
    different = {host: kind for host, kind in kinds.items() if kind != usual}
    fix = "give every node the same network, or set cluster.environment.NCCL_IB_DISABLE='1' so that all use sockets"
    text = f"the others have {usual}: between them NCCL takes sockets"
    return {host: warned(f"it has {kind}, {text}", fix) for host, kind in different.items()} or same(f"all have {usual}")
