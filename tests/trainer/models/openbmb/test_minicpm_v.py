"""MiniCPM-V 2.6 compared with the outputs of its published code for a tiny instance (tests/golden/minicpm_v_2_6), and its files."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from tests.trainer.conftest import make_spec
from tests.trainer.models.conftest import Made, model_spec, talk, to_arguments
from trainer.contract import InputRefused, ModelSpec, Source, TrainSpec
from trainer.data.batch.collate import collate, collate_prompts
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Message, Sample
from trainer.models.family import Limit
from trainer.models.openbmb.cross_attention import CrossAttention
from trainer.models.openbmb.minicpm_network import encode_patches, patch_positions, vision_config
from trainer.models.openbmb.resampler import Resampler
from trainer.models.openbmb.slicer import Slicer
from trainer.models.registry import FAMILIES, find_family

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "minicpm_v_2_6"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
BOUND = 1e-5
Tensors = dict[str, torch.Tensor]


def golden_spec() -> ModelSpec:
    config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return replace(
        model_spec("minicpm_v_2_6"),
        source=Source(kind="path", path=str(GOLDEN)),
        architecture={"vision": vision, "text": {key: config[key] for key in sizes}, "audio": {}, "options": {"num_query": 4}},
    )


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Made:
    spec = replace(make_spec(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data")), model=golden_spec())
    spec = replace(spec, data=replace(spec.data, max_length=1024))
    family = find_family("minicpm_v_2_6")
    model = family.load(GOLDEN, spec.model, torch.float32).eval()
    return Made(name="golden", family=family, model=model, processor=family.load_processor(GOLDEN, spec.model), spec=spec, folder=GOLDEN)


@pytest.fixture(scope="module")
def published() -> Tensors:
    return load_file(GOLDEN / "cases.safetensors")


def sample_of(case: str) -> Sample:
    messages = tuple(Message(role=role, content=content) for role, content in CASES[case]["turns"])
    return Sample(
        id="1", images=tuple(GOLDEN / f"{name}.png" for name in CASES[case]["images"]), messages=messages, file="rows.json", row=1
    )


def part(tensors: Tensors, case: str) -> Tensors:
    mark = case.replace(" ", "_") + "/"
    return {key.removeprefix(mark): value for key, value in tensors.items() if key.startswith(mark)}


# -------------------------------------------------------------------------------------------------------- the published code


def test_the_cases() -> None:
    assert list(CASES) == ["one small image", "one sliced image", "two images in two turns", "text alone"]


@pytest.mark.parametrize("case", CASES)
def test_ids_and_pixels_equal_those_of_the_published_processor(case: str, golden: Made, published: Tensors) -> None:
    theirs, ours = part(published, case), collate([sample_of(case)], golden.processor, golden.spec)
    length = len(theirs["input_ids"])
    assert ours["input_ids"][0, :length].tolist() == theirs["input_ids"].tolist()
    assert ours["labels"][0, :length].tolist() == theirs["labels"].tolist()
    if "pixels" in theirs:
        assert ours["input_ids"].shape[1] == length
        assert torch.equal(ours["pixel_values"][0], (theirs["pixels"].float() / 255 - 0.5) / 0.5)
        assert torch.equal(ours["target_sizes"], theirs["target_sizes"].long())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_those_of_the_published_code(case: str, golden: Made, published: Tensors) -> None:
    """With batches of the trainer's collator. Text without images has a dummy image after it, which must not change anything."""
    theirs, batch = part(published, case), collate([sample_of(case)], golden.processor, golden.spec)
    golden.model.zero_grad()
    logits = golden.model(**to_arguments(batch, "labels"), use_cache=False).logits[0]
    assert float((logits[theirs["positions"].long()] - theirs["logits"]).detach().abs().max()) <= BOUND
    loss = cross_entropy(logits[:-1], batch["labels"][0, 1:], ignore_index=IGNORED)
    assert loss.item() == pytest.approx(theirs["loss"].item(), abs=BOUND)
    loss.backward()
    found = {name: parameter.grad for name, parameter in golden.model.named_parameters() if parameter.grad is not None}
    compared = set()
    for key, value in theirs.items():
        kind, _, name = key.partition("/")
        if name:
            compared.add(name)
            assert float((summarise(found[name], kind) - value).abs().max()) <= BOUND, key
    seen = ("vpm.", "resampler.") if case != "text alone" else ()  # the published code ran no tower there
    assert compared == {name for name in found if name.startswith(("llm.", *seen))}
    assert all(not found[name].any() for name in set(found) - compared)


