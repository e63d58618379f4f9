"""Folders that are whole, and folders with every kind of damage; and which model a config describes."""

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigRefused
from launcher.weights.folder import check_folder
from launcher.weights.identity import family_of, find_differences, identify, load_models
from launcher.weights.manifest import read_manifest
from tests.launcher.weights.conftest import CONFIG, SHARDS, VISION, published_files, safetensors, write_folder
from tests.launcher.weights.hub_server import Hub
from tests.launcher.weights.test_fetch import run

CONF = Path(__file__).parents[3] / "conf"
MODELS = load_models(CONF)
MANIFEST = b'{"format": 1, "kind": "hub", "endpoint": "", "id": "a/b", "revision": "", "date": "", "files": [{"path": "../../etc/passwd", "size": 1}]}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10219\n"


@pytest.fixture
def models() -> dict[str, Any]:
    """conf/model, with as many parameters for qwen2_5_vl_7b as the small files have."""
    found = deepcopy(MODELS)
    found["qwen2_5_vl_7b"]["parameters"]["total"] = 9000
    return found


def damage(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = change((folder / name).read_bytes() if (folder / name).exists() else b"")
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return apply


def test_a_whole_folder(tmp_path: Path, models: dict[str, Any]) -> None:
    report = check_folder(write_folder(tmp_path / "a"), models)
    assert report.problems == ()
    assert (report.tensors, report.parameters, report.dtypes) == (3, 9000, {"bfloat16": 9000})
    assert report.identity and (report.identity.model, report.identity.family) == ("qwen2_5_vl_7b", "qwen2_5_vl")
    assert report.notes == ("1 file of code (modeling_qwen.py): never run",)


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (damage("config.json", lambda _: None), "has no config.json, so its model is not known"),
        (damage("config.json", lambda text: text[:50]), "config.json is no JSON file"),
        (damage("config.json", lambda _: b"<html>log in</html>"), "config.json is an HTML page. Copy it again"),
        (damage("config.json", lambda _: b"[]"), "config.json holds no JSON object"),
        (damage("tokenizer.json", lambda _: POINTER), "tokenizer.json is a pointer of git LFS (70 bytes), not the content"),
        (damage(SHARDS[0], lambda _: POINTER), f"{SHARDS[0]} is a pointer of git LFS (70 bytes)"),
        (damage(SHARDS[1], lambda _: None), f"1 of 2 weight files missing: {SHARDS[1]}"),
        (damage(SHARDS[0], lambda text: text[:-1]), f"{SHARDS[0]} has 8136 bytes, but its header says 8137"),
        (damage(SHARDS[0], lambda _: b""), f"{SHARDS[0]} is not a safetensors file"),
        (damage(SHARDS[0], lambda _: b"\xff" * 100), f"{SHARDS[0]} is not a safetensors file"),
        (
            damage(SHARDS[0], lambda _: safetensors({"other": ("BF16", [2], b"1234")})),
            "the files that model.safetensors.index.json names lack 1 tensor",
        ),
        (
            damage(SHARDS[0], lambda _: safetensors({"model.embed_tokens.weight": ("BF16", [3], b"1234")})),
            "has 4 bytes, which is not its shape [3]",
        ),
        (damage("model.safetensors.index.json", lambda _: b'{"weight_map": 1}'), "the index of the weights cannot be read"),
        (damage("model.safetensors.index.json", lambda _: b"{}"), "the index of the weights cannot be read"),
        (
            damage("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "../up.safetensors"}}'),
            "1 of 1 weight file missing: up.safetensors",
        ),
        (
            damage("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "/etc/passwd"}}'),
            "the index names passwd, outside of the folder",
        ),
        (damage("omnilaunch.manifest", lambda _: MANIFEST), "the manifest names '../../etc/passwd', outside of the folder"),
        (damage("tokenizer.json", lambda _: None), "no tokenizer: tokenizer.json, or vocab.json with merges.txt"),
        (damage("preprocessor_config.json", lambda _: None), "no image processor: preprocessor_config.json or processor_config.json"),
        (damage("model-00002-of-00002.safetensors.part", lambda _: b"x"), "safetensors.part is an unfinished download"),
        (damage("omnilaunch.manifest", lambda _: b"{"), "the manifest cannot be read"),
        (damage("omnilaunch_state.json", lambda _: b"{}"), "omnilaunch_state.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, models: dict[str, Any], apply: Callable[[Path], None], said: str) -> None:
    folder = write_folder(tmp_path / "a")
    apply(folder)
    problems = check_folder(folder, models).problems
    assert any(said in problem for problem in problems), problems


def test_a_link_that_leads_nowhere(tmp_path: Path, models: dict[str, Any]) -> None:
    """A cache of huggingface_hub that was copied without its blobs."""
    folder = write_folder(tmp_path / "a")
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to("../../blobs/4d7a")
    problems = check_folder(folder, models).problems
    assert (
        problems[0]
        == f"{SHARDS[0]} is a link to ../../blobs/4d7a, which does not exist. Copy the folder with its links followed: cp -rL, rsync -L"
    )
    assert problems[1] == f"1 of 2 weight files missing: {SHARDS[0]}"


def test_missing_tensors_are_found_by_their_number(tmp_path: Path, models: dict[str, Any]) -> None:
    models["qwen2_5_vl_7b"]["parameters"]["total"] = 9200
    assert check_folder(write_folder(tmp_path / "a"), models).problems == (
        "9,000 parameters, and qwen2_5_vl_7b has 9,200: tensors are missing",
    )


def test_hashes_are_those_of_the_manifest(hub: Hub, tmp_path: Path, models: dict[str, Any]) -> None:
    folder = tmp_path / "a"
    run(hub, folder)
    assert check_folder(folder, models, hashes=True).problems == ()
    content = (folder / SHARDS[0]).read_bytes()
    (folder / SHARDS[0]).write_bytes(content[:-1] + b"?")
    assert check_folder(folder, models).problems == (), "its size and header are right"
    (problem,) = check_folder(folder, models, hashes=True).problems
    manifest = read_manifest(folder)
    listed = next(file.sha256 for file in manifest.files if file.path == SHARDS[0]) if manifest else ""
    assert problem.startswith(f"{SHARDS[0]} has the SHA-256 ") and problem.endswith(f"and {listed} is in the manifest")
    (folder / SHARDS[0]).write_bytes(content)
    (folder / "README.md").unlink()
    assert check_folder(folder, models).problems == ("README.md is missing; the manifest names it",)
    assert "no manifest" in check_folder(write_folder(tmp_path / "b"), models, hashes=True).problems[0]


def test_no_folder() -> None:
    with pytest.raises(ConfigRefused, match="there is no such folder"):
        check_folder(Path("/nowhere/at/all"), MODELS)


def test_an_adapter_is_of_the_model_of_its_base(tmp_path: Path, models: dict[str, Any]) -> None:
    base, folder = write_folder(tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"x.lora_A.weight": ("F32", [2], struct.pack("<2f", 1, 2))}))
    report = check_folder(folder, models)
    assert (report.problems, report.adapter, report.identity and report.identity.model) == ((), True, "qwen2_5_vl_7b")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    assert "the base model of the adapter, /gone/base, is not on this machine. Copy it there" in check_folder(folder, models).problems


# --------------------------------------------------------------------------------------------------------------- identity

LLAVA = {
    **{"model_type": "llava", "image_token_index": 32000, "text_config": {"model_type": "llama", "vocab_size": 32064}},
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096},
        **{"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
    },
}
QWEN2 = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
OMNI = {"text_config": {**QWEN2, "vocab_size": 152064}, "vision_config": {**VISION, "out_hidden_size": 3584}}
MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


# The forms in which the models are published: flat, nested, or with the defaults of a class left out.
@pytest.mark.parametrize(
    ("content", "model"),
    [
        (CONFIG, "qwen2_5_vl_7b"),
        ({"model_type": "qwen2_5_vl", "text_config": {**QWEN2, "vocab_size": 152064}, "vision_config": VISION}, "qwen2_5_vl_7b"),
        ({**CONFIG, "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008, "num_attention_heads": 16,
          "num_key_value_heads": 2, "vocab_size": 151936, "vision_config": {**VISION, "out_hidden_size": 2048}}, "qwen2_5_vl_3b"),
        (LLAVA, "llava_1_5_7b"),
        ({"model_type": "qwen2_5_omni", "thinker_config": OMNI, "talker_config": {"hidden_size": 896}}, "qwen2_5_omni_7b"),
        ({"model_type": "minicpmv", "slice_mode": True, **QWEN2, "vocab_size": 151666, "vision_config": SIGLIP}, "minicpm_v_2_6"),
        ({"model_type": "minicpmo", **QWEN2, "vocab_size": 151700, "vision_config": SIGLIP}, "minicpm_o_2_6"),
        ({"model_type": "minicpmv", "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40, "vocab_size": 122753}, "omnilmm_3b"),
        ({"model_type": "omnilmm", **MISTRAL, "vocab_size": 32002, "num_query": 64}, "omnilmm_12b"),
        ({"model_type": "internvl", "text_config": {**QWEN2, "model_type": "qwen2", "vocab_size": 151674},
          "vision_config": {"hidden_size": 1024, "image_size": [448, 448], "patch_size": [14, 14]}}, "internvl3_8b"),
    ],
)  # fmt: skip
def test_published_configs_are_recognised(tmp_path: Path, content: dict[str, Any], model: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert identify(tmp_path, MODELS).model == model


@pytest.mark.parametrize(
    ("content", "family", "nearest", "difference"),
    [
        ({**CONFIG, "num_hidden_layers": 80}, "qwen2_5_vl", "qwen2_5_vl_7b", "architecture.text.num_hidden_layers: 28, the folder has 80"),
        ({**LLAVA, "text_config": {"model_type": "llama", "hidden_size": 5120, "vocab_size": 32064}}, "llava", "llava_1_5_7b",
         "architecture.text.hidden_size: 4096, the folder has 5120"),
        ({"model_type": "qwen2_vl", "hidden_size": 3584}, "", "", ""),
        ({}, "", "", ""),
        ({"model_type": ["llava"], "text_config": 5}, "", "", ""),
    ],
)  # fmt: skip
def test_none_of_ours_says_what_is_nearest(tmp_path: Path, content: dict[str, Any], family: str, nearest: str, difference: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = identify(tmp_path, MODELS)
    assert (found.model, found.family, found.nearest) == ("", family, nearest)
    assert difference == (found.differences[0] if found.differences else "")


@pytest.mark.parametrize("part", [5, "x", [1], None, {"hidden_size": {"a": 1}}, {"hidden_size": [[1], [1]]}])
def test_configs_of_any_form_are_compared(tmp_path: Path, part: object) -> None:
    """A folder that somebody else made is data: nothing in it ends the program."""
    content = {"model_type": "qwen2_5_omni", "thinker_config": part, "vision_config": part, "text_config": part}
    (tmp_path / "config.json").write_text(json.dumps(content))
    identify(tmp_path, MODELS)
    assert check_folder(tmp_path, MODELS).problems


def test_another_family_is_a_difference() -> None:
    assert find_differences(MODELS["tiny_llava"], CONFIG) == ["family: llava, the folder has model_type qwen2_5_vl (family qwen2_5_vl)"]
    assert find_differences(MODELS["tiny_llava"], {}) == ["family: llava, the folder has model_type none"]


@pytest.mark.slow
def test_every_tiny_model_that_the_trainer_writes_is_recognised(tmp_path: Path) -> None:
    """Ties the table of model types to the trainer's families."""
    from trainer.models.registry import FAMILIES
    from trainer.models.tiny import write_checkpoint

    tiny = {name: model for name, model in MODELS.items() if name.startswith("tiny_")}
    assert {model["family"] for model in tiny.values()} == set(FAMILIES)
    for name, model in tiny.items():
        write_checkpoint(CONF / "model" / f"{name}.yaml", tmp_path / name)
        report = check_folder(tmp_path / name, MODELS)
        assert (report.problems, report.identity and report.identity.model) == ((), name)
        assert report.parameters >= model["parameters"]["total"]
        assert family_of(json.loads((tmp_path / name / "config.json").read_text())) == model["family"]


def test_the_published_files_of_these_tests_are_what_they_say() -> None:
    assert sum(len(content) for name, content in published_files().items() if name in SHARDS) > 18000
