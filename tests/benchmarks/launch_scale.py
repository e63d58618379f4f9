"""Time to reach many nodes, and the cost of staying attached to them, compared with plain ssh and Fabric's ThreadingGroup.

    python tests/benchmarks/launch_scale.py [--nodes 32 64 128] [--repeats 3]

Needs root: the nodes are network namespaces of this machine with an sshd each, so that both ends share its cores. All ways alternate in each
repeat; figures are medians. cold = connect and run `true` on all nodes; warm = run `true` on all nodes again.
"""

import argparse
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fabric import Config, Connection, ThreadingGroup
from netns import DEAD_ADDRESS, Hosts, light_hosts

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.parallel import each, reach_all
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import SshSettings

ATTACHED_S = 10
X25519 = ("-o", "KexAlgorithms=curve25519-sha256")  # the choice of paramiko; the first choice of ssh takes ten times as long
CHATTER = ("sh", "-c", "while sleep 1; do echo a line of a log; done")
GOALS = {"cold": "3 s", "warm": "0.5 s", "attached": "10 % of a core", "threads": "300", "dead": "10 s"}  # at 128 nodes


def access_to(hosts: Hosts) -> SshSettings:
    return SshSettings(
        config=hosts.key.parent / "none",
        known_hosts=(hosts.known_hosts,),
        keys=(hosts.key,),
        user="root",
        agent=False,
        connect_timeout_s=8,  # as in the schema
        silence_s=30,
    )


@contextmanager
def clock(into: dict[str, list[float]], name: str) -> Iterator[None]:
    started, cpu = time.perf_counter(), cpu_s()
    yield
    into.setdefault(name, []).append(time.perf_counter() - started)
    into.setdefault(f"{name} cpu", []).append(cpu_s() - cpu)


def cpu_s() -> float:
    """User and system time of this process and its ended children (plain ssh)."""
    kinds = (resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in kinds)


class Threads:
    """The maximum number of threads of this process, sampled 100 times a second."""

    def __enter__(self) -> "Threads":
        self.most, self.over = 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, threading.active_count() - 1)  # without this one

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.watcher.join()


def run_true(ssh: Ssh) -> None:
    ssh.run(("true",)).expect(f"true on {ssh.host}")


def ours(hosts: Hosts, times: dict[str, list[float]], *, attached: bool) -> None:
    nodes = [Node(host=host.address) for host in hosts.all]
    with Threads() as threads, clock(times, "ours cold"):
        client = ConnectionPool(access_to(hosts))
        with clock(times, "ours connect"):
            fleet = tuple(ssh for ssh in reach_all(nodes, client) if isinstance(ssh, Ssh))
        each(run_true, fleet)
    times.setdefault("ours threads", []).append(threads.most)
    with clock(times, "ours warm"):
        each(run_true, fleet)
    if attached:
        stay_attached(hosts, fleet, times)
    client.close()
    time.sleep(0.5)


def stay_attached(hosts: Hosts, fleet: tuple[Ssh, ...], times: dict[str, list[float]]) -> None:
    """Follow a command that prints one line per second on every node, like `docker logs -f`."""
    logs = hosts.key.parent / "logs"
    logs.mkdir(exist_ok=True)
    running = each(lambda ssh: ssh.start(CHATTER, log=logs / ssh.host), fleet)
    time.sleep(1)
    started, cpu = time.perf_counter(), cpu_s()
    time.sleep(ATTACHED_S)
    times["attached share"] = [(cpu_s() - cpu) / (time.perf_counter() - started)]
    times["attached threads"] = [threading.active_count()]
    each(lambda process: process.signal(signal.SIGKILL), running)
    quiet = [host.address for host in hosts.all if (logs / host.address).read_text().count("\n") < ATTACHED_S - 2]
    if quiet:
        sys.exit(f"incomplete log from {', '.join(quiet)}")


def name_the_dead(hosts: Hosts, times: dict[str, list[float]]) -> None:
    nodes = [*(Node(host=host.address) for host in hosts.all), Node(host=DEAD_ADDRESS)]
    client = ConnectionPool(access_to(hosts))
    arrived: list[float] = []
    started = time.perf_counter()
    watcher = threading.Thread(target=lambda: arrived.append(wait_for(client, len(hosts.all)) - started))
    watcher.start()
    reached = reach_all(nodes, client)
    times["dead named"] = [time.perf_counter() - started]
    watcher.join()
    times["dead others"] = arrived
    if [type(answer) for answer in reached] != [Ssh] * len(hosts.all) + [NodeFailed] or DEAD_ADDRESS not in str(reached[-1]):
        sys.exit(f"the dead host was not the only one that failed: {[str(answer) for answer in reached if isinstance(answer, NodeFailed)]}")
    client.close()
    time.sleep(0.5)


