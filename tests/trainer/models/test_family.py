"""For every family: parameter counts, groups, files that transformers opens, and refusals."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.trainer.models.conftest import CONF, OURS, Made, model_spec, read_model
from trainer.contract import InputRefused
from trainer.data.encode import encode_prompt
from trainer.data.rows.sample import Message, Sample
from trainer.models.registry import FAMILIES, find_family
from trainer.models.weight import round_weights
from trainer.stages.group import assign_groups

READY = tuple(sorted(path.stem for path in CONF.glob("*.yaml") if read_model(path.stem).ready))


def test_every_family_has_a_model() -> None:
    assert {read_model(name).family for name in READY} == set(FAMILIES)
    assert len(READY) == 21


@pytest.mark.parametrize("name", READY)
def test_parameter_counts_are_those_of_the_config_file(name: str) -> None:
    """Exact counts on the meta device, in total and by group; the groups are disjoint."""
    wanted, spec = read_model(name).parameters, model_spec(name)
    with torch.device("meta"):
        model = find_family(spec.family).create(spec)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    found = dict.fromkeys(("vision", "projector", "lm", "head", "other"), 0)
    for parameter, group in assign_groups(spec.groups, sizes).items():
        found[group] += sizes[parameter]
    assert wanted.exact and sum(sizes.values()) == wanted.total
    assert found == {group: getattr(wanted, group) for group in found}


def test_a_random_start_initializes_every_matrix(tiny: Made) -> None:
    """transformers does not initialize bare parameters: a projector of zeros would hide every image from the decoder. Positions and class
    tokens, (1, positions, width), are zero in transformers' InternVL."""
    matrices = {
        name: tensor for name, tensor in tiny.model.named_parameters() if tensor.ndim == 2 or (tiny.family.name in OURS and tensor.ndim > 1)
    }
    assert [name for name, tensor in matrices.items() if tensor.std() == 0] == []


def test_a_checkpoint_opens_with_transformers_own_classes(tiny: Made) -> None:
    """Weights, tokenizer and image processor, with the Auto classes, which only read the folder."""
    if tiny.family.name not in ("qwen2_5_omni", *OURS):  # no Auto class opens a thinker; test_reference uses its class
        again = AutoModelForImageTextToText.from_pretrained(tiny.folder, dtype=torch.float32)
        ours = dict(tiny.model.named_parameters())
        assert all(torch.equal(tensor, ours[name]) for name, tensor in again.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    assert tokenizer("A <image> 7")["input_ids"] == tiny.processor.tokenizer("A <image> 7")["input_ids"]
    if (
        tiny.family.name == "minicpm_v_2_6"
    ):  # transformers has no image processor for it; test_minicpm_v compares ours with the published one
        return
    image = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    crop = {"crop_to_patches": True} if tiny.family.name == "internvl" else {}
    made = AutoImageProcessor.from_pretrained(tiny.folder)(images=image, return_tensors="pt", **crop)
    assert all(torch.equal(tensor, made[name]) for name, tensor in tiny.processor.image_features(image).items())


@pytest.mark.skipif(
    find_spec("torchvision") is None, reason="transformers' processors of these families need torchvision for their video processor"
)
def test_transformers_processor_makes_the_same_ids(tiny: Made) -> None:
    real = AutoProcessor.from_pretrained(tiny.folder)
    sizes = ((32, 32), (40, 24), (100, 70), (300, 31))
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "Which?"}]
    text = real.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = real(images=[Image.new("RGB", size) for size in sizes], text=[text], return_tensors="pt")["input_ids"][0].tolist()
    messages = (Message(role="user", content="<image>" * len(sizes) + "Which?"), Message(role="assistant", content="7"))
    sample = Sample(id="1", images=tuple(Path("x") for _ in sizes), messages=messages, file="rows.json", row=1)
    spans = [tiny.processor.span(size, index) for index, size in enumerate(sizes)]
    model = tiny.spec.model
    assert encode_prompt(sample, tiny.processor.tokenizer, model.template, model.image_token, spans, 10_000).input_ids == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_random_start_equals_a_reload(tiny: Made, dtype: torch.dtype) -> None:
    """Dtypes and values of every parameter and buffer are equal; rotary frequencies stay in float32."""
    loaded = tiny.family.load(tiny.folder, tiny.spec.model, dtype)
    torch.manual_seed(0)
    created = round_weights(tiny.family.create(tiny.spec.model), dtype)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(created, kind)()), dict(getattr(loaded, kind)())
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.dtype == dtype for tensor in created.parameters())
    rotary = [tensor.dtype for name, tensor in created.named_buffers() if name.endswith("inv_freq")]
    assert rotary and set(rotary) == {torch.float32}


def test_unused_parameters_of_a_loaded_model(tiny: Made) -> None:
    """`unused` gives the same for a loaded and a created model."""
    assert tiny.family.unused(tiny.family.load(tiny.folder, tiny.spec.model, torch.float32)) == tiny.family.unused(tiny.model)


