"""A repository into a folder, from hubs that answer well and badly."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused, HubFailed
from launcher.weights.fetch import FetchProgress, fetch, open_client, refuse_id, refuse_offline
from launcher.weights.manifest import HubKind, WeightsManifest, read_manifest
from tests.launcher.weights.conftest import SHARDS
from tests.launcher.weights.hub_server import COMMIT, LATER_COMMIT, NAME, Hub
from trainer.contract.weight_files import MANIFEST_FILE, fetched_revision

KINDS: tuple[HubKind, ...] = ("hub", "modelscope")
WANTED = {
    *(
        "README.md",
        "LICENSE",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ),
    *("chat_template.jinja", "model.safetensors.index.json", "empty.txt", *SHARDS),
}
TOKEN = "hf_canary4711"


class Watch:
    """What a fetch reports, and how long it would wait."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.begun: list[tuple[str, int, int]] = []
        self.bytes, self.pauses = 0, list[float]()

    def report(self, count: int) -> None:
        self.bytes += count

    @property
    def progress(self) -> FetchProgress:
        return FetchProgress(say=self.lines.append, begin=lambda *file: self.begun.append(file), report=self.report)


def run(
    hub: Hub, folder: Path, *, kind: HubKind = "hub", revision: str = "", token: str = "", name: str = NAME, watch: Watch | None = None
) -> WeightsManifest:
    watch = watch or Watch()
    variables = {"HF_TOKEN": token, "MODELSCOPE_API_TOKEN": token}
    client = replace(open_client(kind, variables, hub.address), sleep=watch.pauses.append, timeout_s=2)
    return fetch(client, name, folder, revision, watch.progress, lambda: datetime(2026, 11, 30, 12, tzinfo=UTC))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_needed_files_arrive_with_a_manifest(hub: Hub, tmp_path: Path, kind: HubKind) -> None:
    watch = Watch()
    manifest = run(hub, tmp_path / "qwen", kind=kind, watch=watch)
    assert names(tmp_path / "qwen") == WANTED | {MANIFEST_FILE}
    assert all((tmp_path / "qwen" / name).read_bytes() == hub.files[name] for name in WANTED)
    assert watch.bytes == sum(len(hub.files[name]) for name in WANTED)
    assert (manifest.kind, manifest.id, manifest.date) == (kind, NAME, "2026-11-30T12:00:00Z")
    assert {file.path for file in manifest.files} == WANTED and all(len(file.sha256) == 64 for file in manifest.files)
    assert read_manifest(tmp_path / "qwen") == manifest
    assert watch.pauses == []


def test_the_commit_is_pinned_and_recorded(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path / "a").revision == COMMIT == fetched_revision(tmp_path / "a")
    assert all(f"/{NAME}/resolve/{COMMIT}/" in path for path in hub.paths() if "/resolve/" in path)
    hub.requests.clear()
    assert run(hub, tmp_path / "b", revision=LATER_COMMIT).revision == LATER_COMMIT
    assert all(f"/resolve/{LATER_COMMIT}/" in path for path in hub.paths() if "/resolve/" in path)


@pytest.mark.parametrize(
    ("latest", "revision", "recorded"),
    [
        ({"Id": "", "ShortId": COMMIT[:8]}, "", COMMIT),
        ({"Id": LATER_COMMIT, "ShortId": ""}, "", LATER_COMMIT),
        ({"Id": "", "ShortId": "0000"}, "", "master"),
        (None, "v1.0", "v1.0"),
        (None, COMMIT, COMMIT),
    ],
)
def test_the_commit_of_modelscope_is_found_where_it_is_given(
    hub: Hub, tmp_path: Path, latest: object, revision: str, recorded: str
) -> None:
    hub.latest = latest
    assert run(hub, tmp_path / "a", kind="modelscope", revision=revision).revision == recorded
    assert all(f"Revision={COMMIT}" in path for path in hub.paths() if "FilePath" in path), "each file at the commit that changed it last"


