"""The test hosts behave like real ones: each has its own sshd, engine and file system, and can be switched off."""

import subprocess

import pytest

from tests.cluster.conftest import Lab
from tests.cluster.host import INTERFACE, USER

pytestmark = pytest.mark.cluster


def ssh(lab: Lab, number: int, *command: str) -> "subprocess.CompletedProcess[str]":
    files = ("-i", str(lab.home / ".ssh/id_ed25519"), "-o", f"UserKnownHostsFile={lab.home / '.ssh/known_hosts'}")
    options = (*files, "-o", "BatchMode=yes", "-o", "ConnectTimeout=3")
    target = f"{USER}@{lab.hosts[number].address}"
    return subprocess.run(("ssh", "-F", "none", *options, target, *command), capture_output=True, text=True, timeout=30)


def test_openssh_logs_in_and_docker_responds_without_root(lab: Lab) -> None:
    done = ssh(lab, 0, "id", "-un", "&&", "docker", "info", "--format", "{{.Driver}}")
    assert done.stdout.split() == [USER, "overlay2"], done.stderr


def test_files_are_each_hosts_own_but_for_the_shared_folder(lab: Lab) -> None:
    first, second, _ = lab.hosts
    first.run("touch", "/srv/own", "/shared/common")
    assert second.run("ls", "/srv", "/shared").split() == ["/shared:", "common", "/srv:"]
    first.run("rm", "/srv/own", "/shared/common")


def test_a_host_goes_off_and_comes_back_with_the_same_key(lab: Lab) -> None:
    lab.hosts[2].power_off()
    assert ssh(lab, 2, "true").returncode == 255
    lab.hosts[2].power_on()
    assert ssh(lab, 2, "true").returncode == 0


def test_a_cable_is_pulled_and_put_back(lab: Lab) -> None:
    """The interface, its address and the routes stay, as on a real machine."""
    pulled = lab.hosts[2]
    before = pulled.run("ip", "-o", "address", "show", "dev", INTERFACE)
    with pulled.unplugged():
        assert pulled.run("cat", f"/sys/class/net/{INTERFACE}/carrier") == "0"
        assert ssh(lab, 2, "true").returncode == 255
        assert pulled.run("ip", "-o", "address", "show", "dev", INTERFACE).split()[3] == before.split()[3]
    assert ssh(lab, 2, "true").returncode == 0


def test_a_disk_fills_up(lab: Lab) -> None:
    lab.hosts[2].limit_disk("/srv/small", "1m")
    try:
        said = lab.hosts[2].run("sh", "-c", "head -c 2000000 /dev/zero > /srv/small/file 2>&1; true")
        assert lab.hosts[2].run("stat", "-c", "%s", "/srv/small/file") == "1048576", said
    finally:
        lab.hosts[2].run("umount", "/srv/small")
