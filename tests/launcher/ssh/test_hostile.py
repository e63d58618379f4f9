"""A thousand generated strings through every field that a user writes freely: they arrive byte for byte at the program that they are for,
or are refused by the field's name, and no shell on the way executes any of them."""

import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.check.docker import CONTAINER_RULES
from launcher.check.nodes import CLUSTER_RULES, LOOPBACK
from launcher.check.rules import RULES
from launcher.check.strings import TEXT_RULES, texts_are_utf8
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.commands import NodeCommand, env_file, node_commands
from launcher.plan.data.rows import folder_of
from launcher.plan.plan import Plan, absolute, make_plan, train_spec
from launcher.record.record import valid_run_id
from launcher.run.container import write_env_file
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from tests.launcher.conftest import PLACE, PROJECT
from tests.launcher.fake_docker import FakeDocker
from tests.launcher.hostile import hostile
from tests.launcher.sshd import Sshd, access_in, make_key, node_at
from trainer import contract
from trainer.contract import TrainSpec
from trainer.data.rows.sample import read_samples

SPECIAL = (
    "\0", "a\0b", "\ud800", "a\nb", "a\rb", "end\r", "end\n", " lead", "end ", "\tx", "\ufeffx", "#x", "=x", "a=b", "-x", "--privileged", "~",
    "$HOME", "a,b", 'a"b', "a'b", "..", "x" * 70_000, "\x7f", "é", "日本", "{{.}}", "%s", "\\", "a\\",
)  # fmt: skip
STACKS = load_stacks(PROJECT / "images")
DOCKER = (
    "cluster=example",
    "cluster.runtime=docker",
    "data=files",
    "data.train=/d/t.json",
    "data.evaluation=/d/e.json",
    "data.images=/d/i",
)
Put = Callable[[Config, str], Config]


def put(path: str) -> Put:
    """Replaces the text at a dotted key."""

    def replaced(section: Any, parts: list[str], word: str) -> Any:
        name, *rest = parts
        if isinstance(section, tuple):
            items = list(section)
            items[int(name)] = replaced(items[int(name)], rest, word) if rest else word
            return tuple(items)
        if isinstance(section, dict):
            return {**section, name: word}
        return replace(section, **{name: replaced(getattr(section, name), rest, word) if rest else word})

    return lambda config, word: replaced(config, path.split("."), word)


# Where a text goes that passes: into the words of the command, into the environment file, into the spec, nowhere but where it is checked
# for being a name.
PATHS = ("cluster.root", "data.train", "data.evaluation", "data.images", "stage.checkpoint", "model.source.path", "cluster.mounts.0")
VARIABLES = ("cluster.environment.V", "hardware.environment.V")
PROMPTS = ("model.template.system", "model.template.user", "model.template.assistant_open", "model.template.end_mark", "model.image_token")
NAMES = (
    *(f"cluster.nodes.0.{name}" for name in ("host", "user", "address", "interface", "jump")),
    *(
        "cluster.user",
        "cluster.shm_size",
        "cluster.ulimits.stack",
        "cluster.secrets.0",
        "cluster.delivery.registry",
        "cluster.delivery.base",
    ),
)
SETTINGS = tuple(f"cluster.delivery.{name}" for name in ("index", "extra_index", "find_links", "ca_bundle", "proxy", "wheelhouse"))
SHELL = set("'\"\\$`!*?[]{}()<>|&;#~^ \t\r\n\0")  # what a name that passes has none of; [] and \ are checked where they are allowed
ALLOWED = {"cluster.nodes.0.user": {"\\", "$"}, "cluster.nodes.0.jump": {"[", "]", " ", "\t", "\n", "\r"}}


@pytest.fixture(scope="module")
def words() -> list[str]:
    return hostile(1000)


