"""Whose system message a conversation has: data.system.

A conversation without one gets the default of the chat template. An empty system message stands for none at all, not even that default.
"""

from dataclasses import replace

from trainer.data.rows.sample import Message, Sample

ROW, DEFAULT, NONE = "row", "default", "none"  # any other value of data.system is the text of the message
LEFT_OUT = "system message of the row, left out (data.system)"


def choose_system(sample: Sample, rule: str) -> Sample:
    """The sample with the system message that it is trained with. One of its own that is not used is counted in its adjustments."""
    if rule == ROW:
        return sample
    own = sample.messages[0] if sample.messages[0].role == "system" else None
    chosen = message_of(rule)
    if own == chosen:
        return sample
    messages = (*((chosen,) if chosen else ()), *sample.messages[own is not None :])
    adjustments = sample.adjustments if own is None else (*sample.adjustments, LEFT_OUT)
    return replace(sample, messages=messages, adjustments=adjustments)


def with_system(messages: tuple[Message, ...], rule: str) -> tuple[Message, ...]:
    """The messages of a question to answer: its own system message, or else the one that data.system gives every row."""
    chosen = message_of(rule)
    return (chosen, *messages) if chosen and messages[0].role != "system" else messages


def message_of(rule: str) -> Message | None:
    """None: that of the row, or the default of the template."""
    return None if rule in (ROW, DEFAULT) else Message(role="system", content="" if rule == NONE else rule)
