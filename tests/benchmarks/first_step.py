"""Time from the command to the first optimizer step on several hosts, compared with torchrun started by hand with the same image.

    python tests/benchmarks/first_step.py [--nodes 2] [--repeats 5] [--base omnilaunch-base:bookworm] [KEY=VALUE ...]

The hosts are containers on this machine, each with an sshd, an engine and a disk; both ways share its cores. `KEY=VALUE`: overrides for the
image build, as for `omnilaunch launch`. By hand: the commands that a user would type for each host at once, with the folder and spec of the
run prepared before. The first step is the time at which node 0 wrote the first metrics row. Needs root.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.conftest import Lab
from tests.cluster.host import USER, Host, build_image, end_hosts, known_hosts, make_key, start_hosts

NETWORK = "omnilaunch-bench"
FOLDER = f"/home/{USER}/omnilaunch"
JOB = ("run.steps=1", "stage.optimizer.warmup=0", "run.evaluation.enabled=false", "stage.global_batch=16", "hardware.threads=1")


def first_row_s(host: Host, name: str, started: float) -> float:
    """Seconds from `started` to the first metrics row of a run of one step; the hosts use the clock of this machine."""
    return float(host.run("stat", "--format", "%.9Y", f"{FOLDER}/runs/{name}/metrics.jsonl")) - started


def by_launcher(lab: Lab, overrides: tuple[str, ...], name: str) -> float:
    started = time.time()
    done = lab.run("launch", "--run-id", name, *overrides, PYTHONDONTWRITEBYTECODE="")  # as for a user: Python compiles a module once
    if done.returncode:
        sys.exit(f"launch failed:\n{done.stdout[-3000:]}")
    return first_row_s(lab.hosts[0], name, started)


def by_hand(lab: Lab, commands: list[dict[str, object]], spec: str, model: str, name: str) -> float:
    """`ssh HOST docker run ... torchrun ...` for all hosts at once, as a user would do it; `model`: the run that the commands are taken from."""
    for host in lab.hosts:
        host.run("mkdir", "-p", f"{FOLDER}/runs/{name}", user=USER)
        write(host, f"{FOLDER}/runs/{name}/spec.json", spec.replace(f"/runs/{model}", f"/runs/{name}"))
    lines = []
    for host, command in zip(lab.hosts, commands, strict=True):
        variables = "".join(f"{key}={value}\n" for key, value in command["environment"].items())  # type: ignore[attr-defined]
        write(host, f"{FOLDER}/runs/{name}/typed.env", variables.replace(f"/runs/{model}", f"/runs/{name}"))
        start = [word.replace(f"/runs/{model}", f"/runs/{name}") for word in command["start"]]  # type: ignore[attr-defined]
        start = ["--rm" if word == "--detach" else f"{name}" if word == command["name"] else word for word in start]
        start[start.index("--env-file") + 1] = f"{FOLDER}/runs/{name}/typed.env" if "--env-file" in start else ""
        lines.append(("ssh", "-i", str(lab.home / ".ssh/id_ed25519"), "-o", f"UserKnownHostsFile={lab.home}/.ssh/known_hosts",
                      f"{USER}@{host.address}", shlex.join(start)))  # fmt: skip
    started = time.time()
    typed = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [process.communicate()[1] for process in typed]
    if any(process.returncode for process in typed):
        sys.exit("by hand failed:\n" + "\n".join(said)[-3000:])
    return first_row_s(lab.hosts[0], name, started)


def write(host: Host, path: str, text: str) -> None:
    subprocess.run(
        ("docker", "exec", "-i", "--user", USER, host.name, "tee", path), input=text, text=True, stdout=subprocess.DEVNULL, check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base", default="omnilaunch-base:bookworm")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    image = (f"cluster.delivery.base={arguments.base}", *arguments.overrides)
    end_hosts(NETWORK)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / ".ssh").mkdir(mode=0o700)
        try:
            hosts = start_hosts(arguments.nodes, image=build_image(arguments.base), key=make_key(home / ".ssh"), network=NETWORK, subnet=8)
            (home / ".ssh" / "known_hosts").write_text(known_hosts(hosts), encoding="utf-8")
            lab = Lab(hosts=hosts, home=home, image=image)
            measure(lab, (*JOB, *lab.overrides(*hosts, root=FOLDER)), arguments.repeats)
        finally:
            end_hosts(NETWORK)


def measure(lab: Lab, overrides: tuple[str, ...], repeats: int) -> None:
    by_launcher(lab, overrides, "warm")  # from now on the image and the data are on the hosts
    run = lab.home / "runs" / "warm"
    commands, spec = json.loads((run / "plan.json").read_text())["commands"], (run / "spec.json").read_text()
    hand, launcher = [], []
    for repeat in range(repeats):
        hand.append(by_hand(lab, commands, spec, "warm", f"hand{repeat}"))
        launcher.append(by_launcher(lab, overrides, f"launch{repeat}"))
        print(
            f"{repeat}: by hand {hand[-1]:.2f} s, omnilaunch launch {launcher[-1]:.2f} s, more {launcher[-1] - hand[-1]:+.2f} s", flush=True
        )
    more = [ours - theirs for ours, theirs in zip(launcher, hand, strict=True)]
    print(
        f"{len(lab.hosts)} hosts, median of {repeats}: by hand {statistics.median(hand):.2f} s, launch {statistics.median(launcher):.2f} s, "
        f"more {statistics.median(more):.2f} s (goal <= 1.0 s)"
    )


if __name__ == "__main__":
    main()
