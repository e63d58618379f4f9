"""OmniLMM-3B and 12B compared with their published code: the tensors in tests/golden, and the names in the published files."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from tests.trainer.models.conftest import Made, model_spec, read_model, talk
from tests.trainer.models.openbmb.test_sentencepiece import make_pieces, write
from trainer.checkpoint.checkpoint import require_whole
from trainer.contract import InputRefused
from trainer.contract.weight_files import hash_weights
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import MARK, Sample
from trainer.models.openbmb.omnilmm import OmniLMMConfig, OmniLMMForCausalLM
from trainer.models.openbmb.omnilmm_3b import MiniCPMV, MiniCPMVConfig
from trainer.models.openbmb.published import get_frame, put_images
from trainer.models.openbmb.query_resampler import QueryResampler
from trainer.models.registry import find_family
from trainer.models.weight import round_weights

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "patch_size": 4, "positions": 3, "num_hidden_layers": 2}
TEXT = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "image_size": 20, "tower": TOWER}
FRAME = {"image_start_token_id": 91, "image_token_id": 90, "image_end_token_id": 92}
UNKNOWN = {"image_token_id": 0}  # the image token of the 3B
SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
# two_turns: for the 3B a row with an image in each turn; for the 12B two rows, with an image in the first or second turn, because its
# published code keeps only the last image of a row.
CASES = ("one_image", "two_turns", "text_alone")
WHOLE = "two_turns"  # the case with complete gradients; the others have every 101st element and the norm
STEP = 101
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Our model with the size of the tiny instance, and the tensors of the published code."""
    if name == "omnilmm_3b":
        model: Any = MiniCPMV(MiniCPMVConfig(**TEXT, **MORE, **{**FRAME, **UNKNOWN}, **SCALES, query_num=4))
    else:
        model = OmniLMMForCausalLM(OmniLMMConfig(**TEXT, **MORE, **FRAME, num_query=4))
    tensors = load_file(GOLDEN / name / "tiny.safetensors")
    weights = {key.removeprefix("weight/"): value.float() for key, value in tensors.items() if key.startswith("weight/")}
    model.load_state_dict(weights)  # strict: no name is missing or unexpected
    return model.eval(), tensors


@pytest.fixture(scope="module", params=["omnilmm_3b", "omnilmm_12b"])
def golden(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    return make(request.param)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_those_of_the_published_code(case: str, golden: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    model, tensors = golden
    given = {key: tensors[f"{case}/{key}"] for key in ("input_ids", "labels", "pixel_values") if f"{case}/{key}" in tensors}
    model.zero_grad()
    made = model(**given)
    assert torch.allclose(made.logits, tensors[f"{case}/logits"], **CLOSE)
    assert torch.allclose(made.loss, tensors[f"{case}/loss"], **CLOSE)
    made.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    wanted = {key.removeprefix(f"{case}/gradient/"): value for key, value in tensors.items() if key.startswith(f"{case}/gradient/")}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient if case == WHOLE else gradient.flatten()[::STEP], wanted[name], **CLOSE), name
        assert torch.allclose(torch.linalg.vector_norm(gradient), tensors[f"{case}/norm/{name}"], **CLOSE), name


def test_two_rows_of_a_batch_equal_each_alone(golden: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    """Images are assigned to the rows in order."""
    model, tensors = golden
    cases = [case for case in CASES if len(tensors[f"{case}/input_ids"]) == 1]
    ids = [tensors[f"{case}/input_ids"] for case in cases]
    width = max(row.shape[1] for row in ids)
    batch = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=0) for row in ids])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in ids])
    pictures = torch.cat([tensors[f"{case}/pixel_values"] for case in cases if f"{case}/pixel_values" in tensors])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        made = model(input_ids=batch, attention_mask=mask, position_ids=positions, pixel_values=pictures).logits
    for case, row, own in zip(cases, made, mask, strict=True):
        assert torch.allclose(row[own.bool()], tensors[f"{case}/logits"][0], **CLOSE), case


def test_a_resampler_with_several_heads_equals_the_published_one() -> None:
    """Four heads; the tiny models have one, because the width of a head is 128 in the published code."""
    tensors = load_file(GOLDEN / "omnilmm_3b" / "tiny.safetensors")
    part = {key.removeprefix("resampler/"): value for key, value in tensors.items() if key.startswith("resampler/")}
    ours = QueryResampler(width=32, source=24, queries=9, heads=4)
    fixed = ours.pos_embed.clone()
    ours.load_state_dict({key.removeprefix("weight/"): value for key, value in part.items() if key.startswith("weight/")})
    assert torch.allclose(fixed, ours.pos_embed, rtol=0, atol=1e-6), "positions of a random start"
    patches = part["input"].clone().requires_grad_()
    made = ours(patches)
    (made * part["upstream"]).sum().backward()
    assert torch.allclose(made, part["output"], **CLOSE)
    assert torch.allclose(patches.grad, part["input_gradient"], **CLOSE)  # type: ignore[arg-type]
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, part[f"gradient/{name}"], **CLOSE), name  # type: ignore[arg-type]


