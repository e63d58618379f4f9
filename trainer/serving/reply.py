"""Answers in the format of OpenAI's chat completions: as one JSON object, or streamed as server-sent events."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from trainer.generation.question import Answer
from trainer.serving.pending_request import Event
from trainer.serving.refusal import RequestRefused, error_body

FINISH = {"stop": "stop", "length": "length", "halted": "stop"}


@dataclass(frozen=True, kw_only=True)
class CompletionHeader:
    """The fields that all parts of one answer share. `created` in seconds since 1970."""

    id: str
    created: int
    model: str

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": FINISH[answer.ended]}
        return self._object("chat.completion", [choice]) | {"usage": usage_of(answer)}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        return self._object("chat.completion.chunk", []) | {"usage": usage_of(answer)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_of(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.new_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens, "total_tokens": total}


async def stream(events: AsyncIterator[Event], header: CompletionHeader, *, usage: bool) -> AsyncIterator[bytes]:
    """A failure during an answer ends the stream with an error in place of [DONE]; OpenAI's client library raises it."""
    yield as_event(header.chunk({"role": "assistant", "content": ""}))
    async for event in events:
        if isinstance(event, RequestRefused):
            yield as_event(error_body(event))
            return
        if isinstance(event, str):
            yield as_event(header.chunk({"content": event}))
        else:
            yield as_event(header.chunk({}, FINISH[event.ended]))
            if usage:
                yield as_event(header.usage_chunk(event))
    yield b"data: [DONE]\n\n"


def as_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
