"""Conversations as segments of text, with the chat template of conf/model or with the checkpoint's own."""

from dataclasses import replace

from trainer.contract import Template
from trainer.data.chat.checkpoint_template import CheckpointTemplate
from trainer.data.chat.prefix import cut_checkpoint, cut_prompt_of_checkpoint
from trainer.data.chat.segment import Segment, cut as cut_own
from trainer.data.rows.sample import Sample

ChatTemplate = Template | CheckpointTemplate


def cut(sample: Sample, template: ChatTemplate, image_token: str) -> tuple[Segment, ...]:
    """As of `trainer.data.chat.segment`. Raises InputRefused for a conversation that the template cannot express."""
    return cut_own(sample, template, image_token) if isinstance(template, Template) else cut_checkpoint(sample, template)


def cut_prompt(sample: Sample, template: ChatTemplate, image_token: str) -> tuple[Segment, ...]:
    """The segments before the last answer, exactly as in training. Raises InputRefused."""
    if not isinstance(template, Template):
        return cut_prompt_of_checkpoint(sample, template)
    messages = (*sample.messages[:-1], replace(sample.messages[-1], in_loss=True))  # so that the answer is a segment of its own
    segments = cut_own(replace(sample, messages=messages), template, image_token)
    return segments[: max(index for index, segment in enumerate(segments) if segment.in_loss)]


def writes_bos(template: ChatTemplate, segments: tuple[Segment, ...]) -> bool:
    """Whether the template has written the token that starts a text, which the tokenizer would add once more (transformers 5.23,
    processing_utils.py, apply_chat_template)."""
    bos = "" if isinstance(template, Template) else template.special.get("bos_token", "")
    return bool(bos and segments and segments[0].text.startswith(bos))