def test_the_scales_of_minicpm_equal_those_of_granite() -> None:
    """transformers' Granite with MiniCPM's values for its four multipliers gives the logits of MiniCPM's own code for a text."""
    tensors = load_file(GOLDEN / "omnilmm_3b" / "tiny.safetensors")
    sizes = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    residual = SCALES["scale_depth"] / TEXT["num_hidden_layers"] ** 0.5
    width = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    scales = {"embedding_multiplier": SCALES["scale_emb"], "residual_multiplier": residual, "attention_multiplier": width**-0.5}
    granite = GraniteForCausalLM(GraniteConfig(**sizes, **scales, logits_scaling=TEXT["hidden_size"] / SCALES["dim_model_base"])).eval()
    granite.load_state_dict({key.removeprefix("weight/llm."): t.float() for key, t in tensors.items() if key.startswith("weight/llm.")})
    ids, labels = tensors["text_alone/input_ids"], tensors["text_alone/labels"]
    made = granite(input_ids=ids, labels=labels)
    assert torch.allclose(made.logits, tensors["text_alone/logits"], **CLOSE)
    assert torch.allclose(made.loss, tensors["text_alone/loss"], **CLOSE)


# ------------------------------------------------------------------------------------------------------ the published files


@pytest.mark.parametrize("name", ["omnilmm_3b", "omnilmm_12b"])
def test_the_names_equal_those_of_the_published_files(name: str) -> None:
    """No tensor is missing or unexpected."""
    spec = model_spec(name)
    with torch.device("meta"):
        ours = find_family(spec.family).create(spec).state_dict()
    assert sorted(ours) == (GOLDEN / name / "keys.txt").read_text(encoding="utf-8").split()


def test_the_3b_has_the_bytes_of_the_published_files() -> None:
    """metadata.total_size of the published index, bfloat16."""
    spec = model_spec("omnilmm_3b")
    with torch.device("meta"):
        ours = find_family(spec.family).create(spec).state_dict()
    assert 2 * sum(tensor.numel() for tensor in ours.values()) == 6_869_931_584
    fixed = ours["resampler.pos_embed"].numel()
    assert read_model("omnilmm_3b").parameters.total == 6_869_931_584 // 2 - fixed


def test_the_tower_with_another_resolution() -> None:
    """For an image with another side than that of the config the positions are interpolated."""
    spec = model_spec("tiny_omnilmm_12b")
    sizes = {**spec.architecture["vision"], "image_size": 48}
    model = find_family(spec.family).create(replace(spec, architecture={**spec.architecture, "vision": sizes}))
    assert model.model.vision_tower(torch.randn(2, 3, 48, 48)).shape == (2, 36, 96)


# ----------------------------------------------------------------------------------------------------- files, and bad input


@pytest.fixture(params=["tiny_omnilmm_3b", "tiny_omnilmm_12b"])
def made(request: pytest.FixtureRequest, make_tiny: Any) -> Made:
    found: Made = make_tiny(request.param)
    return found


def as_published(made: Made, folder: Path, *, pickled: bool = False) -> dict[str, Tensor]:
    """A copy in the published format: two files, and of the fields that we add only the numbers of the tower."""
    shutil.copytree(made.folder, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in FRAME}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    stem, kind = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(weights)
    parts = {f"{stem}-0000{place}-of-00002.{kind}": names[place - 1 :: 2] for place in (1, 2)}
    for file, own in parts.items():
        tensors = {name: weights[name] for name in own}
        torch.save(tensors, folder / file) if pickled else save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return weights


@pytest.mark.parametrize("pickled", [False, True])
def test_the_published_layout_is_read_and_written_again(pickled: bool, made: Made, tmp_path: Path) -> None:
    weights = as_published(made, tmp_path / "published", pickled=pickled)
    require_whole(tmp_path / "published", "model.source.path")
    loaded: Any = made.family.load(tmp_path / "published", made.spec.model, torch.float32)
    assert made.family.load_processor(tmp_path / "published", made.spec.model).span((9, 9), 0) == made.processor.span((9, 9), 0)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    assert hash_weights(tmp_path / "published") == hash_weights(tmp_path / "published")


@pytest.mark.parametrize("key", FRAME)
def test_each_id_is_compared_with_the_tokenizer(key: str, made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 7}), encoding="utf-8")
    for open_part in (made.family.load_processor, lambda folder, model: made.family.load(folder, model, torch.float32)):
        with pytest.raises(InputRefused, match=rf"the tokenizer has '.*' as {config[key]}, the model as 7\n"):
            open_part(tmp_path, made.spec.model)


