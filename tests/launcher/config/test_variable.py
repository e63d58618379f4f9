"""Variables of the caller's environment: used as their key, or named as ignored with the override to write."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.config.compose import compose, judge, options
from launcher.config.variable import CONDITIONS, VISIBLE, describe_variables, load_variables, use_visible_devices
from launcher.ssh.transport import KEPT_VARIABLES

CONF = Path(__file__).parents[3] / "conf"
QWEN = ("hardware=h200", "model=qwen2_5_vl_7b", "stage=lora")
NPU = ("hardware=ascend910b", "model=qwen2_5_vl_7b", "stage=lora", "cluster.runtime=docker")


def lines(environ: dict[str, str], *overrides: str) -> list[str]:
    return list(describe_variables(environ, compose(overrides, CONF), overrides))


@pytest.mark.parametrize("row", load_variables(), ids=lambda row: (*row.names, *row.prefixes)[0])
def test_a_row_writes_an_override_that_is_taken(row) -> None:  # type: ignore[no-untyped-def]
    assert set(row.only) <= set(CONDITIONS) and bool(row.write or row.says) + row.kept == 1
    name = (*row.names, *(f"{prefix}X" for prefix in row.prefixes))[0]
    if row.write:
        written = row.write.replace("{name}", name)
        assert "" in [judge(written.replace("{}", value), CONF) for value in ("1", "true", "text")], written


def test_what_is_kept_is_what_the_transport_keeps() -> None:
    """The rest of KEPT_VARIABLES are paths and locales of every program, which no one takes for a setting of a run."""
    kept = {name for row in load_variables() if row.kept for name in row.names}
    assert kept <= set(KEPT_VARIABLES) and {name for name in KEPT_VARIABLES if name.startswith("HF_")} <= kept


IGNORED = {
    "MAX_PIXELS=802816": "MAX_PIXELS=802816 in your environment is ignored: write data.max_pixels=802816",
    "NPROC_PER_NODE=4": "NPROC_PER_NODE=4 in your environment is ignored: write cluster.devices_per_node=4",
    "OMP_NUM_THREADS=8": "OMP_NUM_THREADS=8 in your environment is ignored: write hardware.threads=8",
    "NCCL_DEBUG=INFO": "NCCL_DEBUG=INFO in your environment is ignored: write cluster.environment.NCCL_DEBUG=INFO",
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True": "write cluster.environment.PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    "WORLD_SIZE=8": "WORLD_SIZE in your environment is ignored: the launcher starts the ranks of all nodes",
    "CUDA_VISIBLE_DEVICES=GPU-1a2b": "CUDA_VISIBLE_DEVICES in your environment is ignored: it has no numbers of devices; write cluster.nodes.0.devices=[0]",
    "CUDA_VISIBLE_DEVICES=": "CUDA_VISIBLE_DEVICES in your environment is ignored: it has no numbers of devices",
}


@pytest.mark.parametrize("variable", IGNORED)
def test_a_variable_is_named_with_the_override(variable: str) -> None:
    name, _, value = variable.partition("=")
    (line,) = lines({name: value}, *QWEN)
    assert IGNORED[variable] in line


def test_what_does_not_matter_is_not_named() -> None:
    everywhere = {"PATH": "/bin", "EDITOR": "vi", "NCCL_VERSION": "2.27", "HF_TOKEN": "hf_x", "HF_HOME": "/x", "WANDB_API_KEY": "w"}
    assert (
        lines(everywhere, *QWEN, "cluster.runtime=process") == []
    )  # the process runtime keeps HF_TOKEN and HF_HOME, and nothing is written to wandb
    assert lines({"MAX_PIXELS": "9", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "1"}) == []  # a CPU, and a model that does not scale
    assert lines({"HCCL_CONNECT_TIMEOUT": "1800", "OMP_NUM_THREADS": "4"}, *NPU, "hardware.threads=4") == []  # set so already


def test_an_override_holds() -> None:
    (line,) = lines({"MAX_PIXELS": "802816"}, *QWEN, "data.max_pixels=500000")
    assert line == "MAX_PIXELS=802816 in your environment is ignored: data.max_pixels=500000 holds"


def test_secrets_are_named_in_one_override_and_not_shown() -> None:
    environ = {"HF_TOKEN": "hf_canary", "WANDB_API_KEY": "canary", "HF_ENDPOINT": "https://ann:canary@mirror.example"}
    said = lines(environ, *NPU, "cluster.secrets=[MINE]", "run.trackers=[wandb]")
    assert "HF_TOKEN, WANDB_API_KEY in your environment are not passed on: write cluster.secrets=[MINE,HF_TOKEN,WANDB_API_KEY]" in said
    assert "canary" not in "\n".join(said)


@pytest.mark.parametrize(
    ("environ", "overrides", "used"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, QWEN, ("cluster.nodes.0.devices=[4,5]", "cluster.devices_per_node=2")),
        ({"CUDA_VISIBLE_DEVICES": "4, 5"}, (*QWEN, "cluster.devices_per_node=1"), ("cluster.nodes.0.devices=[4]",)),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1"}, NPU, ("cluster.nodes.0.devices=[0,1]", "cluster.devices_per_node=2")),
        ({"CUDA_VISIBLE_DEVICES": "0"}, NPU, ()),
        ({"CUDA_VISIBLE_DEVICES": "0"}, (), ()),
        ({"CUDA_VISIBLE_DEVICES": ""}, QWEN, ()),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, QWEN, ()),
        ({"CUDA_VISIBLE_DEVICES": "1"}, (*QWEN, "cluster=example"), ()),
        ({"CUDA_VISIBLE_DEVICES": "1"}, (*QWEN, "cluster.nodes.0.devices=[7]", "cluster.devices_per_node=1"), ()),
    ],
)
def test_visible_devices_are_used_on_this_machine(environ: dict[str, str], overrides: tuple[str, ...], used: tuple[str, ...]) -> None:
    config = compose(overrides, CONF)
    most = config.cluster.devices_per_node or config.hardware.devices_per_node
    assert use_visible_devices(environ, config, most=most, overrides=overrides) == used
    assert set(VISIBLE) < {"cpu", "cuda", "npu"} and "cluster" in options(CONF)


def test_a_plan_says_so_and_records_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    for name in ("OMP_NUM_THREADS",):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("MAX_PIXELS", "802816")
    assert main(["plan", *QWEN, "--full"]) == 0
    text = capsys.readouterr().out
    assert "note: CUDA_VISIBLE_DEVICES=4,5 in your environment is used: cluster.nodes.0.devices=[4,5]" in text
    assert "note: MAX_PIXELS=802816 in your environment is ignored: write data.max_pixels=802816" in text
    assert main(["plan", *QWEN, "--json"]) == 0
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert plan["config"]["cluster"]["nodes"][0]["devices"] == [4, 5] and plan["overrides"][-1] == "cluster.devices_per_node=2"
    assert '"device=4,5"' in " ".join(plan["commands"][0]["start"]) and "MAX_PIXELS=802816" in said.err


def test_a_server_takes_the_first_of_the_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    (tmp_path / "weights").mkdir()
    assert main(["plan", "hardware=h200", "model=qwen2_5_vl_7b", "stage=serve", "stage.checkpoint=weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["cluster"]["nodes"][0]["devices"] == [2]


@pytest.mark.parametrize(
    ("visible", "words", "used"),
    [
        ("0,1,2", (), "cluster.nodes.0.devices=[0,1,2] cluster.devices_per_node=3"),
        ("0,1", ("cluster.devices_per_node=4",), "cluster.devices_per_node=4 cluster.nodes.0.devices=[0,1]"),
    ],
)
def test_a_refusal_names_the_devices_that_were_not_typed(
    visible: str, words: tuple[str, ...], used: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main(["plan", *QWEN, "stage.global_batch=64", *words]) in (2, 4)
    said = capsys.readouterr().err
    assert f"CUDA_VISIBLE_DEVICES={visible} in your environment is used: {used}" in said
    assert main(["plan", *QWEN, "stage.global_batch=64", "cluster.nodes.0.devices=[0,1,2]", "cluster.devices_per_node=3"]) == 2
    assert "in your environment" not in capsys.readouterr().err