def summarise(gradient: torch.Tensor, kind: str) -> torch.Tensor:
    """As described in the README of the golden files."""
    if kind == "gradient":
        return gradient
    matrix = gradient.reshape(gradient.shape[0], -1)
    rows, columns = (torch.cos(torch.arange(1, size + 1, dtype=torch.float64)).float() for size in matrix.shape)
    return {"rows": matrix @ columns, "columns": rows @ matrix, "norm": matrix.norm()}[kind]


def test_slices_equal_those_of_the_published_code(golden: Made) -> None:
    """Grid, sizes and tokens for many sizes, without pixels; and the parts of one real image."""
    slicer, rows = Slicer(), json.loads((GOLDEN / "slices.json").read_text(encoding="utf-8"))
    assert len(rows) > 300
    span = find_family("minicpm_v_2_6").create_processor(model_spec("minicpm_v_2_6")).span
    for width, height, most, grid, overview, whole, _ in rows:
        if width * height > 300_000 or (width + height) % 3:  # tokens for all sizes, pixels for some
            continue
        parts = Slicer(saved={"max_slice_nums": most}).cut(Image.new("L", (width, height)))
        assert list(parts[0].size) == overview
        columns, lines = grid or (0, 0)
        assert len(parts) == 1 + columns * lines
        assert all([part.width * columns, part.height * lines] == whole for part in parts[1:])
    for width, height, most, _, _, _, tokens in rows:
        assert replace(span, most=most)((width, height), 0).count(span.image) == tokens
    assert slicer.most == 9 and slicer.scale == 448


# ------------------------------------------------------------------------------------------------------------- the parts


def test_the_tower_equals_that_of_transformers(golden: Made) -> None:
    """Compared with its forward pass on one part, where nothing is padded."""
    tower = golden.model.vpm
    assert isinstance(tower, Idefics2VisionTransformer)
    pixels = torch.randn(1, 3, 28, 36, generator=torch.Generator().manual_seed(0))
    rows = pixels.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, 3, 7, 9, 4, 4)
    flat = rows.permute(0, 1, 4, 2, 3, 5).reshape(1, 3, 4, -1)
    hidden, mask = encode_patches(tower, flat, [[7, 9]])
    assert mask is None and torch.allclose(hidden, tower(pixels).last_hidden_state, atol=1e-6)


def test_position_ids_that_transformers_rounds_differently() -> None:
    """Why we compute the position ids ourselves: they differ for a side of 49 or 58 patches in a tower of 70."""

    def theirs(length: int) -> list[int]:
        edges = torch.arange(1 / 70, 1.0, 1 / 70)
        steps = torch.arange(length, dtype=torch.float32) * (1.0 / torch.tensor(length))
        return torch.bucketize(steps.clamp(max=1.0 - 1e-6), edges, right=True).tolist()

    ours = {length: patch_positions([[1, length]], 70).tolist() for length in range(1, 71)}
    assert [length for length, places in ours.items() if places != theirs(length)] == [49, 58]


