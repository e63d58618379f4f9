"""Fake nodes for the doctor's tests: the answers of a healthy node to each question, a Transport that gives them, and overrides for plans."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.doctor.doctor import Examination, examine
from launcher.doctor.findings import Finding
from launcher.doctor.parse import MARK
from launcher.errors import NodeFailed
from launcher.image.stack import load_stacks
from launcher.plan.plan import Plan
from launcher.ssh.transport import Result
from tests.launcher.conftest import PROJECT

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smi"
HOSTS = ("192.0.2.11", "192.0.2.12")  # of conf/cluster/example.yaml
IMAGE_ID = "sha256:" + "ab" * 32
NOW_S = 1_790_000_000.0
PlanFor = Callable[..., Plan]
Said = tuple[int, str, str]  # exit code, stdout, stderr
DENIED: Said = (1, '{"ServerErrors":["permission denied while trying to connect to the Docker daemon socket"]}\n', "")
STOPPED: Said = (1, '{"ServerErrors":["Cannot connect to the Docker daemon"]}\n', "")
NO_DOCKER: Said = (127, "", "timeout: failed to run command 'docker': No such file or directory")
STACKS = load_stacks(PROJECT / "images")


def df(free_kib: int, at: str = "/srv") -> str:
    return f"Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 4000000000 1 {free_kib} 1% {at}\n"


def room(path: str = "/srv/omnilaunch", writable: str = "yes", free_kib: int = 2_000_000_000, inodes: str = "250000000") -> str:
    counts = f"Filesystem Inodes IUsed IFree IUse% Mounted on\n/dev/sda1 260000000 1 {inodes} 1% /srv\n"
    return f"{path}\n{writable}\n{df(free_kib)}{counts}"


def docker_info(
    engine: str = "27.5.1", storage: str = "overlay2", runtimes: str = '"runc":{},"nvidia":{},"ascend":{}', **more: object
) -> str:
    security = ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"]
    known = {
        "ServerVersion": engine,
        "Driver": storage,
        "DockerRootDir": "/var/lib/docker",
        "SecurityOptions": security,
        "CgroupVersion": "2",
    }
    return json.dumps({**known, "Runtimes": json.loads(f"{{{runtimes}}}"), **more}) + "\n"


def network(address: str) -> dict[str, str]:
    """eth0 in the address's /24 with a default route, and docker0."""
    home = bytes((*map(int, address.split(".")[:3]), 0))[::-1].hex().upper()
    local = "".join(f"        |-- {each}\n           /32 host LOCAL\n" for each in ("127.0.0.1", "172.17.0.1", address))
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    rows = (
        ("eth0", "00000000", "010200C0", "00000000"),
        ("docker0", "000011AC", "00000000", "0000FFFF"),
        ("eth0", home, "00000000", "00FFFFFF"),
    )
    routes = "".join(f"{name}\t{to}\t{by}\t0003\t0\t0\t0\t{mask}\t0\t0\t0\n" for name, to, by, mask in rows)
    return {
        "addresses": f"Main:\n{local}Local:\n{local}",
        "routes": head + routes,
        "links": "docker0 down 1500 \neth0 up 9000 100000\nlo unknown 65536 \n",
    }


def tcp(*ports: int) -> str:
    """Listening sockets, and one outgoing connection."""
    rows = "".join(f"   0: 00000000:{port:04X} 00000000:0000 0A 00000000:00000000\n" for port in (22, *ports))
    return f"  sl  local_address rem_address   st\n{rows}   9: 0B0200C0:733C 0C0200C0:0016 01 00000000:00000000\n"


def healthy(address: str = HOSTS[0]) -> dict[str, str]:
    """The answers of a node without accelerators."""
    return {
        "machine": "x86_64\n",
        "kernel": "6.1.0-28-amd64\n",
        "hostname": f"node-{address}\n",
        "boot": f"boot-{address}\n",
        "user": "trainer\n",
        "shell": f"/bin/bash\n10.9.9.9 50000 {address} 22\n",
        "memory": "MemTotal:       528000000 kB\nMemFree:        1 kB\nMemAvailable:   500000000 kB\n",
        "shm": df(16_000_000, "/dev/shm"),
        "memlock": "unlimited\n",
        "tcp": tcp(),
        "ephemeral": "32768\t60999\n60000-60031\n",
        **network(address),
        "root": room(),
        "docker": docker_info(),
        "docker_client": "Docker version 27.5.1, build 9f9e405\n",
        "docker_room": df(900_000_000, "/var/lib/docker"),
        "docker_disk": "ext2/ext3\n",
        "containers": "",
        "toolkit": "/usr/bin/nvidia-ctk\n",
        "image": json.dumps({"Id": IMAGE_ID}) + "\n",
    }


def p4() -> dict[str, str]:
    return {
        "devices": (GOLDEN / "nvidia-p4.csv").read_text(),
        "apps": "",
        "files": "/dev/nvidia0\n/dev/nvidiactl\n/dev/nvidia-uvm\n",
        "rdma": "",
    }


