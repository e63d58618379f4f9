"""Chat templates in the shape of published ones, opened with a tiny tokenizer that has their tokens as single ones."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.trainer.data.conftest import CHATML
from trainer.data.chat.checkpoint_template import CheckpointTemplate
from trainer.data.chat.probe import examine
from trainer.data.chat.saved_template import SavedTemplate
from trainer.models.tiny_tokenizer import tiny_tokenizer

FOLDER = Path(__file__).with_name("shapes")
SHAPES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
IMAGE = "<|image_pad|>"
FRAMED = f"<|vision_start|>{IMAGE}<|vision_end|>"
MARKS = {"chatml": FRAMED, "qwen3": FRAMED, "minicpm": "(<image>./</image>)"}
TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|start|>", "<|sep|>", "<|eot|>", "<s>", "</s>", "<think>", "</think>")


def read_shape(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer(IMAGE, CHATML, {f"token_{number}": token for number, token in enumerate(TOKENS)})
    made.bos_token = "<s>"
    return made


def open_text(text: str, mark: str = IMAGE, *, path: str = "chat_template.jinja") -> CheckpointTemplate:
    special = {name: str(value) for name, value in tokenizer().special_tokens_map.items() if isinstance(value, str)}
    saved = SavedTemplate(folder=Path(), file=path, texts={"default": text})
    return examine(saved, special, mark, IMAGE, "</s>")


@cache
def open_shape(name: str) -> CheckpointTemplate:
    return open_text(read_shape(name), MARKS.get(name, IMAGE), path=f"{name}.jinja")
