"""Find out once how a checkpoint's chat template writes conversations, from texts with words that occur nowhere else."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.data.chat.checkpoint_template import THINKING, CheckpointTemplate, shared_start, write
from trainer.data.chat.sandbox import TemplateRefused
from trainer.data.chat.saved_template import DEFAULT, SavedTemplate
from trainer.data.rows.parsed_row import ToolCall
from trainer.data.rows.sample import MARK, Message

S, X, Y, Z, W, R, N, V = (f"Qv{letter}w" for letter in "abcdefgh")  # a word of its own for each place
END_MARK = re.compile(r"<[^<>]*>|\S+")  # one token; Phi writes another one at the end of a conversation
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOOL = (
    f'{{"type": "function", "function": {{"name": "{N}", "description": "{V}", "parameters": {{"type": "object", "properties": {{}}}}}}}}'
)
ALL_PARTS = frozenset({"system", "user", "assistant", "tool"})


def user(text: str) -> Message:
    return Message(role="user", content=text)


def answer(text: str, **more: Any) -> Message:
    return Message(role="assistant", content=text, **more)


def examine(saved: SavedTemplate, special: Mapping[str, str], mark: str, image_token: str, end_mark: str) -> CheckpointTemplate:
    """`mark`: what stands for an image in a text for the model's processor. `end_mark`: put behind the answers where the template writes nothing there.
    Raises TemplateRefused for one that cannot be trained with."""
    plain = CheckpointTemplate(texts=saved.texts, special=special, mark=mark, image_token=image_token, path=saved.path)
    known = find_parts(plain)
    known = find_image(known)
    known = find_frames(known, end_mark)
    known = replace(known, renders=frozenset(find_renders(known)), marked=bool(GENERATION.search(saved.texts[DEFAULT])))
    return find_system(known)


def attempt(template: CheckpointTemplate, *messages: Message, **more: Any) -> str:
    """The text; '' where the template refuses the conversation."""
    try:
        return write(template, messages, **more)
    except TemplateRefused:
        return ""


def holds(text: str, *words: str) -> bool:
    """Whether these are in the text, each once or more, the first ones in this order."""
    places = [text.find(word) for word in words]
    return all(place >= 0 for place in places) and places == sorted(places)


def find_parts(template: CheckpointTemplate) -> CheckpointTemplate:
    """The form of a content without images: a text, if the template writes it."""
    talk = (user(X), answer(Y), user(Z), answer(W))
    for parts in (frozenset(), ALL_PARTS, ALL_PARTS - {"assistant"}, frozenset({"assistant"})):
        known = replace(template, parts=parts)
        if holds(attempt(known, *talk), X, Y, Z, W):
            return known
    text = write(template, talk)  # its own error, if it has one
    lost = ", ".join(name for name, word in (("questions", X), ("answers", Y)) if word not in text) or "messages of a longer conversation"
    raise TemplateRefused(f"leaves out {lost}")


def find_image(template: CheckpointTemplate) -> CheckpointTemplate:
    """The form of a question with images: parts, if the template writes one image for each."""
    mark, talk = template.mark, (user(f"{X}{MARK}{Y}{MARK}{Z}"), answer(W))
    for images in (True, False):
        known = replace(template, images=images)
        whole = replace(known, image_token=mark)  # the marks as the template writes them
        text = attempt(whole, *talk)
        # A token without those around it would be read by the model's processor as another image.
        if holds(text, X, Y, Z) and text.count(mark) == 2 and template.image_token not in text.replace(mark, ""):
            after = write(whole, (user(f"{MARK}{X}"), answer(Y))).partition(mark)[2].partition(X)[0] if images else ""
            return replace(known, after_image=after if after.isspace() else "")
    raise TemplateRefused(f"does not write an image as {template.mark!r}, which the processor of the model reads")


def find_frames(template: CheckpointTemplate, end_mark: str) -> CheckpointTemplate:
    """What stands before and after an answer."""
    once, twice = write(template, (user(X), answer(Y))), write(template, (user(X), answer(Y), user(Z), answer(W)))
    last, middle = once.partition(Y)[2], twice.partition(Y)[2].partition(Z)[0]
    found = END_MARK.match(without_part(shared_start(last, middle)).strip() or last.strip())
    end = found[0] if found else ""
    known = replace(template, end_mark=end or end_mark.strip(), end_added=not end)
    thinking = any(THINKING in text for text in template.texts.values())
    asked = write(known, (user(X),), prompt=True)
    if thinking and not begins_with_answer(once, asked):
        known = replace(known, thinking_off=True)
        once, asked = write(known, (user(X), answer(Y))), write(known, (user(X),), prompt=True)
    opening = asked.partition(X)[2]
    before = write(known, (user(X),)).partition(X)[2]
    opening = opening.removeprefix(before) or opening
    if not once.startswith(asked):
        raise TemplateRefused(
            "does not begin an answer as it asks for one (add_generation_prompt), so that the model would be asked otherwise than trained"
        )
    lines = opening.splitlines(keepends=True)
    openings = tuple(filter(str.strip, ("".join(lines[:count]) for count in range(len(lines), 0, -1))))
    return replace(known, openings=openings)


def without_part(text: str) -> str:
    """Without the first characters of a token in angle brackets at its end: two tokens that differ may begin with the same."""
    return text[: text.rfind("<")] if text.rfind("<") > text.rfind(">") else text


def begins_with_answer(whole: str, asked: str) -> bool:
    return whole.startswith(asked) and whole[len(asked) :].lstrip().startswith(Y)


def find_renders(template: CheckpointTemplate) -> list[str]:
    """Which parts of a conversation the template writes, and does not leave out or refuse."""
    call = answer("", calls=(ToolCall(name=N, arguments=f'{{"place": "{V}"}}'),))
    result = Message(role="tool", content=R)
    texts = {
        "system": (attempt(template, Message(role="system", content=S), user(X), answer(Y)), (S, X, Y)),
        "tools": (attempt(template, user(X), answer(Y), tools=(TOOL,)), (N,)),
        "calls": (attempt(template, user(X), call, result, answer(Y), tools=(TOOL,)).rpartition(X)[2], (N, V)),
        "tool": (
            attempt(template, user(X), call, result, answer(Y), tools=(TOOL,)) or attempt(template, user(X), answer(Y), result, answer(W)),
            (X, R),
        ),
        "reasoning": (attempt(template, user(X), answer(Y, reasoning=R), thinks=True), (X, R, Y)),
    }
    return [name for name, (text, words) in texts.items() if holds(text, *words)]


def find_system(template: CheckpointTemplate) -> CheckpointTemplate:
    """What the template writes where there is no system message: all before the first question that it does not write before a later one."""
    twice = write(template, (user(X), answer(Y), user(Z), answer(W)))
    once = write(template, (user(X), answer(Y)))
    first, later = twice.partition(X)[0], twice.partition(Y)[2].partition(Z)[0]
    header = later.removeprefix(without_part(shared_start(later, once.partition(Y)[2])))
    if not header.strip():
        return template
    before = first.removesuffix(header)
    bos = template.special.get("bos_token", "")
    lead = bos if bos and before.startswith(bos) else ""
    return replace(template, lead=lead, default=before.removeprefix(lead)) if first.endswith(header) else template
