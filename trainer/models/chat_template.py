"""The chat template of a model's processor: the checkpoint's own where it has one, kept as it came."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.contract import ModelSpec
from trainer.data.chat.saved_template import write_saved
from trainer.data.chat.template_choice import choose_template
from trainer.data.processor import Processor
from trainer.models.family import UNBOUND, Family, Limit


def with_chat_template(family: Family) -> Family:
    """The family, whose processors have the chat template that model.chat_template asks for, and write the files that it came with."""

    def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
        processor = family.load_processor(folder, model, limit)
        mark = processor.image_mark or model.image_token
        chosen = choose_template(model, folder, special_tokens(processor.tokenizer), mark)

        def save(target: Path) -> None:
            processor.save(target)
            if chosen.saved is not None:
                write_saved(chosen.saved, target)

        return replace(processor, save=save, template=chosen.template, notes=chosen.notes)

    return replace(family, load_processor=load_processor)


def special_tokens(tokenizer: Any) -> Mapping[str, str]:
    """What transformers hands to a template beside the messages (5.23, processing_utils.py)."""
    return {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
