"""The trials on the nodes: the options of a container, connections, a shared folder."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.doctor.findings import EVERY_NODE
from launcher.doctor.questions import read_script
from launcher.errors import NodeFailed
from launcher.plan.plan import Plan
from launcher.ssh.transport import Result
from tests.launcher.fake_nodes import (
    CONTENTS,
    CPU,
    DATA,
    HOSTS,
    NPU,
    SHARED,
    FakeNode,
    PlanFor,
    examined,
    found,
    healthy,
    healthy_nodes,
    room,
)

CONTAINER_FAULTS = {
    "docker: Error response from daemon: error setting rlimit type 8: operation not permitted: unknown": "cluster.ulimits",
    'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]': "nvidia-container-toolkit",
    'docker: Error response from daemon: error gathering device information while adding custom device "/dev/davinci9"': "devices_per_node",
}


@pytest.mark.parametrize("said", CONTAINER_FAULTS)
def test_a_container_that_does_not_start(plan_for: PlanFor, said: str) -> None:
    plan = plan_for(*CPU)
    ways = healthy_nodes(plan)
    ways[1].replies["-c"] = (125, "", f"{said}\nSee 'docker run --help'.\n")
    finding = found(examined(plan, ways), "container", HOSTS[1])
    assert (finding.level, finding.evidence) == ("error", said) and CONTAINER_FAULTS[said] in finding.fix


def trial_of(way: FakeNode) -> tuple[str, ...]:
    (argv,) = [argv for argv in way.asked if argv[:2] == ("docker", "run") and "-c" in argv and "trial" in argv[argv.index("-c") + 1]]
    return argv


def options_of(argv: tuple[str, ...], image: str) -> list[tuple[str, str]]:
    """(option, value) of a `docker run`, without those that differ between two containers on purpose."""
    words = argv[3 : argv.index(image)]
    own = ("--name", "--env-file", "--label", "--entrypoint")
    return [(option, value) for option, value in zip(words[::2], words[1::2], strict=True) if option not in own]


@pytest.mark.parametrize("words", [CPU, NPU, DATA], ids=lambda words: " ".join(words[1:3]))
def test_the_trial_has_the_options_of_the_run(plan_for: PlanFor, words: tuple[str, ...]) -> None:
    """All of them: user, network, limits, devices and mounts. A folder of the trial's own takes the place of the run's folders."""
    plan = plan_for(*words)
    ways = healthy_nodes(plan)
    assert found(examined(plan, ways), "container", HOSTS[0]).level == "ok"
    (made,) = [argv[-1] for argv in ways[0].asked if argv[0] == "mkdir"]
    trial = options_of(trial_of(ways[0]), plan.image.tag)
    assert ("--user", "1000:1000") in trial
    as_run = [(option, value.replace(f"source={made},", f"source={value.partition('target=')[2]},")) for option, value in trial]
    assert as_run == options_of(plan.commands[0].start, plan.image.tag)
    assert f"type=bind,source={made},target={plan.spec.output}" in dict(trial).values() or any(made in value for _, value in trial)


def test_the_trial_writes_where_the_run_writes_and_leaves_nothing(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    ways = healthy_nodes(plan)
    environment: dict[str, bytes] = {}
    kept = ways[0].put
    ways[0].put = lambda content, path, *, mode=0o600: (environment.update({path: content}), kept(content, path, mode=mode))  # type: ignore
    examined(plan, ways)
    argv = trial_of(ways[0])
    folders = (plan.spec.output, plan.spec.data.root)
    assert argv[argv.index(plan.image.tag) + 1 :][3:] == tuple(f"{folder}/.omnilaunch-trial" for folder in folders)
    text = environment[argv[argv.index("--env-file") + 1]].decode()
    assert dict(line.split("=", 1) for line in text.splitlines()) == plan.commands[0].environment
    made = next(argv[-1] for argv in ways[0].asked if argv[0] == "mkdir")
    assert ("rmdir", "--", made) in ways[0].asked and not ways[0].files


def test_the_trial_itself(tmp_path: Path) -> None:
    """With the Python of this environment, which has torch, in place of the image's."""
    good, bad = tmp_path / "mark", tmp_path / "no" / "mark"
    argv = (sys.executable, "-c", read_script("trial.py"))
    assert subprocess.run((*argv, str(good)), check=True, capture_output=True).stdout == b"" and good.is_file()
    failed = subprocess.run((*argv, str(good), str(bad)), capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith(f"{bad} cannot be written by uid {os.getuid()}: ")


def test_what_launch_copies_first_is_left_out_of_the_trial_and_named(plan_for: PlanFor) -> None:
    plan = plan_for(*DATA, "cluster.sync=[/d/images]")
    absent = healthy_nodes(plan, first={"content2": (1, "", "No such file")})
    finding = found(examined(plan, absent), "container", HOSTS[0])
    assert finding.level == "ok" and finding.evidence.endswith("(cluster.sync): /d/images")
    assert not any("/d/images" in word for word in trial_of(absent[0])) and any("/d/images" in word for word in trial_of(absent[1]))
    assert set(CONTENTS) == {"content0", "content1", "content2"}


def test_a_spare_is_tried_with_its_own_devices(plan_for: PlanFor) -> None:
    plan = with_spare(plan_for(*NPU, "cluster.devices_per_node=1"), devices=(5,))
    ways = [*healthy_nodes(plan_for(*NPU)), FakeNode("spare", healthy_nodes(plan_for(*NPU))[0].answers | healthy("192.0.2.13"))]
    examined(plan, ways)
    assert "/dev/davinci5" in trial_of(ways[2]) and "/dev/davinci0" not in trial_of(ways[2])


def with_spare(plan: Plan, **changes: Any) -> Plan:
    cluster = plan.config.cluster
    spare = replace(cluster.nodes[1], host="spare", address="", interface="", spare=True, **changes)
    return replace(plan, config=replace(plan.config, cluster=replace(cluster, nodes=(*cluster.nodes, spare))))


def test_a_node_that_does_not_reach_another(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    ways = healthy_nodes(plan)
    ways[1].replies["python"] = (0, json.dumps({HOSTS[0]: "port 29500: timed out"}) + "\n", "")
    finding = found(examined(plan, ways), "connections", HOSTS[1])
    assert finding.level == "error" and "192.0.2.12 cannot reach 192.0.2.11 (192.0.2.11), port 29500: timed out" in finding.evidence
    assert found(examined(plan, ways), "connections", HOSTS[0]).level == "ok"


def test_a_folder_is_shared_as_the_cluster_file_says(plan_for: PlanFor) -> None:
    alone, together = healthy_nodes(plan_for(*CPU)), healthy_nodes(plan_for(*CPU))
    together[1].files = together[0].files
    assert found(examined(plan_for(*CPU), alone), "shared", EVERY_NODE).level == "ok"
    assert found(examined(plan_for(*SHARED), together), "shared", EVERY_NODE).level == "ok"
    wrongly = found(examined(plan_for(*SHARED), alone), "shared", HOSTS[1])
    assert wrongly.level == "error" and "is not visible here" in wrongly.evidence
    unsaid = found(examined(plan_for(*CPU), together), "shared", HOSTS[1])
    assert unsaid.level == "error" and unsaid.fix == "cluster.shared=true"
    assert alone[0].files == together[0].files == {}, "no mark is left"


def test_a_shared_folder_that_is_not_there_or_not_writable(plan_for: PlanFor) -> None:
    plan = plan_for(*SHARED)
    missing = found(examined(plan, healthy_nodes(plan, first={"root": room("/srv")})), "shared", EVERY_NODE)
    assert missing.level == "error" and "/srv/omnilaunch does not exist on 192.0.2.11 yet" in missing.evidence
    ways = healthy_nodes(plan)
    ways[0].replies["read-only"] = (0, "", "")
    assert found(examined(plan, ways), "shared", HOSTS[0]).level == "unchecked"


def reach_processes(addresses: list[str], others: list[str], limit_s: float) -> list[dict[str, str]]:
    """The script of the connections check, a process an address of this machine's loopback."""
    commands = [
        (sys.executable, "-c", read_script("reach.py"), own, "29377", str(limit_s), *({*addresses, *others} - {own})) for own in addresses
    ]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [json.loads(process.communicate(timeout=30)[0]) for process in started]


def test_the_script_that_connects() -> None:
    assert reach_processes(["127.0.0.2", "127.0.0.3", "127.0.0.4"], [], 10) == [{}, {}, {}]


def test_the_script_names_who_does_not_answer() -> None:
    first, second = reach_processes(["127.0.0.2", "127.0.0.3"], ["127.0.0.9"], 1.5)
    assert first == second == {"127.0.0.9": "port 29377: Connection refused"}


class Hanging(FakeNode):
    """A node whose containers do not end."""

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        result = super().run(argv, **options)
        if argv[:2] == ("docker", "run"):
            raise NodeFailed(f"{self.host}: no answer within 60 s")
        return result


def test_a_container_whose_time_is_over_is_removed(plan_for: PlanFor) -> None:
    """Ending docker's client ends no container."""
    plan = plan_for(*CPU)
    ways: list[FakeNode] = [Hanging(way.host, way.answers) for way in healthy_nodes(plan)]
    examined(plan, ways)
    for way in ways:
        started = {argv[argv.index("--name") + 1] for argv in way.asked if argv[:2] == ("docker", "run")}
        removed = {argv[-1] for argv in way.asked if argv[:3] == ("docker", "rm", "--force")}
        assert started and started == removed