def test_all_pages_of_a_list_are_read_from_the_mirror(hub: Hub, tmp_path: Path) -> None:
    hub.page = 3
    assert {file.path for file in run(hub, tmp_path / "a").files} == WANTED
    assert sum("cursor=" in path for path in hub.paths()) >= 5


def test_pickled_weights_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: content for name, content in hub.files.items() if "safetensors" not in name}
    hub.files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode()
    run(hub, tmp_path / "a")
    assert {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"} <= names(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------- half answers


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_ends_early_is_continued(hub: Hub, tmp_path: Path, kind: HubKind) -> None:
    watch = Watch()
    hub.faults = {SHARDS[0]: [("half", 0.3), ("half", 0.6), "drop"]}
    run(hub, tmp_path / "a", kind=kind, watch=watch)
    asked = [headers.get("Range") for headers in hub.downloads(SHARDS[0])]
    size = len(hub.files[SHARDS[0]])
    assert asked[0] is None and asked[1] == f"bytes={int(size * 0.3)}-" and asked[-1] == f"bytes={int(size * 0.6)}-"
    assert (tmp_path / "a" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert watch.bytes == sum(len(hub.files[name]) for name in WANTED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_answers_half_loses_nothing(hub: Hub, tmp_path: Path, kind: HubKind) -> None:
    """It gives up with clear words; the next call asks for the rest, of the same commit."""
    folder, half = tmp_path / "a", int(len(hub.files[SHARDS[1]]) * 0.5)
    hub.faults = {SHARDS[1]: [("half", 0.5)] * 20}
    with pytest.raises(
        HubFailed, match=rf"sent {half:,} of the .* bytes of {SHARDS[1]} and then no more.*They are kept: run the same command again"
    ):
        run(hub, folder, kind=kind)
    assert (folder / SHARDS[0]).is_file() and not (folder / SHARDS[1]).exists() and not (folder / MANIFEST_FILE).exists()
    hub.faults, hub.requests, hub.commit = {}, [], LATER_COMMIT
    watch = Watch()
    assert run(hub, folder, kind=kind, watch=watch).revision in (COMMIT, "master")
    assert [headers.get("Range") for headers in hub.downloads("safetensors")] == [f"bytes={half}-"], "only the rest of the second file"
    assert not [path for path in hub.paths() if "/api/models" in path or "/repo/files" in path], "the commit of the first call"
    assert watch.begun == [(SHARDS[1], len(hub.files[SHARDS[1]]), half)]
    assert names(folder) == WANTED | {MANIFEST_FILE}


def test_a_server_without_ranges_sends_all_again(hub: Hub, tmp_path: Path) -> None:
    watch = Watch()
    hub.faults = {SHARDS[0]: [("half", 0.4), ("no range",)]}
    run(hub, tmp_path / "a", watch=watch)
    assert (tmp_path / "a" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert watch.bytes == sum(len(hub.files[name]) for name in WANTED)


def test_a_part_of_another_content_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    """ETag changes between two attempts: If-Range makes the server send the whole new content, whose hash decides."""
    good = hub.files[SHARDS[0]]
    hub.files[SHARDS[0]] = bad = bytes(reversed(good))
    hub.listed[SHARDS[0]] = {"lfs": {"oid": hashlib.sha256(good).hexdigest(), "size": len(good), "pointerSize": 135}}
    hub.faults = {SHARDS[0]: [("half", 0.5)] * 8}
    with pytest.raises(HubFailed):
        run(hub, tmp_path / "a")
    part = next((tmp_path / "a" / ".fetch").glob("*.part"))
    assert part.read_bytes() == bad[: len(bad) // 2]
    hub.files[SHARDS[0]], hub.faults = good, {}
    run(hub, tmp_path / "a")
    assert (tmp_path / "a" / SHARDS[0]).read_bytes() == good


def test_another_size_than_listed_is_refused_and_the_rest_kept(hub: Hub, tmp_path: Path) -> None:
    longer = hub.files[SHARDS[0]] + b"more"
    hub.faults = {SHARDS[0]: [("half", 0.5), ("changed", longer)]}
    with pytest.raises(
        HubFailed, match=rf"sends {len(longer):,} bytes for {SHARDS[0]}, but lists {len(longer) - 4:,}. What is here is kept"
    ):
        run(hub, tmp_path / "a")
    assert (tmp_path / "a" / "config.json").is_file()
    run(hub, tmp_path / "a")
    assert names(tmp_path / "a") == WANTED | {MANIFEST_FILE}


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_wrong_hash_is_tried_once_more_and_then_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """Also for a small file, of which the Hugging Face hub gives only git's object id."""
    good = hub.files[name]
    wrong = good[:-1] + b"?"
    hub.faults = {name: [("changed", wrong)]}
    run(hub, tmp_path / "a")
    assert (tmp_path / "a" / name).read_bytes() == good
    hub.faults = {name: [("changed", wrong)] * 2}
    with pytest.raises(HubFailed, match=f"{name} arrived 2 times with another content than the hub lists"):
        run(hub, tmp_path / "b")
    assert not (tmp_path / "b" / name).exists() and not list((tmp_path / "b" / ".fetch").glob(f"*{name}.part"))


# ------------------------------------------------------------------------------------------------------------ bad answers


def test_errors_that_pass_are_retried_with_pauses(hub: Hub, tmp_path: Path) -> None:
    watch = Watch()
    hub.faults = {"list": [(500, ""), (429, "", {"Retry-After": "7"}), "drop"], SHARDS[0]: [(503, ""), (502, "")]}
    run(hub, tmp_path / "a", watch=watch)
    assert watch.pauses == [1.0, 7.0, 4.0, 1.0, 2.0]


def test_a_hub_that_stays_broken_is_given_up(hub: Hub, tmp_path: Path) -> None:
    watch = Watch()
    hub.faults = {"list": [(500, "")] * 6}
    with pytest.raises(HubFailed, match=r"answered 500 Internal Server Error for .*, 6 times. Run the command again later"):
        run(hub, tmp_path / "a", watch=watch)
    assert watch.pauses == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert not (tmp_path / "a").exists(), "nothing was written, so nothing is left"


@pytest.mark.parametrize(
    ("kind", "fault", "token", "said"),
    [
        ("hub", (401, "GatedRepo"), "", "is gated .401.: accept its terms on the model's page; no token was sent: export HF_TOKEN"),
        ("hub", (403, "GatedRepo"), TOKEN, "is gated .403.: accept its terms on the model's page; the token was not accepted for it"),
        ("hub", (401, "RepoNotFound"), "", "is not public, or does not exist .401.; no token was sent: export HF_TOKEN"),
        ("hub", (404, "RepoNotFound"), TOKEN, "does not exist there .404.: check the id"),
        ("hub", (404, "RevisionNotFound"), "", "has no such revision"),
        ("hub", "html", "", "did not answer with JSON .* but with '<html><body>Please log in.*a proxy, a login page"),
        ("hub", ("changed", b'{"error": "x"}'), "", "gives no commit for"),
        ("modelscope", (403, ""), "", "no token was sent: export MODELSCOPE_API_TOKEN"),
        ("modelscope", "html", "", "did not answer with JSON"),
        ("modelscope", ("changed", b"[1]"), "", "could not be listed: the answer has an unknown form"),
    ],
)
def test_a_bad_answer_says_what_to_do(hub: Hub, tmp_path: Path, kind: HubKind, fault: object, token: str, said: str) -> None:
    hub.faults = {"list": [fault]}
    with pytest.raises(HubFailed, match=said) as found:
        run(hub, tmp_path / "a", kind=kind, token=token)
    assert TOKEN not in str(found.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_ids_and_revisions(hub: Hub, tmp_path: Path, kind: HubKind) -> None:
    with pytest.raises(HubFailed, match=r"does not exist"):
        run(hub, tmp_path / "a", kind=kind, name="Qwen/Gone")
    with pytest.raises(HubFailed, match=r"has no such revision|has no files at revision v9"):
        run(hub, tmp_path / "a", kind=kind, revision="v9")


def test_modelscope_reports_an_error_with_code_200(hub: Hub, tmp_path: Path) -> None:
    hub.code = 403
    with pytest.raises(HubFailed, match="could not be listed: no access"):
        run(hub, tmp_path / "a", kind="modelscope")


def test_html_instead_of_a_file(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {SHARDS[0]: ["html"]}
    with pytest.raises(HubFailed, match=f"for {SHARDS[0]}, of type text/html: a login page or a proxy's, but lists"):
        run(hub, tmp_path / "a")


def test_a_file_that_the_index_names_and_the_hub_lacks(hub: Hub, tmp_path: Path) -> None:
    del hub.files[SHARDS[1]]
    with pytest.raises(HubFailed, match=f"is not whole on the hub: model.safetensors.index.json names {SHARDS[1]}"):
        run(hub, tmp_path / "a")


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json", "..\\x.json", "a//x.json", "x\n.json", "./x.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_leaves_the_folder(hub: Hub, tmp_path: Path, kind: HubKind, name: str) -> None:
    hub.files[name] = b"{}"
    with pytest.raises(HubFailed, match="leaves the folder or is no plain name: nothing was written"):
        run(hub, tmp_path / "a", kind=kind)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, storage: Hub, tmp_path: Path, kind: HubKind) -> None:
    watch = Watch()
    run(hub, tmp_path / "a", kind=kind, token=TOKEN, watch=watch)
    assert all(headers.get("Authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.requests)
    assert {path.split("?")[0] for path in storage.paths()} == {f"/blobs/{name}" for name in SHARDS}
    assert not [headers for _, _, headers in storage.requests if TOKEN in str(headers)]
    assert TOKEN not in (tmp_path / "a" / MANIFEST_FILE).read_text() + "".join(watch.lines)


def test_a_redirected_file_is_continued_too(hub: Hub, storage: Hub, tmp_path: Path) -> None:
    storage.faults = {SHARDS[0]: [("half", 0.5)]}
    run(hub, tmp_path / "a", token=TOKEN)
    assert storage.downloads(SHARDS[0])[1]["Range"] == f"bytes={len(hub.files[SHARDS[0]]) // 2}-"


@pytest.mark.parametrize("address", ["ftp://hub", "hub.example", "https://ann:pw@hub.example", "file:///etc", "https://", "https://a b"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigRefused, match="must be https://HOST without user and password") as found:
        open_client("hub", {}, address)
    assert "pw" not in str(found.value).replace("password", "")


def test_the_callers_variables() -> None:
    assert open_client("hub", {}).endpoint == "https://huggingface.co"
    assert open_client("hub", {"HF_ENDPOINT": "https://hf-mirror.com/"}).endpoint == "https://hf-mirror.com"
    assert open_client("modelscope", {}).endpoint == "https://www.modelscope.cn"
    assert open_client("modelscope", {"MODELSCOPE_DOMAIN": "www.modelscope.ai"}).endpoint == "https://www.modelscope.ai"
    assert open_client("hub", {"HF_ENDPOINT": "https://a.example"}, "https://b.example").endpoint == "https://b.example"
    assert TOKEN not in repr(open_client("hub", {"HF_TOKEN": TOKEN}))
    with pytest.raises(ConfigRefused, match="HF_HUB_OFFLINE=1 forbids the network"):
        refuse_offline("hub", {"HF_HUB_OFFLINE": "1"})
    refuse_offline("modelscope", {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/", "a/b?x=1", "a/b c", "/a/b"])
def test_ids(name: str) -> None:
    with pytest.raises(HubFailed, match="is no id of a repository"):
        refuse_id(name)