def test_the_attention_of_the_resampler_equals_that_of_torch() -> None:
    """With several heads, and parts of different lengths."""
    torch.manual_seed(0)
    ours, theirs = CrossAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_weight)
    assert ours.load_state_dict(theirs.state_dict()) and {*ours.state_dict()} == {*theirs.state_dict()}
    queries, keys, values = torch.randn(5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    wanted = theirs(queries.expand(2, -1, -1), keys, values, key_padding_mask=~mask)[0]
    assert torch.allclose(ours(queries, keys, values, mask), wanted, atol=1e-6)


def test_padding_does_not_change_a_part() -> None:
    torch.manual_seed(0)
    resampler = Resampler(queries=3, width=256, heads=2, patch_width=16)
    torch.nn.init.normal_(resampler.query)
    torch.nn.init.normal_(resampler.attn.in_proj_weight, std=0.1)
    torch.nn.init.normal_(resampler.proj, std=0.1)
    patches = torch.randn(1, 6, 16)
    alone = resampler(patches, [(2, 3)], None)
    beside = torch.cat([torch.nn.functional.pad(patches, (0, 0, 0, 4)), torch.randn(1, 10, 16)])
    both = resampler(beside, [(2, 3), (5, 2)], torch.arange(10) < torch.tensor([[6], [10]]))
    assert torch.allclose(both[:1], alone, atol=1e-5)
    assert not torch.allclose(resampler(patches, [(3, 2)], None), alone, atol=1e-3), "the result depends on the grid"


# ------------------------------------------------------------------------------------------------- generation, text only


@pytest.mark.parametrize("name", ["tiny_minicpm_v_2_6", "tiny_minicpm_o_2_6"])
def test_generation_in_a_batch_and_without_a_cache(name: str, make_tiny: Callable[[str], Made], samples: tuple[Sample, ...]) -> None:
    made = make_tiny(name)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=made.processor.tokenizer.pad_token_id, eos_token_id=None)
    batch, _ = collate_prompts(samples, made.processor, made.spec)
    together = made.model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]
    for number, sample in enumerate(samples):
        alone, _ = collate_prompts([sample], made.processor, made.spec)
        for token in together[number].tolist():
            assert int(made.model(**alone, use_cache=False).logits[0, -1].argmax()) == token, f"row {sample.row}"
            more = {"input_ids": torch.tensor([[token]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
            alone |= {name: torch.cat([alone[name], tail], dim=1) for name, tail in more.items()}


def test_a_dummy_image_reaches_the_tower_and_changes_nothing(make_tiny: Callable[[str], Made]) -> None:
    made = make_tiny("tiny_minicpm_v_2_6")
    texts = (talk(("Hello?", "Yes."), row=1), talk(("Who is there this time?", "No one."), row=2))
    batch = collate(texts, made.processor, made.spec)
    plain = to_arguments(batch, "pixel_values", "target_sizes")
    made.model.zero_grad()
    loss = made.model(**batch, use_cache=False).loss
    assert loss.item() == pytest.approx(made.model(**plain, use_cache=False).loss.item(), rel=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in made.model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(gradient.any() for name, gradient in gradients.items() if not name.startswith("llm."))


# ------------------------------------------------------------------------------------------------------------------- files


def keys() -> set[str]:
    return set((GOLDEN / "keys.txt").read_text(encoding="utf-8").split())


def test_names_equal_those_of_the_published_index() -> None:
    spec = model_spec("minicpm_v_2_6")
    with torch.device("meta"):
        model = find_family(spec.family).create(spec)
    assert set(model.state_dict()) == keys() and len(keys()) == 789
    assert sum(tensor.numel() for tensor in model.state_dict().values()) * 2 == 16_198_350_304  # total_size of the index, in bfloat16


def test_a_published_folder_is_saved_unchanged(golden: Made, tmp_path: Path) -> None:
    golden.model.save_pretrained(tmp_path)
    golden.processor.save(tmp_path)
    before, after = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name].float(), after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (GOLDEN, tmp_path)]
    named = {key: f"openbmb/MiniCPM-V-2_6--{value}" for key, value in configs[0]["auto_map"].items()}
    changed = {"auto_map", "torch_dtype", "transformers_version", "_name_or_path", "sliding_window"}  # the last has no effect in both
    assert {key for key, value in configs[0].items() if configs[1].get(key) != value} == changed & configs[0].keys()
    assert configs[1]["auto_map"] == named and configs[1]["rope_theta"] == 1e6
    assert (tmp_path / "tokenizer.json").read_bytes() == (GOLDEN / "tokenizer.json").read_bytes()
    code = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))["auto_map"]["AutoImageProcessor"]
    assert code == "openbmb/MiniCPM-V-2_6--image_processing_minicpmv.MiniCPMVImageProcessor"
    again = golden.family.load(tmp_path, golden.spec.model, torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), golden.model.parameters(), strict=True))
    assert golden.family.load_processor(tmp_path, golden.spec.model).span((70, 50), 3) == golden.processor.span((70, 50), 3)


def test_shards_and_pickled_weights_are_read(golden: Made, tmp_path: Path) -> None:
    """A .bin is read with torch's weights-only loader, which refuses a pickle with code."""
    for name, write in {"shards": write_shards, "bin": write_bin}.items():
        shutil.copytree(GOLDEN, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        write(tmp_path / name, load_file(GOLDEN / "model.safetensors"))
        loaded = golden.family.load(tmp_path / name, golden.spec.model, torch.float32)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), golden.model.parameters(), strict=True))


def write_shards(folder: Path, weights: Tensors) -> None:
    names = sorted(weights)
    files = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_bin(folder: Path, weights: Tensors) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def test_a_limit_on_slices_is_saved_in_both_configs(golden: Made, tmp_path: Path) -> None:
    """The published code compares the two."""
    golden.model.save_pretrained(tmp_path)
    golden.family.load_processor(GOLDEN, golden.spec.model, Limit(max_tiles=2)).save(tmp_path)
    read = {name: json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("config.json", "preprocessor_config.json")}
    assert read["config.json"]["slice_config"]["max_slice_nums"] == read["preprocessor_config.json"]["max_slice_nums"] == 2


def test_the_chat_template_is_the_published_one(golden: Made, tmp_path: Path) -> None:
    golden.processor.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(GOLDEN)
    ours = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.chat_template != theirs.chat_template
    talks = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}, {"role": "user", "content": "And that?"}]
    rendered = [one.apply_chat_template(talks, tokenize=False, add_generation_prompt=True) for one in (theirs, ours)]
    assert rendered[0] == rendered[1]


# ---------------------------------------------------------------------------------------------------------- MiniCPM-o 2.6


