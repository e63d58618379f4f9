"""`omnilaunch model`, as it is typed."""

import gc
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands import model as command
from launcher.commands.plan import PROJECT
from launcher.weights.identity import load_models
from tests.launcher.weights.conftest import SHARDS, hub as hub, write_folder
from tests.launcher.weights.hub_server import COMMIT, NAME, Hub
from trainer.contract.weight_files import MANIFEST_FILE


@pytest.fixture(autouse=True)
def own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "MODELSCOPE_DOMAIN", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMNILAUNCH_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "folder", "following"),
    [
        (("qwen2_5_vl_7b",), f"models/hub/{NAME}", "model.source.path={folder}"),
        (("Qwen2.5-VL-7B-Instruct", "--from", "modelscope"), f"models/modelscope/{NAME}", "model.source=modelscope"),
        ((NAME, "--to", "{tmp}/own"), "own", "model.source.path={folder}"),
    ],
)
def test_fetch_then_check(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    folder: str,
    following: str,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.address)
    monkeypatch.setattr(command, "CHECKED_STAGES", ())
    models = load_models(PROJECT / "conf")
    models["qwen2_5_vl_7b"]["parameters"]["total"] = 9000
    monkeypatch.setattr("launcher.weights.identity.load_models", lambda _: models)
    code = main(["model", "fetch", *(word.format(tmp=tmp_path) for word in words)])
    said = capsys.readouterr().out
    assert f"{tmp_path / folder}: 12 files, 0.0 MB, every hash is right; {NAME} at" in said
    assert code == 0 and f"next: omnilaunch plan model=qwen2_5_vl_7b {following.format(folder=tmp_path / folder)}" in said
    assert main(["model", "check", str(tmp_path / folder), "--hashes"]) == 0
    assert f"source    {NAME} at" in capsys.readouterr().out


def test_what_arrived_is_kept_and_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    hub.faults = {SHARDS[0]: [(404, "EntryNotFound")]}
    assert main(["model", "fetch", NAME, "--to", str(tmp_path / "own")]) == 4
    said = capsys.readouterr()
    assert f"what arrived is kept in {tmp_path / 'own'}: the same command continues" in said.out
    assert f"omnilaunch: {hub.address}: {SHARDS[0]} does not exist there (404)" in said.err
    assert main(["model", "check", str(tmp_path / "own")]) == 2
    assert (
        f"the fetch into this folder has not ended. Run again: omnilaunch model fetch MODEL --to {tmp_path / 'own'}"
        in capsys.readouterr().out
    )
    assert main(["model", "fetch", NAME, "--to", str(tmp_path / "own"), "--revision", COMMIT]) == 2
    again = capsys.readouterr().out
    assert "problem: 9,000 parameters, and qwen2_5_vl_7b has 8,292,166,656: tensors are missing" in again, (
        "the hub has other files than the model"
    )
    assert "it cannot be used as it is. See: omnilaunch model check" in again and "next:" not in again
    assert (tmp_path / "own" / MANIFEST_FILE).is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fetch", "qwen2_5_vl_7"), "unknown model 'qwen2_5_vl_7'; did you mean 'qwen2_5_vl_7b'?"),
        (("fetch", "tiny_llava"), "tiny_llava starts from random weights: there is nothing to download. omnilaunch plan model=tiny_llava"),
        (("fetch", "a/b/c"), "'a/b/c' is no id of a repository: ORGANISATION/NAME"),
        (("fetch", NAME, "--from", "model-scope"), "--from model-scope: no such hub; did you mean 'modelscope'?"),
        (("fetch", NAME, "--endpoint", "hub.lan"), "the address of the hub must be https://HOST"),
        (("check", "/nowhere"), "/nowhere: there is no such folder"),
        (("get", "x"), "unknown action 'get' of model; "),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert main(["model", *words]) in (2, 4)
    assert said in capsys.readouterr().err


def test_offline_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["model", "fetch", NAME]) == 2
    assert "HF_HUB_OFFLINE=1 forbids the network: unset it for this command" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "fetch", NAME, "--endpoint", "https://hub.invalid", "--to", str(tmp_path / "a")]) == 4
    said = capsys.readouterr().err
    assert "https://hub.invalid could not be reached" in said and "HF_ENDPOINT=https://hf-mirror.com" in said
    assert not (tmp_path / "a").exists()


def test_check_as_json_and_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "a")
    assert main(["model", "check", str(folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["identity"]["model"] == "qwen2_5_vl_7b"
    cached = tmp_path / ".cache" / "huggingface" / "hub" / "models--Qwen--Qwen2.5-VL-7B-Instruct" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    assert main(["model", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("qwen2_5_vl_7b "))
    assert lines[place].split() == ["qwen2_5_vl_7b", "8.3", "B", "Apache-2.0", NAME]
    assert lines[place + 1].strip() == f"here: {cached}"
    assert main(["model", "ls", "--json"]) == 0
    assert {row["name"]: row["folders"] for row in json.loads(capsys.readouterr().out)}["qwen2_5_vl_7b"] == [str(cached)]


def test_a_fetched_model_is_trained_and_its_commit_recorded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: download, plan by the folder alone, train, and read in the record what was loaded."""
    made = tmp_path / "made"
    subprocess.run(
        (sys.executable, "-m", "trainer.models.tiny", str(PROJECT / "conf/model/tiny_llava.yaml"), str(made)), cwd=PROJECT, check=True
    )
    hub.files = {path.name: path.read_bytes() for path in made.iterdir()}
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "hub" / NAME
    assert main(["model", "fetch", NAME, "--endpoint", hub.address]) == 0
    words = [
        f"model.source.path={folder}",
        "hardware=cpu",
        "stage=full",
        "run.steps=2",
        "stage.optimizer.warmup=0",
        "stage.global_batch=4",
        "run.evaluation.enabled=false",
    ]
    try:
        assert main(["launch", *words, "--run-id", "r"]) == 0, capsys.readouterr()
    finally:
        gc.enable()  # which `main` turns off for the whole process
    run = tmp_path / "runs" / "r"
    origin = json.loads((run / "environment.json").read_text())["origin"]
    assert (origin["path"], origin["revision"]) == (str(folder), COMMIT)
    weights = json.loads((run / "inputs.json").read_text())["weights"]
    assert weights["model/model.safetensors"] == hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    assert "model/config.json" in weights and not [name for name in weights if "manifest" in name], "a second fetch has another date"
