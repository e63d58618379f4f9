"""Which chat template a model is trained and asked with: model.chat_template."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.contract import InputRefused, ModelSpec
from trainer.data.chat.checkpoint_template import CheckpointTemplate, shared_start, write
from trainer.data.chat.conversation import ChatTemplate, cut
from trainer.data.chat.probe import X, Y, answer, examine, user
from trainer.data.chat.sandbox import TemplateRefused
from trainer.data.chat.saved_template import DEFAULT, SavedTemplate, read_saved
from trainer.data.rows.sample import MARK, Sample

OURS = "{%- set image_mark = "  # how every template that trainer.models.template has written begins
WORD = re.compile(r"Qv[a-z]w")  # those of `probe`
SHOWN = 40  # characters of a difference
# Conversations that both templates are compared with.
PLAIN = (
    (user(X), answer(Y)),
    (user(f"{MARK}{X}"), answer(Y), user("Qviw"), answer("Qvjw")),
    (user(f" {X}\n{MARK}\n{MARK} "), answer(f"\n {Y} ")),
)


@dataclass(frozen=True, kw_only=True)
class ChosenTemplate:
    """`template`: what conversations are written with. `saved`: the files that go into a checkpoint as they are; None = an export of `template`.
    `notes`: lines for the user."""

    template: ChatTemplate
    saved: SavedTemplate | None
    notes: tuple[str, ...]


def choose_template(model: ModelSpec, folder: Path, special: Mapping[str, str], mark: str) -> ChosenTemplate:
    """`folder`: of the checkpoint; `special`: names of the tokenizer's special tokens -> their text; `mark`: what stands for an image in a text. Raises
    InputRefused for a template of the checkpoint that cannot be used."""
    wanted = model.chat_template or "conf"
    saved = read_saved(folder) if wanted != "conf" else None
    if saved is None:
        if wanted == "checkpoint":
            raise InputRefused(
                f"model.chat_template=checkpoint: {folder} has no chat template\n    copy its chat_template.jinja there, or set "
                "model.chat_template=conf, which writes conversations with model.template"
            )
        return ChosenTemplate(template=model.template, saved=None, notes=(f"chat template: model.template of {model.name}",))
    try:
        found = examine(saved, special, mark, model.image_token, model.template.end_mark)
    except TemplateRefused as error:
        raise InputRefused(
            f"{saved.path}: the chat template of the checkpoint {error}\n    set model.chat_template=conf, which writes conversations with "
            "model.template"
        ) from error
    difference = find_difference(found, model)
    if wanted == "auto" and not difference and saved.texts[DEFAULT].startswith(OURS):
        note = f"chat template: model.template of {model.name}, which the checkpoint was saved with"
        return ChosenTemplate(template=model.template, saved=None, notes=(note,))
    return ChosenTemplate(template=found, saved=saved, notes=tuple(describe(found, saved, difference)))


def find_difference(found: CheckpointTemplate, model: ModelSpec) -> str:
    """Where the two write a plain conversation differently; '' where they do not."""
    for messages in PLAIN:
        images = sum(message.content.count(MARK) for message in messages)
        sample = Sample(id="", images=(Path(),) * images, messages=messages, file="", row=0)
        own = "".join(segment.text for segment in cut(sample, model.template, model.image_token))
        try:
            theirs = write(found, messages)
        except TemplateRefused as error:
            return f"it {error}"
        if theirs != own:
            same = len(shared_start(theirs, own))
            return f"it has {shown(theirs, same)} where model.template has {shown(own, same)}"
    return ""


def shown(text: str, start: int) -> str:
    return repr(WORD.sub("…", text[start : start + SHOWN])) if start < len(text) else "the end"


def describe(found: CheckpointTemplate, saved: SavedTemplate, difference: str) -> list[str]:
    same = f"it differs from model.template: {difference}" if difference else "plain conversations are those of model.template"
    source = saved.texts[DEFAULT]
    notes = {
        f"it writes no end mark after an answer: {found.end_mark} is put there, so that the model learns to stop": found.end_added,
        "it prints the date, which is always 26 Jul 2024 here": "strftime_now" in source,
        "an answer without reasoning is asked for with enable_thinking=false": found.thinking_off,
    }
    return [
        f"chat template: that of the checkpoint, {saved.file}; {same}",
        *(f"chat template: {note}" for note, holds in notes.items() if holds),
    ]
