"""The families MiniCPM-V 2.6 and MiniCPM-o 2.6: reads the published repositories without running the code in them.

Only the vision-language part of MiniCPM-o is trained. The tensors of its audio encoder, speech decoder and their projections are kept in host
memory on the rank that saves, and saved unchanged.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_utils import load_state_dict

from trainer.contract import InputRefused, ModelSpec
from trainer.contract.listing import list_some
from trainer.contract.weight_files import is_safetensors, weight_files
from trainer.data.encode import image_id
from trainer.data.processor import Processor
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_differences, refuse_kind
from trainer.models.family import UNBOUND, Family, Limit
from trainer.models.openbmb.minicpm_network import MiniCPMO, MiniCPMV
from trainer.models.openbmb.slicer import Slicer
from trainer.models.processor import IMAGE_FILE, TEMPLATE_FILE, find_slices, open_tokenizer
from trainer.models.template import chat_template
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "turn_token": "<|im_start|>",
}
MARK = "(<image>./</image>)"  # replaced by the published processor
KEPT_FILES = (  # of the tokenizer, copied unchanged: transformers 4 cannot read those that transformers 5 writes
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
SHOWN = 12  # names of tensors in a message
CONFIG_FILE = "config.json"
FRAMES = ("im_start", "im_end", "slice_start", "slice_end", "im_id_start", "im_id_end")


@dataclass(frozen=True, kw_only=True)
class Edition:
    """The differences between the two. `kept`: prefixes of the tensors that are kept and not used."""

    network: type[MiniCPMV]
    source: str
    kept: tuple[str, ...] = ()


V_2_6 = Edition(network=MiniCPMV, source="openbmb/MiniCPM-V-2_6")
O_2_6 = Edition(network=MiniCPMO, source="openbmb/MiniCPM-o-2_6", kept=("apm.", "audio_projection_layer.", "tts."))


# -------------------------------------------------------------------------------------------------------------------- model


def create(edition: Edition, model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer, options = make_tokenizer(model), model.architecture["options"]
    vision = find_sizes(model, "vision")
    config = edition.network.config_class(
        **find_text(model, tokenizer),
        vision_config=vision,
        drop_vision_last_layer=False,
        query_num=options["num_query"],
        patch_size=vision["patch_size"],
        slice_config={"max_slice_nums": options.get("max_slice_nums", 9), "patch_size": vision["patch_size"], "model_type": "minicpmv"},
        slice_mode=True,
        use_image_id=True,
        batch_vision_input=True,
        version=2.6,
        image_token_id=image_id(tokenizer, model.image_token),
    )
    config._attn_implementation = ATTENTION[model.attention]
    return edition.network(config)


def load(edition: Edition, folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """Raises InputRefused with each difference if the checkpoint in `folder` is of another model or revision."""
    config = read_config(edition, folder, model)
    if getattr(config, "image_token_id", None) is None:
        config.image_token_id = image_id(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), model.image_token)
    options = loading_options(folder, model, dtype, on_meta=on_meta)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all differences are refused below
    network, found = edition.network.from_pretrained(folder, config=config, **options)
    extra = [name for name in found["unexpected_keys"] if not name.startswith(edition.kept or ("\0",))]
    if found["missing_keys"] or extra or found["mismatched_keys"]:
        raise InputRefused(describe_revision(folder, model, found, extra))
    if edition.kept and not on_meta:
        network.kept_tensors = read_tensors(folder, edition.kept)
    return network  # type: ignore[no-any-return]


def read_config(edition: Edition, folder: Path, model: ModelSpec) -> Any:
    """Raises InputRefused."""
    known = edition.network.config_class
    refuse_kind(folder, model, known)
    config = known.from_pretrained(folder, local_files_only=True)
    refuse_differences(folder, model, SimpleNamespace(text_config=config, vision_config=SimpleNamespace(**config.vision_config)))
    queries, wanted = getattr(config, "query_num", 64), model.architecture["options"]["num_query"]
    if queries != wanted:
        raise InputRefused(
            f"{folder} has {queries} tokens per slice, but model.architecture.options.num_query is {wanted}\n    set model=NAME to the "
            "checkpoint's model"
        )
    source = edition.source
    config.auto_map = {key: name_source(value, source) for key, value in (getattr(config, "auto_map", None) or {}).items()} or None
    return config


def describe_revision(folder: Path, model: ModelSpec, found: Mapping[str, Any], extra: list[str]) -> str:
    lines = []
    for what, names in (("missing", found["missing_keys"]), ("unexpected", extra), ("with another shape", found["mismatched_keys"])):
        names = sorted(name if isinstance(name, str) else name[0] for name in names)
        lines += [f"  {what}: {list_some(names, SHOWN)}"] if names else []
    listed = "\n".join(lines)
    return (
        f"{folder} is not the revision of {model.name} that is supported: use the one that its config names, with all its files\n{listed}"
    )


def read_tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors with these prefixes, by name, unchanged and copied into memory: the folder may not exist any more when they are saved."""
    found = {}
    for file in weight_files(folder):
        found |= read_plain(file, prefixes) if is_safetensors(file) else read_pickled(file, prefixes)
    return found