def ascend() -> dict[str, str]:
    """The eight recorded 910B3, with the busy one idle."""
    table = (GOLDEN / "npu-25.2.0-910b3.txt").read_text()
    lines = [
        "| No running processes found in NPU 2 |" if "1333928" in line else line.replace("41052/", "3400 /") for line in table.splitlines()
    ]
    davinci = "".join(f"/dev/davinci{index}\n" for index in range(8))
    managers = "/dev/davinci_manager\n/dev/devmm_svm\n/dev/hisi_hdc\n"
    driver = "/usr/local/dcmi\n/usr/local/bin/npu-smi\n/usr/local/Ascend/driver/lib64\n/usr/local/Ascend/driver/version.info\n/etc/ascend_install.info\n"
    network_files = "/usr/local/Ascend/driver/tools/hccn_tool\n/etc/hccn.conf\n"
    modes = "".join(f"{name} 666 0 1000\n" for name in (davinci + managers).split())
    files = davinci + managers + driver + network_files
    return {"devices": "\n".join(lines) + "\n", "driver": "Version=25.2.0\n", "files": files, "modes": modes}


class FakeNode:
    """A node as a Transport: the doctor's script is answered from `answers`, any other command from `replies`, by a word of it."""

    def __init__(
        self, host: str, answers: Mapping[str, str | Said], replies: Mapping[str, Said] | None = None, clock_s: float = NOW_S
    ) -> None:
        self.host, self.answers, self.clock_s = host, dict(answers), clock_s
        self.replies = dict(replies or {})
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, ...]] = []

    remarks: tuple[str, ...] = ()

    def run(self, argv: tuple[str, ...], **_: Any) -> Result:
        self.asked.append(argv)
        if argv[0] == "date":
            return Result(argv=argv, code=0, output=f"{self.clock_s:.9f}\n", errors="")
        if argv[:2] == ("sh", "-c") and MARK in argv[2]:
            return self.answer(argv)
        if argv[0] == "rm":
            for path in argv[argv.index("--") + 1 :]:
                self.files.pop(path, None)
            return Result(argv=argv, code=0, output="", errors="")
        code, output, errors = next((reply for word, reply in self.replies.items() if word in argv), (0, "{}\n", ""))
        return Result(argv=argv, code=code, output=output, errors=errors)

    def answer(self, argv: tuple[str, ...]) -> Result:
        output = errors = ""
        for name, said in self.answers.items():
            code, text, error = said if isinstance(said, tuple) else (0, said, "")
            output += f"\n{MARK} {name}\n{text}\n{MARK}code {code}\n"
            errors += f"\n{MARK} {name}\n{error}"
        return Result(argv=argv, code=0, output=output, errors=errors)

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        if "read-only" in self.replies:
            raise NodeFailed(f"{self.host}: {path} could not be written: Read-only file system")
        self.files[path] = content

    def get(self, path: str) -> bytes | None:
        return self.files.get(path)


# Overrides of a plan, and the answers of a node about its devices.
CPU = ("cluster=example", "hardware=cpu")
NPU = ("cluster=example", "hardware=ascend910b")
NPU_RUNTIME = (*NPU, "cluster.ascend_runtime=true")
P4 = ("cluster=example", "hardware=p4")
LOCAL = ("cluster=local",)
OFFLOAD = (*NPU, "strategy=zero2", "strategy.offload_optimizer=true")
DATA = (*CPU, "data=files", "data.train=/d/train.json", "data.evaluation=/d/eval.json", "data.images=/d/images")
SHARED = (*CPU, "cluster.shared=true")
PULL = (*CPU, "cluster.delivery.kind=pull", "cluster.delivery.registry=registry.example/x")
CONTENTS: dict[str, str | Said] = {"content0": "file\naa  -\n", "content1": "file\nbb  -\n", "content2": "folder\ncc  -\n"}
H200 = p4() | {"devices": (GOLDEN / "nvidia-h200.csv").read_text()}
DEVICE_ANSWERS: dict[str, dict[str, str]] = {"ascend910b": ascend(), "p4": p4(), "h200": H200, "cpu": {}}


def healthy_nodes(
    plan: Plan, *, second: Mapping[str, str | Said] | None = None, first: Mapping[str, str | Said] | None = None
) -> list[FakeNode]:
    """The plan's nodes, healthy except for the answers that are given."""
    hosts = [node.host for node in plan.config.cluster.nodes]
    contents = CONTENTS if plan.config.data.name == "files" else {}
    more = (first or {}, second or {})
    return [
        FakeNode(host, {**healthy(HOSTS[place]), **DEVICE_ANSWERS[plan.config.hardware.name], **contents, **more[place]})
        for place, host in enumerate(hosts)
    ]


def examined(plan: Plan, ways: list[FakeNode] | list[FakeNode | NodeFailed], *, launching: bool = False) -> Examination:
    cluster = plan.config.cluster
    return examine(plan, STACKS, cluster.nodes, ways, now=lambda: NOW_S, token="t1", launching=launching)  # type: ignore[arg-type]


def found(examination: Examination, name: str, host: str) -> Finding:
    (finding,) = [finding for finding in examination.findings if finding.name == name and finding.host == host]
    return finding