def test_a_thinker_is_read_from_a_complete_omni_checkpoint(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    """With the published names: thinker., talker. and token2wav., and nested configs."""
    from safetensors.torch import load_file, save_file

    made = make_tiny("tiny_qwen2_5_omni")
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    weights = {f"thinker.{published(name)}": tensor for name, tensor in load_file(made.folder / "model.safetensors").items()}
    others = {"talker.codec_head.weight": torch.zeros(2, 2), "token2wav.code2wav_dit_model.proj_out.weight": torch.zeros(2, 2)}
    save_file({**weights, **others}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    loaded = made.family.load(tmp_path, made.spec.model, torch.float32)
    ours = dict(made.model.named_parameters())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.named_parameters())
    assert made.family.load_processor(tmp_path, made.spec.model).span((40, 24), 0) == made.processor.span((40, 24), 0)


def published(name: str) -> str:
    """The name in a published checkpoint, whatever prefix this version of transformers saves with."""
    plain = name.removeprefix("thinker.")
    for ours, theirs in (("model.visual.", "visual."), ("model.audio_tower.", "audio_tower."), ("model.language_model.", "model.")):
        if plain.startswith(ours):
            return theirs + plain.removeprefix(ours)
    return plain


# ---------------------------------------------------------------------------------------------------------------- refused


def test_another_family_is_refused(tiny: Made, make_tiny: Callable[[str], Made]) -> None:
    other = make_tiny("tiny_llava" if tiny.name != "tiny_llava" else "tiny_internvl")
    for load in (
        lambda: tiny.family.load(other.folder, tiny.spec.model, torch.float32),
        lambda: tiny.family.load_processor(other.folder, tiny.spec.model),
    ):
        with pytest.raises(
            InputRefused,
            match=rf"has the model type {other.family.name}, but {tiny.name} has .*\n    set model=NAME to the checkpoint's model",
        ):
            load()


def test_an_unknown_repository_with_code_is_refused(tiny: Made, tmp_path: Path) -> None:
    config = {"model_type": "ovis9", "auto_map": {"AutoModel": "modeling_ovis.Ovis"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "modeling_ovis.py").write_text("raise SystemExit('run')", encoding="utf-8")
    families = ", ".join(sorted(FAMILIES))
    text = rf"model type ovis9 \(with its own code, which is never run; supported families: {families}\), but {tiny.name} has "
    for load in (
        lambda: tiny.family.load(tmp_path, tiny.spec.model, torch.float32),
        lambda: tiny.family.load(tmp_path, tiny.spec.model, torch.float32, on_meta=True),
        lambda: tiny.family.load_processor(tmp_path, tiny.spec.model),
    ):
        with pytest.raises(InputRefused, match=text):
            load()


def test_another_size_is_refused_with_every_difference(tiny: Made) -> None:
    architecture = tiny.spec.model.architecture
    vision = {**architecture["vision"], "patch_size": 16, "num_hidden_layers": 9}
    text = {**architecture["text"], "num_key_value_heads": 1, "vocab_size": 999}
    wanted = replace(tiny.spec.model, architecture={**architecture, "vision": vision, "text": text})
    with pytest.raises(InputRefused) as caught:
        tiny.family.load(tiny.folder, wanted, torch.float32)
    given, text = architecture, str(caught.value)
    for line in (
        f"model.architecture.vision.patch_size: 16, the checkpoint has {given['vision']['patch_size']}",
        f"model.architecture.vision.num_hidden_layers: 9, the checkpoint has {given['vision']['num_hidden_layers']}",
        f"model.architecture.text.num_key_value_heads: 1, the checkpoint has {given['text']['num_key_value_heads']}",
        "model.architecture.text.vocab_size: 999, the checkpoint has 384",
    ):
        assert line in text
    assert text.count("the checkpoint has") == 4


def test_a_decoder_of_another_kind_is_refused(make_tiny: Callable[[str], Made]) -> None:
    """InternVL 3 and 3.5 have one model type, and decoders that differ."""
    made = make_tiny("tiny_internvl")
    text = {**made.spec.model.architecture["text"], "options": {"model_type": "qwen3"}}
    wanted = replace(made.spec.model, architecture={**made.spec.model.architecture, "text": text})
    with pytest.raises(InputRefused, match=r"model\.architecture\.text\.model_type: qwen3, the checkpoint has qwen2"):
        made.family.load(made.folder, wanted, torch.float32)


def test_a_tokenizer_without_the_image_token_is_refused(tiny: Made) -> None:
    with pytest.raises(InputRefused, match=r"the tokenizer has no token '<picture>'"):
        tiny.family.load_processor(tiny.folder, replace(tiny.spec.model, image_token="<picture>"))


def test_the_tokenizer_of_another_model_is_refused(tiny: Made, tmp_path: Path) -> None:
    """It has another id for the image token: every image would be read as a word."""
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    key = next(key for key in ("image_token_id", "image_token_index", "image_start_token_id") if key in config)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 7}), encoding="utf-8")
    with pytest.raises(InputRefused, match=r"the tokenizer has '.*' as 32\d.*, the model as 7.*\n    use the tokenizer that belongs"):
        tiny.family.load_processor(tmp_path, tiny.spec.model)


def test_a_vocabulary_too_small_for_the_tokenizer(tiny: Made) -> None:
    architecture: dict[str, Any] = tiny.spec.model.architecture
    small = {**architecture, "text": {**architecture["text"], "vocab_size": 300}}
    with pytest.raises(InputRefused, match="vocab_size: 300 is too small for the tokenizer's"):
        tiny.family.create(replace(tiny.spec.model, architecture=small))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