def add_audio(folder: Path) -> Tensors:
    """Adds tensors with the published prefixes of the audio and speech parts to a checkpoint."""
    extra = {
        "apm.conv1.weight": torch.randn(4, 3, 3).bfloat16(),
        "apm.layers.0.self_attn.q_proj.bias": torch.randn(4),
        "audio_projection_layer.linear1.weight": torch.randn(4, 4).bfloat16(),
        "tts.head_code.0.parametrizations.weight.original0": torch.randn(3, 1).bfloat16(),
        "tts.dvae.coef": torch.randn(1, 100, 1),
    }
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    more = {"audio_config": {"d_model": 4}, "tts_config": {"num_vq": 4, "model_type": "conditional_chattts"}, "audio_pool_step": 2}
    (folder / "config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
    return extra


def test_audio_and_speech_tensors_are_kept(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    made = make_tiny("tiny_minicpm_o_2_6")
    shutil.copytree(made.folder, tmp_path / "from")
    extra = add_audio(tmp_path / "from")
    loaded: Any = made.family.load(tmp_path / "from", made.spec.model, torch.bfloat16)
    assert not set(extra) & {*dict(loaded.named_parameters()), *dict(loaded.named_buffers())}
    shutil.rmtree(tmp_path / "from")
    weights = {name: tensor * 2 for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "to", state_dict=weights)
    saved = load_file(tmp_path / "to" / "model.safetensors")
    assert set(saved) == set(weights) | set(extra)
    assert all(torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype for name, tensor in extra.items())
    config = json.loads((tmp_path / "to" / "config.json").read_text(encoding="utf-8"))
    assert config["tts_config"] == {"num_vq": 4, "model_type": "conditional_chattts"} and config["audio_pool_step"] == 2
    assert config["model_type"] == "minicpmo"
    assert not made.family.load(tmp_path / "to", made.spec.model, torch.bfloat16, on_meta=True).kept_tensors


def test_audio_tensors_are_refused_for_minicpm_v(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:
    made = make_tiny("tiny_minicpm_v_2_6")
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    add_audio(tmp_path)
    with pytest.raises(InputRefused, match=r"is not the revision.*\n  unexpected: apm\.conv1\.weight, apm\.layers"):
        made.family.load(tmp_path, made.spec.model, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_a_revision_with_other_tensors_is_refused_with_a_list(golden: Made, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    weights = load_file(GOLDEN / "model.safetensors")
    weights["resampler.pos_embed"] = torch.zeros(2)
    weights["resampler.query"] = torch.zeros(5, 256)
    del weights["resampler.ln_q.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRefused) as caught:
        golden.family.load(tmp_path, golden.spec.model, torch.float32)
    assert "  missing: resampler.ln_q.bias\n  unexpected: resampler.pos_embed\n  with another shape: resampler.query" in str(caught.value)


def test_an_unknown_repository_with_code_is_refused(golden: Made, tmp_path: Path) -> None:
    config = {"model_type": "ovis9", "auto_map": {"AutoModel": "modeling_ovis.Ovis"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("minicpm_v_2_6", "llava"):
        with pytest.raises(InputRefused) as caught:
            find_family(name).load(tmp_path, replace(golden.spec.model, name=name), torch.float32)
        assert "has the model type ovis9 (with its own code, which is never run" in str(caught.value)
        assert all(family in str(caught.value) for family in FAMILIES)


def test_another_number_of_queries_is_refused(golden: Made) -> None:
    other = replace(golden.spec.model, architecture={**golden.spec.model.architecture, "options": {"num_query": 64}})
    with pytest.raises(InputRefused, match=r"has 4 tokens per slice, but model\.architecture\.options\.num_query is 64"):
        golden.family.load(GOLDEN, other, torch.float32)


def test_an_absurd_aspect_ratio_is_refused_by_file_and_row(golden: Made, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    sample = talk(("<image>\nWhat?", "A line."), images=(tmp_path / "line.png",), row=4)
    with pytest.raises(InputRefused, match=r"rows\.json row 4.*3000x2 pixels: one side is more than 200 times the other"):
        collate([sample], golden.processor, golden.spec)


def test_more_slices_than_fit_into_the_context(golden: Made) -> None:
    spec: TrainSpec = replace(golden.spec, data=replace(golden.spec.data, max_length=90))
    with pytest.raises(InputRefused, match=r"104 tokens \(34 of them for images\) are more than data\.max_length=90"):
        collate([sample_of("one sliced image")], golden.processor, spec)


def test_the_last_layer_of_the_tower_is_dropped_by_default(golden: Made) -> None:
    config = golden.model.config
    assert vision_config(config).num_hidden_layers == 2
    silent = copy.deepcopy(config)
    del silent.drop_vision_last_layer
    assert vision_config(silent).num_hidden_layers == 1
