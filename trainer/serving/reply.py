"""Answers as OpenAI's chat completions have them, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from trainer.generation.question import Answer
from trainer.serving.refusal import RequestRefused, error_body
from trainer.serving.ticket import Event

FINISH = {"stop": "stop", "length": "length", "halted": "stop"}


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of one answer say. `created` in seconds since 1970."""

    id: str
    created: int
    model: str

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": FINISH[answer.ended]}
        return self._with("chat.completion", [choice]) | {"usage": usage_of(answer)}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return self._with("chat.completion.chunk", [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def last(self, answer: Answer) -> dict[str, Any]:
        return self._with("chat.completion.chunk", []) | {"usage": usage_of(answer)}

    def _with(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_of(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.new_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens, "total_tokens": total}


async def stream(events: AsyncIterator[Event], head: Head, *, usage: bool) -> AsyncIterator[bytes]:
    """A failure in the midst of an answer ends it with an error in place of [DONE], which the client library raises."""
    yield as_event(head.chunk({"role": "assistant", "content": ""}))
    async for event in events:
        if isinstance(event, RequestRefused):
            yield as_event(error_body(event))
            return
        if isinstance(event, str):
            yield as_event(head.chunk({"content": event}))
        else:
            yield as_event(head.chunk({}, FINISH[event.ended]))
            if usage:
                yield as_event(head.last(event))
    yield b"data: [DONE]\n\n"


def as_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