def test_a_checkpoint_with_another_number_of_queries_is_refused(made: Made, tmp_path: Path) -> None:
    """The plan used the number in conf/model."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    key = next(name for name in ("query_num", "num_query") if name in config)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 9}), encoding="utf-8")
    with pytest.raises(InputRefused, match=r"options\.num_query: 16, the checkpoint has 9"):
        made.family.load(tmp_path, made.spec.model, torch.float32)


def test_a_published_tokenizer_model_is_enough(make_tiny: Any, tmp_path: Path) -> None:
    """As in OpenBMB/MiniCPM-V: no tokenizer.json, and a tokenizer class that is code in the repository."""
    made = make_tiny("tiny_omnilmm_3b")
    as_published(made, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, make_pieces(50, "<image>", "</image>"))
    known = {str(place): {"content": token, "special": True} for place, token in enumerate(("<unk>", "<s>", "</s>", "<image>", "</image>"))}
    own = {"tokenizer_class": "LlamaTokenizerWrapper", "auto_map": {"AutoTokenizer": ["modeling_minicpmv.LlamaTokenizerWrapper", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**own, "added_tokens_decoder": known}), encoding="utf-8")
    loaded: Any = made.family.load(tmp_path, made.spec.model, torch.float32)
    assert (loaded.config.image_start_token_id, loaded.config.image_end_token_id) == (3, 4)
    assert list(made.family.load_processor(tmp_path, made.spec.model).span((9, 9), 0)) == [3, *[0] * 16, 4]


def test_a_truncated_pickled_file_is_refused(made: Made, tmp_path: Path) -> None:
    as_published(made, tmp_path, pickled=True)
    file = tmp_path / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputRefused, match="is not a file of torch, or is truncated"):
        require_whole(tmp_path, "model.source.path")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("payload"),))


def test_code_in_a_weight_file_is_never_run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_published(made, tmp_path / "published", pickled=True)
    torch.save({"lm_head.weight": Payload()}, tmp_path / "published" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputRefused, match="has a weight file that contains code, which is never run"):
        made.family.load(tmp_path / "published", made.spec.model, torch.float32)
    assert not (tmp_path / "payload").exists()


def test_another_revision_is_refused_with_a_list(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("resampler.proj"))
    weights[f"{name}_in"] = weights.pop(name)
    query = next(name for name in weights if name.endswith("resampler.query"))
    weights[query] = weights[query][:5].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRefused) as caught:
        made.family.load(tmp_path, made.spec.model, torch.float32)
    assert f"1 missing: {name}\n" in str(caught.value) and f"1 unexpected: {name}_in\n" in str(caught.value)
    assert f"1 with another shape: {query}\n" in str(caught.value)


def test_a_later_minicpm_v_is_refused(make_tiny: Any, tmp_path: Path) -> None:
    """It has the same model type and the same names of tensors."""
    made = make_tiny("tiny_omnilmm_3b")
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "slice_mode": True}), encoding="utf-8")
    with pytest.raises(InputRefused, match="is a MiniCPM-V 2 or later, which divides images into slices"):
        made.family.load(tmp_path, made.spec.model, torch.float32)


def test_image_tokens_without_features_are_refused(golden: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    model, tensors = golden
    with pytest.raises(ValueError, match="4 image tokens for 8 image features"):
        model(input_ids=tensors["one_image/input_ids"], pixel_values=torch.zeros(2, 3, 20, 20))


def test_special_tokens_in_a_text_are_ordinary_words(made: Made, samples: tuple[Sample, ...]) -> None:
    """Before the image, in an answer, and in a text without an image: none changes the position of an image."""
    alone = samples[0]
    marks = made.processor.tokenizer.convert_ids_to_tokens([made.model.config.image_start_token_id, made.model.config.image_end_token_id])
    for mark in (mark for mark in marks if mark != MARK):  # this one is counted by the data
        first, answer, *rest = alone.messages
        noted = (replace(first, content=f"{mark}{mark} {first.content}"), replace(answer, content=f"It is {mark}."), *rest)
        batch = collate([replace(alone, messages=noted), talk((f"What is {mark}?", f"{mark * 70}"), row=9)], made.processor, made.spec)
        ids, width = batch["input_ids"], made.model.config.hidden_size
        frame = get_frame(made.model.config)
        features = torch.ones(1, made.processor.span.tokens, width)
        filled = put_images(torch.zeros(*ids.shape, width), ids, features, frame)[..., 0]
        start = next(place for place in range(ids.shape[1]) if tuple(ids[0, place : place + 18]) == made.processor.span((9, 9), 0))
        assert filled[0].nonzero().flatten().tolist() == [*range(start + 1, start + 17)] and not filled[1].any()
        assert made.model(**batch, use_cache=False).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float16_and_bfloat16(dtype: torch.dtype, golden: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    """Everything in one dtype, as on a P4 in float16: close to the float32 logits, without overflow."""
    model, tensors = golden
    half = round_weights(copy.deepcopy(model), dtype)
    made = half(input_ids=tensors["one_image/input_ids"], pixel_values=tensors["one_image/pixel_values"].to(dtype)).logits
    assert made.dtype == dtype and torch.allclose(made.float(), tensors["one_image/logits"], atol=0.02 if dtype == torch.float16 else 0.2)