def read_plain(file: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).clone() for name in tensors.keys() if name.startswith(prefixes)}  # noqa: SIM118


def read_pickled(file: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """From a .bin, with torch's tensors-only loader. The file is memory-mapped, so that other tensors are not read."""
    return {name: tensor.clone() for name, tensor in load_state_dict(file).items() if name.startswith(prefixes)}


# ---------------------------------------------------------------------------------------------------------------- processor


def make_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(model.image_token, model.template, TOKENS)


def create_processor(edition: Edition, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    options, patch = model.architecture["options"], model.architecture["vision"]["patch_size"]
    saved = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "processor_class": "MiniCPMOProcessor" if edition.kept else "MiniCPMVProcessor",
        "max_slice_nums": options.get("max_slice_nums", 9),
        "scale_resolution": options.get("scale_resolution", 448),
        "patch_size": patch,
        "use_image_id": True,
        "image_feature_size": options["num_query"],
        **{key: value for key, value in TOKENS.items() if key != "turn_token"},
        "unk": model.image_token,
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.6,
    }
    tokenizer = make_tokenizer(model)
    return assemble(model, tokenizer, saved, limit, lambda folder: tokenizer.save_pretrained(folder))


def load_processor(edition: Edition, folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files of `Processor.save` or of a published checkpoint."""
    config = read_config(edition, folder, model)
    image = getattr(config, "image_token_id", None)
    tokenizer = open_tokenizer(folder, model, image, config.vocab_size, PreTrainedTokenizerFast)
    saved = json.loads((folder / IMAGE_FILE).read_text(encoding="utf-8"))
    kept = {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).is_file()}
    return assemble(model, tokenizer, name_code(saved, edition.source), limit, partial(write_files, kept=kept, source=edition.source))


def assemble(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, saved: dict[str, Any], limit: Limit, write_tokenizer: Any) -> Processor:
    slicer = Slicer(saved={**saved, **({"max_slice_nums": limit.max_tiles} if limit.max_tiles else {})})
    return Processor(
        tokenizer=tokenizer,
        image_features=slicer.features,
        span=find_slices(
            tokenizer,
            TOKENS,
            FRAMES,
            model.image_token,
            numbered=slicer.numbered,
            unit=slicer.patch,
            scale=slicer.scale,
            most=slicer.most,
            tokens=slicer.tokens,
        ),
        save=partial(save, model=model, slicer=slicer, write_tokenizer=write_tokenizer),
        image_mark=MARK,
        axes={"pixel_values": -1},  # (1, 3, patch, patches * patch): the patches of all images side by side
    )


# -------------------------------------------------------------------------------------------------------------------- files


def save(folder: Path, *, model: ModelSpec, slicer: Slicer, write_tokenizer: Any) -> None:
    """Write the published files. The published code needs the number of slices in both configs."""
    write_tokenizer(folder)
    write_json(folder / IMAGE_FILE, dict(slicer.saved))
    (folder / TEMPLATE_FILE).write_text(chat_template(model.template, MARK), encoding="utf-8")
    if (folder / CONFIG_FILE).is_file():
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        slices = {**(config.get("slice_config") or {}), "max_slice_nums": slicer.saved.get("max_slice_nums", 9)}
        write_json(folder / CONFIG_FILE, {**config, "slice_config": slices})


def write_files(folder: Path, *, kept: Mapping[str, bytes], source: str) -> None:
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    if "tokenizer_config.json" in kept:
        write_json(folder / "tokenizer_config.json", name_code(json.loads(kept["tokenizer_config.json"]), source))


def name_code(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """With code references to the published repository, because the code is not saved with the file."""
    named = {key: name_source(value, source) for key, value in settings.get("auto_map", {}).items()}
    return {**settings, "auto_map": named} if named else settings


def name_source(value: Any, source: str) -> Any:
    """In transformers' notation `repository--module.Class`."""
    if isinstance(value, (list, tuple)):
        return [name_source(one, source) for one in value]
    return value if value is None or "--" in value else f"{source}--{value}"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_family(name: str, edition: Edition) -> Family:
    return Family(
        name=name,
        create=partial(create, edition),
        load=partial(load, edition),
        create_processor=partial(create_processor, edition),
        load_processor=partial(load_processor, edition),
    )


MINICPM_V_2_6 = make_family("minicpm_v_2_6", V_2_6)
MINICPM_O_2_6 = make_family("minicpm_o_2_6", O_2_6)
