"""model.source in a plan: its short forms, the folder that it names, and the model that the folder holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.plan import plan_of
from launcher.config.compose import compose, compose_over
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.weights.source import find_cached, with_weights_folder
from tests.launcher.weights.conftest import SHARDS, write_folder
from tests.launcher.weights.test_fetch import COMMIT, NAME
from trainer.contract.weight_files import MANIFEST_FILE

CONF = Path(__file__).parents[3] / "conf"
QWEN = ("model=qwen2_5_vl_7b", "hardware=h200", "stage=lora")
MANIFEST = f'{{"format": 1, "kind": "modelscope", "endpoint": "x", "id": "{NAME}", "revision": "{COMMIT}", "date": "x", "files": []}}'


def about(plan: Plan, key: str) -> list[str]:
    """What prevents the launch of a plan, of the problems about one key."""
    return [problem.what for problem in plan.verdict.problems if problem.key == key]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "MODELSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMNILAUNCH_MODELS", str(tmp_path / "models"))


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """The folder of a fetch from ModelScope."""
    (tmp_path / "models" / "modelscope" / "Qwen").mkdir(parents=True)
    folder = write_folder(tmp_path / "models" / "modelscope" / NAME)
    (folder / MANIFEST_FILE).write_text(MANIFEST)
    return folder


@pytest.mark.parametrize(
    ("override", "kind", "path"),
    [
        ("model.source.path=/models/q", "path", "/models/q"),
        ("model.source=/models/q", "path", "/models/q"),
        ("model.source=./q", "path", "./q"),
        ("model.source=modelscope", "modelscope", ""),
        ("model.source=random", "random", ""),
        ("model.source.kind=random", "random", ""),
        ("model.source.path='/models/a b'", "path", "/models/a b"),
    ],
)
def test_short_forms(override: str, kind: str, path: str) -> None:
    source = compose([*QWEN, override], CONF).model.source
    assert (source.kind, source.path) == (kind, path)
    later = compose_over(compose(QWEN, CONF), [override], CONF).model.source
    assert (later.kind, later.path) == (kind, path)


def test_a_typed_kind_is_kept() -> None:
    assert compose([*QWEN, "model.source.path=/m", "model.source.kind=modelscope"], CONF).model.source.kind == "modelscope"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.source=hugging", "'hugging' is no source; valid are random, hub, modelscope, path, or a folder: model.source.path=FOLDER"),
        ("model.source=Qwen/Qwen2.5-VL-7B", "a repository of a hub: model.source.id=Qwen/Qwen2.5-VL-7B"),
        ("model.source.kind=ollama", "valid are: hub, modelscope, path, random"),
    ],
)
def test_other_words(override: str, said: str) -> None:
    with pytest.raises(ConfigRefused) as found:
        compose([*QWEN, override], CONF)
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("model.source.path=/m", "model.source.kind=hub"),
            "is set, but model.source.kind=hub reads no folder\n    would pass: model.source.kind=path  or  model.source.path=''",
        ),
        (("model.source=/m", "model.source.endpoint=https://a"), "model.source.kind=path does not use it"),
        (("model.source.endpoint=https://ann:pw@a",), "must be https://HOST, without user and password"),
        (("model.source.endpoint=hf-mirror.com",), "must be https://HOST"),
        (("model.source=modelscope", "model.source.modelscope=''"), "is empty: no repository of Qwen2.5-VL 7B on ModelScope is known"),
    ],
)
def test_contradictions_are_refused(plan_for: Callable[..., Plan], overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigRefused) as found:
        plan_for(*QWEN, *overrides)
    assert said in str(found.value) and ":pw@" not in str(found.value)


# -------------------------------------------------------------------------------------------------------------- modelscope


def test_modelscope_is_planned_and_says_what_to_fetch() -> None:
    plan = plan_of([*QWEN, "model.source=modelscope"], "R")
    (what,) = about(plan, "model.source")
    assert (plan.verdict.ok, plan.verdict.launchable) == (True, False)
    assert f"Next: omnilaunch model fetch {NAME} --from modelscope, and then the same command" in what


def test_modelscope_is_a_folder_for_the_trainer(fetched: Path) -> None:
    plan = plan_of([*QWEN, "model.source=modelscope"], "R")
    assert not about(plan, "model.source")
    assert (plan.spec.model.source.kind, plan.spec.model.source.path) == ("path", str(fetched))
    assert plan.commands[0].environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("shared", "synced"), [("false", True), ("true", False)])
def test_the_fetched_folder_reaches_container_and_nodes(fetched: Path, shared: str, synced: bool) -> None:
    plan = plan_of([*QWEN, "model.source=modelscope", "cluster=example", f"cluster.shared={shared}"], "R")
    assert plan.commands[0].container is not None
    assert any(mount.path == str(fetched) and mount.read_only for mount in plan.commands[0].container.mounts)
    assert (str(fetched) in plan.config.cluster.sync) == synced


def test_a_checkpoint_needs_no_source(fetched: Path) -> None:
    config = compose([*QWEN, "model.source=modelscope", "stage.checkpoint=/run"], CONF)
    assert with_weights_folder(config, {"OMNILAUNCH_MODELS": str(fetched.parents[2])}) == config


# ------------------------------------------------------------------------------------------------------------------ mirror


def test_the_callers_mirror_is_recorded_and_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    plan = plan_of(QWEN, "R")
    assert plan.config.model.source.endpoint == "https://hf-mirror.com"
    assert plan.commands[0].environment["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert plan_of((*QWEN, "model.source.endpoint=https://hub.lan"), "R").commands[0].environment["HF_ENDPOINT"] == "https://hub.lan"
    assert "HF_ENDPOINT" not in plan_of(["model=tiny_llava"], "R").commands[0].environment
    monkeypatch.setenv("HF_ENDPOINT", "https://ann:pw@hub.lan")
    with pytest.raises(ConfigRefused, match="without user and password"):
        plan_of(QWEN, "R")


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (("cluster=example",), True),
        (("cluster=example", "cluster.environment.HF_HOME=/cache"), False),
        (("cluster=example", "model.source=/models/q"), False),
        (("cluster=example", "stage.checkpoint=/run"), False),
        (("cluster.runtime=process",), False),
    ],
)
def test_a_download_in_each_container_is_noted(plan_for: Callable[..., Plan], overrides: tuple[str, ...], noted: bool) -> None:
    notes = [note for note in plan_for(*QWEN, *overrides).verdict.notes if "each container downloads the weights" in note]
    assert bool(notes) == noted
    assert not noted or ("about 17 GB" in notes[0] and f"omnilaunch model fetch {NAME} --to FOLDER" in notes[0])


def test_without_a_mirror_nothing_changes(plan_for: Callable[..., Plan]) -> None:
    assert "HF_ENDPOINT" not in plan_for(*QWEN).commands[0].environment
    assert plan_for(*QWEN).spec.model.source.kind == "hub"


# ------------------------------------------------------------------------------------------------------------------ folder


def test_a_folder_alone_is_enough(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    for words in ([f"model.source.path={folder}"], [f"model.source={folder}"]):
        plan = plan_of(["hardware=h200", "stage=lora", *words], "R")
        assert (plan.config.model.name, plan.config.model.source.kind) == ("qwen2_5_vl_7b", "path")
        assert plan.overrides[0] == "model=qwen2_5_vl_7b"


@pytest.mark.parametrize("key", ["model.source.path", "stage.checkpoint"])
def test_a_folder_of_another_model_is_refused(tmp_path: Path, key: str) -> None:
    folder = write_folder(tmp_path / "a")
    with pytest.raises(ConfigRefused) as found:
        plan_of(["model=qwen2_5_vl_3b", "hardware=h200", "stage=lora", "data=digits", f"{key}={folder}"], "R")
    text = str(found.value)
    assert f"{key}: {folder} holds qwen2_5_vl_7b, not qwen2_5_vl_3b:\n    architecture.text.hidden_size: 2048, the folder has 3584" in text
    assert "would pass: model=qwen2_5_vl_7b" in text


def test_a_folder_that_none_of_ours_fits(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ConfigRefused, match="holds none of the models of conf/model, not qwen2_5_vl_7b"):
        plan_of([*QWEN, f"model.source.path={tmp_path / 'a'}"], "R")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ConfigRefused, match="See: omnilaunch model check"):
        plan_of([*QWEN, f"model.source.path={tmp_path / 'a'}"], "R")


def test_the_files_of_a_folder_say_in_which_dtype_they_are(tmp_path: Path) -> None:
    folder, words = write_folder(tmp_path / "a"), ("model=qwen2_5_vl_7b", "hardware=h200", "stage=lora", "data=digits")
    for more, noted in ((("precision=fp16",), True), ((), False)):
        for key in ("model.source.path", "stage.checkpoint"):
            plan = plan_of([*words, *more, f"{key}={folder}"], "R")
            notes = [note for note in plan.verdict.notes if "65,504" in note]
            assert [note.startswith(f"{folder} is in bfloat16, and is loaded in float16") for note in notes] == [True] * noted
            assert all(f"hardware=cpu {key}={folder} " in note for note in notes)


def test_a_missing_folder_is_planned_for_this_machine_but_not_launched() -> None:
    plan = plan_of([*QWEN, "model.source.path=/models/q"], "R")
    (what,) = about(plan, "model.source.path")
    assert (plan.verdict.ok, plan.verdict.launchable) == (True, False)
    assert f"there is no folder /models/q on this machine. To download the weights: omnilaunch model fetch {NAME} --to /models/q" in what
    assert not about(plan_of([*QWEN, "model.source.path=/models/q", "cluster=example"], "R"), "model.source.path"), "it may be on the nodes"


@pytest.mark.parametrize("where", ["cluster=local", "cluster=example"])
def test_a_folder_that_cannot_be_used_is_looked_into(where: str, tmp_path: Path) -> None:
    """A folder without config.json was planned without a word, and for a cluster with the verdict ok."""
    (tmp_path / "mine").mkdir()
    words = [*QWEN, where, "cluster.delivery.accept_licence=true", f"model.source.path={tmp_path / 'mine'}"]
    (what,) = about(plan_of(words, "R"), "model.source.path")
    assert what == f"{tmp_path / 'mine'} holds no model: it has no config.json. See: omnilaunch model check {tmp_path / 'mine'}"
    (tmp_path / "mine").rmdir()
    write_folder(tmp_path / "mine")
    (tmp_path / "mine" / SHARDS[1]).unlink()
    (tmp_path / "mine" / "tokenizer.json").unlink()
    (what,) = about(plan_of(words, "R"), "model.source.path")
    assert SHARDS[1] in what and "and 1 more problem. See: omnilaunch model check" in what


def test_a_tiny_model_has_nothing_to_download() -> None:
    assert about(plan_of(["model=tiny_llava", "model.source.path=/models/q"], "R"), "model.source.path") == [
        "there is no folder /models/q on this machine"
    ]


def test_the_revision_of_a_fetched_folder(fetched: Path) -> None:
    words = [*QWEN, f"model.source.path={fetched}"]
    assert not about(plan_of([*words, f"model.source.revision={COMMIT}"], "R"), "model.source.revision")
    with pytest.raises(ConfigRefused, match=f"was fetched at {COMMIT}\n    would pass: model.source.revision={COMMIT}"):
        plan_of([*words, "model.source.revision=abc"], "R")


@pytest.mark.parametrize(
    ("kind", "folder", "variables"),
    [
        ("hub", "hf/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/abc", {"HF_HOME": "hf"}),
        ("hub", "c/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/abc", {"HF_HUB_CACHE": "c"}),
        ("modelscope", "ms/models/Qwen/Qwen2___5-VL-7B-Instruct", {"MODELSCOPE_CACHE": "ms"}),
        ("modelscope", ".cache/modelscope/hub/models/Qwen/Qwen2.5-VL-7B-Instruct", {"HOME": ""}),
    ],
)
def test_caches_of_other_tools_are_found(tmp_path: Path, kind: Any, folder: str, variables: dict[str, str]) -> None:
    environ = {"HOME": str(tmp_path), **{name: str(tmp_path / value) for name, value in variables.items()}}
    assert find_cached(kind, NAME, environ) == ""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text("{}")
    assert find_cached(kind, NAME, environ) == str(tmp_path / folder)
