"""Roles of messages, as data sets write them."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from trainer.data.rows.parsed_row import Role

# As the formats define them. `tool`: a result. hiyouga/LLaMA-Factory: src/llamafactory/data/parser.py (observation), modelscope/ms-swift:
# docs/source_en/Instruction/Agent-support.md (tool_response), OpenAI (tool; function before 2023-11).
ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
# Messages of the assistant whose text is the JSON of calls. The same sources.
CALL_ROLES = ("function_call", "tool_call")
# Names with one meaning, in any case. OpenAI calls the system message of its newer models developer.
MEANT: dict[str, Role] = {
    "developer": "system", "system_prompt": "system",
    "bot": "assistant", "chatbot": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant", "llm": "assistant",
    "gpt3": "assistant", "gpt4": "assistant", "gpt-4": "assistant", "claude": "assistant", "gemini": "assistant", "bard": "assistant",
    "bing": "assistant", "assistent": "assistant", "prompter": "user",
    "function_response": "tool", "function_result": "tool", "tool_result": "tool", "tool_output": "tool", "ipython": "tool",
}  # fmt: skip
NAMED = "system, user, human, assistant, gpt, tool, observation, function_call, tool_call"


@dataclass(frozen=True, kw_only=True)
class ReadRole:
    """`is_call`: the text is the JSON of calls. `adjustment`: what it was read as, '' for a name of a format."""

    role: Role
    is_call: bool = False
    adjustment: str = ""


PLAIN = {name: ReadRole(role=role) for name, role in ROLES.items()} | {
    name: ReadRole(role="assistant", is_call=True) for name in CALL_ROLES
}


def find_role(name: Any) -> ReadRole | None:
    """None for one that is unknown, or has no single meaning."""
    if not isinstance(name, str):
        return None
    if name in PLAIN:
        return PLAIN[name]
    lower = name.strip().lower()
    if lower in PLAIN:
        found = PLAIN[lower]
        return ReadRole(role=found.role, is_call=found.is_call, adjustment=f"role {name!r} read as {lower}")
    if lower in MEANT:
        return ReadRole(role=MEANT[lower], adjustment=f"role {name!r} read as {MEANT[lower]}")
    return None


def suggest_role(name: Any) -> str:
    near = get_close_matches(name.strip().lower(), (*PLAIN, *MEANT), 1, 0.7) if isinstance(name, str) else []
    return f"{f'did you mean {near[0]!r}? ' if near else ''}valid roles: {NAMED}"