@pytest.fixture(scope="module")
def config() -> Config:
    made = compose([*DOCKER, "cluster.delivery.kind=pull", "cluster.delivery.registry=registry.example/x"], PROJECT / "conf")
    cluster = replace(made.cluster, mounts=("/m",), secrets=("S",), ulimits={"stack": "1"})
    return replace(made, cluster=cluster, strategy=replace(made.strategy, name="ddp"))


@pytest.fixture(scope="module")
def plan(config: Config) -> Plan:
    return make_plan(config, STACKS, PLACE, run_id="R")


def refusals(config: Config, word: str = "") -> list[str]:
    """The keys of all that is refused about text. Half characters are looked for in the whole config, which takes its time."""
    text = TEXT_RULES if "\ud800" in word else [rule for rule in TEXT_RULES if rule is not texts_are_utf8]
    return [problem.key for rule in (*text, *CLUSTER_RULES, *CONTAINER_RULES) for problem in rule(config, STACKS)]


def commands_of(config: Config, plan: Plan) -> tuple[NodeCommand, TrainSpec]:
    """As make_plan does it, without the image, which is the same every time."""
    spec = train_spec(config, PLACE, run_id="R")
    return node_commands(config, plan.image, spec, interpreter="python", user="0:0")[0], spec


def test_the_rules_are_those_of_check() -> None:
    assert {*TEXT_RULES, *CLUSTER_RULES, *CONTAINER_RULES} <= {*RULES}


@pytest.mark.parametrize("key", [*PATHS, *VARIABLES, *PROMPTS, *NAMES, *SETTINGS])
def test_it_passes_as_it_is_or_is_refused_by_name(key: str, words: list[str], config: Config, plan: Plan) -> None:
    passed = 0
    for word in (*words, *SPECIAL):
        text = f"/r{word}" if key in PATHS else word
        changed = put(key)(config, text)
        refused = refusals(changed, word)
        if refused:
            listed = {"cluster.nodes"} if key.endswith(".host") and LOOPBACK.fullmatch(word) else set()  # this machine among others
            assert {*refused} <= {key, key.rpartition(".")[0], re.sub(r"\.\d+", "", key)} | listed, (word, refused)
            continue
        passed += 1
        if key in NAMES and word:
            assert not set(word) & (SHELL - ALLOWED.get(key, set())) and not word.startswith("-"), word
        if key not in NAMES:
            command, spec = commands_of(changed, plan)
            assert carries(key, text, command, spec), word
    assert passed > (0 if key in NAMES else 450), "what is free text passes, but for what is syntax to docker"


def carries(key: str, text: str, command: NodeCommand, spec: TrainSpec) -> bool:
    """Whether the text is, whole, where it belongs."""
    if key in VARIABLES:
        return command.environment["V"] == text
    if key in PROMPTS:
        return text in prompts(spec)
    if key in SETTINGS:
        return not any(letter in text for letter in "\n\r\0")
    path = text if key == "cluster.mounts.0" else absolute(text, PLACE.here)
    if key in ("data.train", "data.evaluation"):  # the folder is mounted, which has what the file names
        path = folder_of(path)
    source = spec.output if key == "cluster.root" else path
    assert source == path or source == absolute(f"{text}/runs/R", PLACE.here)
    return any(word.startswith(f"type=bind,source={source},target={source}") for word in command.start)


def prompts(spec: TrainSpec) -> tuple[str, ...]:
    template = spec.model.template
    return (template.system, template.user, template.assistant_open, template.end_mark, spec.model.image_token)


def test_run_ids_and_names_of_variables(words: list[str], config: Config) -> None:
    for word in (*words, *SPECIAL):
        try:
            assert valid_run_id(word).isascii() and not set(word) & SHELL
        except ConfigRefused as error:
            assert "--run-id" in str(error)
        named = replace(config, cluster=replace(config.cluster, environment={word: "1"}))
        assert "cluster.environment" in refusals(named) or word.isidentifier()


