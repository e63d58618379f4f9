"""The folder of a fetch: what is in it already, who uses it, and whether it is large enough."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused, HubFailed, LaunchError
from launcher.weights.fetch import lock_folder
from launcher.weights.manifest import HubKind
from tests.launcher.weights.conftest import SHARDS
from tests.launcher.weights.hub_server import COMMIT, LATER_COMMIT, NAME, Hub
from tests.launcher.weights.test_fetch import KINDS, Watch, contents, run
from trainer.contract.weight_files import MANIFEST_FILE


def test_a_second_call_reads_and_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    run(hub, tmp_path / "a")
    before, hub.requests = contents(tmp_path / "a"), []
    watch = Watch()
    run(hub, tmp_path / "a", watch=watch)
    assert (contents(tmp_path / "a"), hub.requests) == (before, []) and "already fetched" in watch.lines[0]
    assert not (tmp_path / "a" / ".fetch").exists()


def test_a_missing_file_comes_back_at_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    run(hub, tmp_path / "a")
    (tmp_path / "a" / SHARDS[0]).unlink()
    hub.commit = LATER_COMMIT
    run(hub, tmp_path / "a")
    assert (tmp_path / "a" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


@pytest.mark.parametrize("begun", ["done", "unfinished"])
def test_a_folder_of_another_repository_or_commit_is_refused(hub: Hub, tmp_path: Path, begun: str) -> None:
    folder = tmp_path / "a"
    if begun == "unfinished":
        hub.faults = {SHARDS[0]: [(404, "")]}
        with pytest.raises(HubFailed):
            run(hub, folder)
    else:
        run(hub, folder)
    before = contents(folder)
    for other in (lambda: run(hub, folder, kind="modelscope"), lambda: run(hub, folder, revision=LATER_COMMIT)):
        with pytest.raises(ConfigRefused, match=f"{NAME} at {COMMIT} .the Hugging Face hub., not .*Name another folder"):
            other()
    assert contents(folder) == before


def test_files_that_were_there_are_never_changed(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_bytes(hub.files["config.json"])
    run(hub, folder)
    assert not hub.downloads("/config.json"), "the same content is not downloaded again"
    other = tmp_path / "b"
    other.mkdir()
    (other / "tokenizer.json").write_text("mine")
    with pytest.raises(ConfigRefused, match=r"tokenizer.json is there already, and is not the file of .*Nothing was changed"):
        run(hub, other)
    assert (other / "tokenizer.json").read_text() == "mine"


def test_two_calls_for_one_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a" / ".fetch").mkdir(parents=True)
    with lock_folder(tmp_path / "a"), pytest.raises(ConfigRefused, match="another process fetches into this folder"):
        run(hub, tmp_path / "a")
    run(hub, tmp_path / "a")


def test_a_disk_that_is_too_small_is_refused_before_the_weights(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2**28 + 1000))
    with pytest.raises(ConfigRefused, match=r"has 0.3 GB free, and the files of .* that are missing take 0.0 GB. Free as much"):
        run(hub, tmp_path / "a")
    assert not [path for path in hub.paths() if path.endswith(SHARDS[0])]


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigRefused, match="Name a folder that you can write to"):
        run(hub, tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 2, "kind": "hub", "endpoint": "", "id": "", "revision": "", "date": "", "files": []}'],
)
def test_a_damaged_manifest(hub: Hub, tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST_FILE).write_text(text)
    with pytest.raises(LaunchError, match="It is damaged: remove it, or name another folder"):
        run(hub, tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_a_subfolder(hub: Hub, tmp_path: Path, kind: HubKind) -> None:
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"] = {name: f"sub/{file}" for name, file in index["weight_map"].items()}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    for name in SHARDS:
        hub.files[f"sub/{name}"] = hub.files.pop(name)
    manifest = run(hub, tmp_path / "a", kind=kind)
    assert {f"sub/{name}" for name in SHARDS} <= {file.path for file in manifest.files}
    assert all((tmp_path / "a" / "sub" / name).read_bytes() == hub.files[f"sub/{name}"] for name in SHARDS)
    assert not (tmp_path / "a" / ".fetch").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "sub").write_text("mine")
    with pytest.raises(ConfigRefused, match="b/sub cannot be made: File exists"):
        run(hub, tmp_path / "b", kind=kind)


@pytest.mark.parametrize("linked", [True, False])
def test_a_folder_of_unfinished_files_that_no_fetch_made(hub: Hub, tmp_path: Path, linked: bool) -> None:
    (tmp_path / "a").mkdir()
    if linked:
        (tmp_path / "other").mkdir()
        (tmp_path / "a" / ".fetch").symlink_to(tmp_path / "other")
    else:
        (tmp_path / "a" / ".fetch" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigRefused, match=r"a/\.fetch is a link or holds a folder.* Remove it, or name another folder"):
        run(hub, tmp_path / "a")
    assert hub.requests == [] and {path.name for path in (tmp_path / "a").iterdir()} == {".fetch"}
