"""Hosts for tests: containers with their own sshd, Docker engine and file system, on one bridge network, with one folder that all of them share,
like an NFS mount. Everything has LABEL and is removed by its own name."""

import hashlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LABEL = "omnilaunch.test=cluster"
REPOSITORY = "omnilaunch-host"
USER = "trainer"
INTERFACE = "eth0"
SUBNET = "10.213.{}.0/24"
SHARED = "/shared"
READY_S = 90
# What an engine inside a container needs; no --privileged, which many machines forbid.
RIGHTS = (
    *(part for name in ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "MKNOD") for part in ("--cap-add", name)),
    *(part for name in ("seccomp", "apparmor", "systempaths") for part in ("--security-opt", f"{name}=unconfined")),
    "--device-cgroup-rule", "a *:* rwm", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--cgroupns", "host", "-v", "/var/lib/docker",
)  # fmt: skip
DOCKERFILE = f"""FROM {{base}}
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \\
    docker.io openssh-server iptables iproute2 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd
RUN useradd --create-home --shell /bin/bash --groups docker {USER}
"""
# After a power failure, files that the engine left before prevent its start.
BOOT = "mount --make-rshared / && rm -f /var/run/docker.pid /var/run/docker/containerd/*.pid && /usr/sbin/sshd && exec dockerd >/var/log/dockerd.log 2>&1"


def docker(*argv: str, check: bool = True, **options: object) -> str:
    """Standard output of the engine's client on this machine."""
    done = subprocess.run(("docker", *argv), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if check:
        assert done.returncode == 0, f"docker {' '.join(argv)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(done.stdout).strip()


@dataclass(frozen=True, kw_only=True)
class Host:
    """A running host. `name` is its container here, `address` what the others and this machine reach."""

    name: str
    address: str
    network: str

    def run(self, *argv: str, user: str = "root", check: bool = True) -> str:
        """Run a command on the host for the test, without its sshd."""
        return docker("exec", "--user", user, self.name, *argv, check=check)

    def power_off(self) -> None:
        docker("kill", self.name)

    def power_on(self) -> None:
        docker("start", self.name)
        self.wait()

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """With its network cable unplugged: it keeps its interface, address and routes, but has no carrier."""
        self.turn_cable("down")
        try:
            yield
        finally:
            self.turn_cable("up")

    def turn_cable(self, way: str) -> None:
        """Set the end of the veth pair on this machine up or down. `docker network connect` would create another interface, with a new name."""
        number = self.run("cat", f"/sys/class/net/{INTERFACE}/iflink")
        ends = [path.parent.name for path in Path("/sys/class/net").glob("*/ifindex") if path.read_text(encoding="utf-8").strip() == number]
        subprocess.run(("ip", "link", "set", "dev", *ends, way), check=True)

    def cut_ssh(self) -> None:
        """End every SSH session of the user, as a firewall or a restarted sshd does; new sessions are accepted."""
        self.run(
            "sh", "-c", f'for at in /proc/[0-9]*; do ! grep -q "^sshd: {USER}" $at/cmdline 2>/dev/null || kill -9 ${{at#/proc/}}; done'
        )

    @contextmanager
    def slow_start(self) -> Iterator[None]:
        """`docker run --detach` takes minutes, as on a node with a slow disk or driver."""
        script = '#!/bin/sh\n[ "$1 $2" != "run --detach" ] || sleep 120\nexec /usr/bin/docker "$@"\n'
        self.run("sh", "-c", 'printf %s "$1" >/usr/local/bin/docker && chmod 755 /usr/local/bin/docker', "sh", script)
        try:
            yield
        finally:
            self.run("rm", "/usr/local/bin/docker")

    def containers(self) -> tuple[str, ...]:
        """Names of all its containers, running or not."""
        return tuple(self.run("docker", "ps", "--all", "--format", "{{.Names}}").split())

    def wait(self) -> None:
        """Wait until sshd and the engine respond."""
        deadline = time.monotonic() + READY_S
        while subprocess.run(("docker", "exec", self.name, "docker", "info"), capture_output=True).returncode:
            assert time.monotonic() < deadline, (
                f"{self.name} is not ready:\n{self.run('tail', '-n', '20', '/var/log/dockerd.log', check=False)}"
            )
            time.sleep(0.3)

    def load(self, tag: str) -> None:
        """Copy an image from this machine's engine, without the launcher."""
        here = docker("image", "inspect", "--format", "{{.Id}}", tag)
        if self.run("docker", "image", "inspect", "--format", "{{.Id}}", tag, check=False) == here:
            return
        with subprocess.Popen(("docker", "save", tag), stdout=subprocess.PIPE) as save:
            subprocess.run(("docker", "exec", "-i", self.name, "docker", "load", "-q"), stdin=save.stdout, check=True, capture_output=True)

    def limit_disk(self, folder: str, size: str) -> None:
        """Mount a small disk on a folder."""
        self.run("mkdir", "-p", folder)
        self.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", folder)

    def add_npus(self, count: int, sample: Path) -> None:
        """Stand-ins for NPUs: real device files without a device, and an npu-smi that prints a recorded sample."""
        names = [f"davinci{number}" for number in range(count)] + ["davinci_manager", "devmm_svm", "hisi_hdc"]
        for name in names:
            self.run("mknod", "-m", "666", f"/dev/{name}", "c", "1", "3", check=False)
        self.run("mkdir", "-p", "/usr/local/dcmi", "/usr/local/Ascend/driver/lib64", "/usr/local/Ascend/driver/tools", "/usr/local/bin")
        for path in (
            "/usr/local/Ascend/driver/version.info",
            "/etc/ascend_install.info",
            "/usr/local/Ascend/driver/tools/hccn_tool",
            "/etc/hccn.conf",
        ):
            self.run("touch", path)
        self.run("sh", "-c", "echo Version=25.5.1 > /usr/local/Ascend/driver/version.info")
        docker("cp", str(sample), f"{self.name}:/etc/npu-smi.txt")
        self.run("sh", "-c", "printf '#!/bin/sh\\ncat /etc/npu-smi.txt\\n' > /usr/local/bin/npu-smi && chmod 755 /usr/local/bin/npu-smi")

    def remove_npus(self) -> None:
        """The device files of `add_npus`."""
        self.run("sh", "-c", "rm -f /dev/davinci* /dev/devmm_svm /dev/hisi_hdc")


def build_image(base: str) -> str:
    """The image of the hosts; its tag changes with its Dockerfile."""
    text = DOCKERFILE.format(base=base)
    tag = f"{REPOSITORY}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if subprocess.run(("docker", "image", "inspect", tag), capture_output=True).returncode:
        docker("build", "-q", "-t", tag, "-", input=text)
    return tag


def make_key(folder: Path) -> Path:
    """A key pair without a passphrase; the private half."""
    key = folder / "id_ed25519"
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)), check=True)
    return key