def wait_for(client: ConnectionPool, count: int) -> float:
    while sum(link.is_open for link in client._links) < count:
        time.sleep(0.01)
    return time.perf_counter()


def pull_cable(hosts: Hosts, times: dict[str, list[float]]) -> None:
    client = ConnectionPool(access_to(hosts))
    process = Ssh(Node(host=hosts.all[0].address), client).start(("sleep", "300"), log=hosts.key.parent / "cable.log")
    hosts.all[0].unplug()
    started = time.perf_counter()
    try:
        process.wait(60)
    except NodeFailed:
        times["cable"] = [time.perf_counter() - started]
    client.close()


def plain_ssh(hosts: Hosts, times: dict[str, list[float]]) -> None:
    options = ("-F", "none", "-o", f"UserKnownHostsFile={hosts.known_hosts}", "-o", "BatchMode=yes", "-i", str(hosts.key))
    for name, more in (("ssh cold", ()), ("ssh cold x25519", X25519)):
        with clock(times, name):
            argvs = [("ssh", *options, *more, f"root@{host.address}", "true") for host in hosts.all]
            running = [subprocess.Popen(argv, stdin=subprocess.DEVNULL) for argv in argvs]
            codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"plain ssh failed on {sum(map(bool, codes))} nodes")


def fabric_group(hosts: Hosts, times: dict[str, list[float]]) -> None:
    keys = {"key_filename": str(hosts.key), "look_for_keys": False, "allow_agent": False}
    config = Config(lazy=True)
    connections = [Connection(host.address, user="root", config=config, connect_kwargs=dict(keys)) for host in hosts.all]
    group = ThreadingGroup.from_connections(connections)
    with Threads() as threads, clock(times, "fabric cold"):
        group.run("true", hide=True, in_stream=False)
    times.setdefault("fabric threads", []).append(threads.most)
    with clock(times, "fabric warm"):
        group.run("true", hide=True, in_stream=False)
    group.close()
    time.sleep(0.5)


def report(count: int, times: dict[str, list[float]]) -> None:
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{count} nodes, median of {len(times['ours cold'])} (goals at 128 nodes):")
    print(
        f"  cold   ours {middle['ours cold']:.2f} s (goal {GOALS['cold']}; connect {middle['ours connect']:.2f} s; {middle['ours cold cpu']:.2f} core-s here; "
        f"worst {max(times['ours cold']):.2f} s), "
        f"ssh {middle['ssh cold']:.2f} s ({middle['ssh cold x25519']:.2f} s with the same key exchange as ours), Fabric {middle['fabric cold']:.2f} s"
    )
    print(f"  warm   ours {middle['ours warm']:.2f} s (goal {GOALS['warm']}), Fabric {middle['fabric warm']:.2f} s")
    print(f"  most threads while connecting: ours {middle['ours threads']:.0f}, Fabric {middle['fabric threads']:.0f}")
    print(
        f"  attached for {ATTACHED_S} s, a line a second from each: {100 * middle['attached share']:.1f} % of a core (goal {GOALS['attached']}), "
        f"{middle['attached threads']:.0f} threads (goal {GOALS['threads']})"
    )
    print(
        f"  one dead host more: named after {middle['dead named']:.1f} s (goal {GOALS['dead']}), all others reached after {middle['dead others']:.2f} s; "
        f"a pulled cable noticed after {middle.get('cable', float('nan')):.0f} s (goal 30 s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for count in arguments.nodes:
        times: dict[str, list[float]] = {}
        ways: tuple[Callable[[Hosts, dict[str, list[float]]], None], ...] = (plain_ssh, fabric_group)
        with tempfile.TemporaryDirectory() as folder, light_hosts(count, Path(folder)) as hosts:
            for repeat in range(arguments.repeats):
                ours(hosts, times, attached=repeat == 0)
                for way in ways:
                    way(hosts, times)
            name_the_dead(hosts, times)
            pull_cable(hosts, times)
        report(count, times)


if __name__ == "__main__":
    main()