def test_several_problems_are_reported_together(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused) as caught:
        plan_for(
            *DOCKER[:3], "data.train=/a,b", "data.images=/c", "data.evaluation=/d", "cluster.mounts=['/e,f']", "cluster.delivery.base='a b'"
        )
    for word in (
        "data.train: Docker cannot mount the path '/a,b'",
        "cluster.mounts.0: Docker cannot mount",
        "cluster.delivery.base: 'a b'",
    ):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------------- to the far side


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Ssh, FakeDocker]]:
    """A real sshd, and on its PATH a docker that records its arguments."""
    key, docker = make_key(tmp_path / "id_ed25519"), FakeDocker(tmp_path / "bin")
    server = Sshd(tmp_path / "node", key, f"SetEnv PATH={docker.folder}:/usr/bin:/bin")
    client = ConnectionPool(access_in(tmp_path / "access", key, server.known_line()))
    yield Ssh(node_at(server), client), docker
    client.close()
    server.end()


@pytest.fixture(autouse=True)
def canary(tmp_path: Path) -> Iterator[None]:
    """What a payload would have made or touched: where a login begins, where this process is, anywhere below the test's folder."""
    homes = (Path.cwd() / "C", Path(pwd.getpwuid(os.getuid()).pw_dir) / "C")
    before = [path.stat().st_mtime_ns if path.exists() else 0 for path in homes]
    yield
    assert [path.stat().st_mtime_ns if path.exists() else 0 for path in homes] == before
    assert [path for path in tmp_path.rglob("C") if path.name == "C"] == []


def plain(word: str) -> str:
    """The word as one name of a folder."""
    return f"w{word.replace('/', '_')}"


def fill(config: Config, batch: list[str], folder: Path) -> Config:
    """Each word of a batch in its variable and its mount, and seven of them in the other paths too."""
    for key, word in zip(PATHS[:-1], batch, strict=False):
        filled = put(key)(config, f"{folder}/{plain(word)}")
        config = config if refusals(filled) else filled
    mounts = [f"{folder}/{plain(word)}" for word in batch]
    environment = {f"V{place}": word for place, word in enumerate(batch)}
    for place, path in enumerate(mounts):
        if refusals(put("cluster.mounts.0")(config, path)):
            mounts[place] = str(folder)
        if refusals(put("cluster.environment.V")(config, batch[place])):
            environment.pop(f"V{place}")
    return replace(config, cluster=replace(config.cluster, mounts=tuple(mounts), environment=environment))


def read_env_file(text: str) -> dict[str, str]:
    """As docker/cli does it, opts/file.go: lines, the blanks before a name cut off, no quotes."""
    return dict(line.lstrip().split("=", 1) for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))


def test_a_thousand_strings_over_a_real_sshd(
    words: list[str], config: Config, plan: Plan, node: tuple[Ssh, FakeDocker], tmp_path: Path
) -> None:
    ssh, docker = node
    expected, carried = [], 0
    for start in range(0, len(words), 50):
        filled = fill(config, words[start : start + 50], tmp_path)
        command, _ = commands_of(filled, plan)
        path = env_file(command.folder, 0)
        write_env_file(command, ssh, path)
        assert ssh.run(command.start).code == 0
        assert read_env_file(docker.environment) == command.environment
        expected.append(command.start[1:])
        carried += len(filled.cluster.environment)
    assert docker.commands() == expected and carried > 700 and len(docker.commands()) == 20


def test_prompts_over_a_real_sshd(words: list[str], plan: Plan, node: tuple[Ssh, FakeDocker], tmp_path: Path) -> None:
    ssh, _ = node
    template = replace(plan.spec.model.template, system="\n".join(words), user="{content}" + "".join(words), end_mark="\0".join(words))
    spec = replace(plan.spec, model=replace(plan.spec.model, template=template))
    ssh.put(contract.encode(spec).encode(), f"{tmp_path}/spec.json")
    assert contract.read(TrainSpec, tmp_path / "spec.json") == spec


