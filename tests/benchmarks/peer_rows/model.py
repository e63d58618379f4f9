"""The tiny models on whose tokenizers the rows of the peers are compared: folders that this project and the peers both open."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.contract import ModelSpec, Source, Template
from trainer.models.template import chat_template
from trainer.models.tiny import read_model, write_checkpoint

CONF = Path(__file__).parents[3] / "conf" / "model"
GOLDEN = Path(__file__).parents[2] / "golden" / "peers"
TEMPLATE_FILE = "chat_template.jinja"
# The ids that QwenLM/Qwen3-VL: qwen-vl-finetune/qwenvl/data/data_processor.py looks for.
QWEN_IDS = {"assistant": 77091, " assistant": 17847, "<|im_end|>": 151645, "<|im_start|>": 151644, "<|image_pad|>": 151655}
# haotian-liu/LLaVA: llava/conversation.py, conv_vicuna_v1; OpenGVLab/InternVL: internvl_chat/internvl/conversation.py, internvl2_5.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
INTERNVL_SYSTEM = "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """`conf`: the file of conf/model it is made from. `system`: in place of the system text of its chat template; None keeps it. `jinja`: a chat
    template of this folder's golden files, in place of the one that is made. `change`: what is changed in its folder."""

    conf: str
    system: str | None = None
    jinja: str = ""
    change: Callable[[Path], None] = field(default=lambda folder: None)


def write_model(name: str, folder: Path) -> ModelSpec:
    """Write the files of a model without its weights to a new folder."""
    known = MODELS[name]
    file = CONF / f"{known.conf}.yaml"
    write_checkpoint(file, folder)
    (folder / "model.safetensors").unlink()
    known.change(folder)
    model = spec_of(name, folder)
    text = (GOLDEN / known.jinja).read_text() if known.jinja else chat_template(model.template, find_mark(name, model))
    (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    return model


def spec_of(name: str, folder: Path) -> ModelSpec:
    known = MODELS[name]
    model = read_model(CONF / f"{known.conf}.yaml")
    template: Template = model.template if known.system is None else replace(model.template, system=known.system)
    own = {"chat_template": "auto"} if "chat_template" in {each.name for each in fields(ModelSpec)} else {}  # that of the folder
    return replace(model, template=template, source=Source(kind="path", path=str(folder)), **own)


def find_mark(name: str, model: ModelSpec) -> str:
    """What stands for an image in the text of a chat template."""
    marks = {"tiny_qwen2_5_vl": f"<|vision_start|>{model.image_token}<|vision_end|>", "tiny_minicpm_v_2_6": "(<image>./</image>)"}
    return marks.get(MODELS[name].conf, model.image_token)


# --------------------------------------------------------------------------------------------------------------- tokenizers


def give_qwen_ids(folder: Path) -> None:
    """Words with the ids of Qwen's vocabulary, because its fine-tuning code looks for these."""
    add_words(folder, QWEN_IDS)
    change_json(folder / "config.json", image_token_id=QWEN_IDS["<|image_pad|>"])


def allow_large_images(folder: Path) -> None:
    """As the published processor, so that no image of the golden rows is scaled: peers round its sides otherwise than the tiny one does."""
    size = {"shortest_edge": 256, "longest_edge": 12845056}
    change_json(folder / "preprocessor_config.json", size=size)
    file = folder / "processor_config.json"
    change_json(file, image_processor={**json.loads(file.read_text(encoding="utf-8"))["image_processor"], "size": size})


def add_assistant(folder: Path) -> None:
    """One token for the word, as MiniCPM-V's fine-tuning code expects."""
    add_words(folder, {"assistant": 340, " assistant": 341})


def add_words(folder: Path, words: Mapping[str, int]) -> None:
    """Words that are one token of the tokenizer, with these ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["content"] not in words]
    known = {token["content"]: token for token in content["added_tokens"]}
    for word, number in words.items():
        content["model"]["vocab"][word] = number
        rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": word in known}
        kept.append({"id": number, "content": word, **rest})
    for token in kept:
        content["model"]["vocab"][token["content"]] = token["id"]
    content["added_tokens"] = sorted(kept, key=lambda token: token["id"])
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_llama_tokenizer(folder: Path) -> None:
    """Like Llama's in transformers before `legacy=False`: a word start before each text between special tokens, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁ASSISTANT", "▁USER", "▁this", "▁one"] * 2
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.save_pretrained(folder)
    change_json(folder / "config.json", image_token_id=made.convert_tokens_to_ids("<image>"))


def change_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}, indent=1), encoding="utf-8")


MODELS = {
    "qwen": PeerModel(conf="tiny_qwen2_5_vl", jinja="qwen_tools.jinja", change=allow_large_images),
    "qwen3": PeerModel(conf="tiny_qwen2_5_vl", system="", jinja="qwen3_nothink.jinja"),
    "qwen_ids": PeerModel(conf="tiny_qwen2_5_vl", change=give_qwen_ids),
    "vicuna": PeerModel(conf="tiny_llava", system=VICUNA_SYSTEM, change=write_llama_tokenizer),
    "minicpm": PeerModel(conf="tiny_minicpm_v_2_6", change=add_assistant),
    "internvl": PeerModel(conf="tiny_internvl", system=INTERNVL_SYSTEM),
}