def start_hosts(count: int, *, image: str, key: Path, network: str, subnet: int) -> tuple[Host, ...]:
    """In parallel; they are ready when all respond."""
    docker("network", "create", "--label", LABEL, "--subnet", SUBNET.format(subnet), network)
    docker("volume", "create", "--label", LABEL, f"{network}-shared")

    def start(number: int) -> Host:
        host = Host(name=f"{network}-{number}", address=f"10.213.{subnet}.{number + 11}", network=network)
        shared = ("-v", f"{network}-shared:{SHARED}")
        docker(
            "run", "--detach", "--name", host.name, "--hostname", f"node{number}", "--label", LABEL, "--network", network,
            "--ip", host.address, *RIGHTS, *shared, image, "sh", "-c", BOOT_KEYS + BOOT,
        )  # fmt: skip
        home = f"/home/{USER}/.ssh"
        host.run("install", "-d", "-m", "700", "-o", USER, "-g", USER, home)
        docker("cp", f"{key}.pub", f"{host.name}:{home}/authorized_keys")
        host.run("chown", f"{USER}:{USER}", f"{home}/authorized_keys")
        host.run("chown", f"{USER}:{USER}", SHARED)
        host.wait()
        return host

    with ThreadPoolExecutor(max_workers=count) as pool:
        return tuple(pool.map(start, range(count)))


BOOT_KEYS = "ssh-keygen -A >/dev/null && "  # each host its own, as on a machine that was installed


def known_hosts(hosts: Sequence[Host]) -> str:
    """As a user has it who has looked at every key."""
    lines = []
    for host in hosts:
        kind, value, *_ = host.run("cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()
        lines.append(f"{host.address} {kind} {value}\n")
    return "".join(lines)


def end_hosts(network: str) -> None:
    """What `start_hosts` made under this name, and an earlier session of the same name left."""
    names = docker("ps", "--all", "--quiet", "--filter", f"name=^{network}-").split()
    if names:
        docker("rm", "--force", "--volumes", *names)
    docker("network", "rm", network, check=False)
    docker("volume", "rm", f"{network}-shared", check=False)