def test_the_trainer_reads_hostile_rows_below_a_hostile_folder(
    words: list[str], plan: Plan, node: tuple[Ssh, FakeDocker], tmp_path: Path
) -> None:
    """The trainer's own process, started over SSH as a node would: questions, answers, ids, names of images."""
    from PIL import Image

    ssh, _ = node
    folder = tmp_path / "a 'b' $(touch C) `touch C` ;touch C\n"
    (folder / "runs").mkdir(parents=True)
    spoken = [word for word in words if word.strip() and "<image>" not in word]
    Image.new("RGB", (8, 8)).save(folder / "$(touch C).png")
    rows = [
        {
            "id": word,
            "image": "$(touch C).png",
            "conversations": [{"from": "human", "value": f"<image>{word}"}, {"from": "gpt", "value": word}],
        }
        for word in spoken
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    data = replace(
        plan.spec.data, builtin="", train=f"{folder}/rows.json", evaluation=f"{folder}/rows.json", images=str(folder), max_length=1000
    )
    spec = replace(plan.spec, data=data, output=str(folder / "runs"))
    ssh.put(contract.encode(spec).encode(), f"{folder}/runs/spec.json")
    done = ssh.run((sys.executable, "-m", "trainer", "data", f"{folder}/runs/spec.json"), folder=PROJECT, timeout_s=120)
    assert done.code == 0, done.output + done.errors
    report = contract.read(contract.DataReport, folder / "runs" / contract.DATA_FILE)
    assert (report.train_rows, report.problems) == (len(spoken), ()) and len(spoken) > 900
    samples, _ = read_samples(folder / "rows.json", folder)
    assert [(sample.id, sample.messages[0].content, sample.messages[1].content) for sample in samples] == [
        (word, f"<image>{word}", word) for word in spoken
    ]


# ------------------------------------------------------------------------------------------------- as an engine reads it


@pytest.mark.docker
def test_the_engine_reads_what_was_written(words: list[str], config: Config, plan: Plan, tmp_path: Path) -> None:
    """The real docker client with the real engine: variables from the file, mounts from their CSV. The container is never started."""
    name = f"omnilaunch-test-hostile:{os.getpid()}"
    subprocess.run(("docker", "import", "-", name), input=b"\0" * 1024, check=True, capture_output=True)
    try:
        for start in range(0, len(words), 250):
            filled = fill(config, words[start : start + 250], tmp_path)
            command, _ = commands_of(filled, plan)
            environment, mounts = created(command, name, filled.cluster.mounts, tmp_path)
            assert environment == command.environment
            assert mounts == {(path, path) for path in filled.cluster.mounts}
    finally:
        subprocess.run(("docker", "rmi", name), check=True, capture_output=True)


def created(command: NodeCommand, image: str, folders: tuple[str, ...], tmp_path: Path) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Variables and mounts of a container made with the command's own options. `folders` are made, since docker looks for them."""
    for folder in folders:
        Path(folder).mkdir(exist_ok=True)
    lines = "".join(f"{key}={value}\n" for key, value in command.environment.items())
    (tmp_path / "env").write_bytes(lines.encode())
    words = [word for path in folders for word in command.start if word == f"type=bind,source={path},target={path},readonly"]
    assert len({*words}) == len({*folders})
    options = [part for word in dict.fromkeys(words) for part in ("--mount", word)]
    made = subprocess.run(
        ("docker", "create", "--env-file", str(tmp_path / "env"), *options, image, "true"), capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    container = made.stdout.strip()
    try:
        found = json.loads(subprocess.run(("docker", "inspect", container), check=True, capture_output=True).stdout)[0]
    finally:
        subprocess.run(("docker", "rm", container), check=True, capture_output=True)
    variables = dict(line.split("=", 1) for line in found["Config"]["Env"])
    variables.pop("PATH", None)  # docker's own
    return variables, {(mount["Source"], mount["Target"]) for mount in found["HostConfig"]["Mounts"]}
