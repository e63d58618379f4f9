"""What an answer thinks before its text: under keys of the message, or in blocks of its content. <think> marks in a text stay text."""

from typing import Any

from trainer.data.rows.parsed_row import AddProblem, Role, Row, kind

# Keys of a message. reasoning_content: DeepSeek, Qwen3 and axolotl; reasoning: OpenRouter and vLLM; thinking: xtuner and gpt-oss.
KEYS = ("reasoning_content", "reasoning", "thinking")
# Types of a block, and the keys of its text.
BLOCK_TYPES = ("thinking", "reasoning")
BLOCK_KEYS = ("thinking", "reasoning", "text", "content", "value")
STRIPPED = "reasoning of answers, left out"
THINK = "<think>"


def read_reasoning(item: Row, role: Role, field: str, add_problem: AddProblem) -> str | None:
    """'' without any. None, with a problem, for values that are not text, for two that differ, and outside of answers."""
    given = {key: item[key] for key in KEYS if item.get(key) not in (None, "")}
    content = item.get("value", item.get("content"))
    if isinstance(content, list):
        given |= {f"content[{number}]": text_of(block) for number, block in enumerate(content) if is_reasoning(block)}
    if not given:
        return ""
    key, text = next(iter(given.items()))
    if role != "assistant":
        add_problem(f"{field}.{key}", "only answers can have reasoning", "remove it, or write it into the text of the message")
    elif not isinstance(text, str):
        add_problem(f"{field}.{key}", f"is {kind(text)}, not a string", "write the reasoning as a string")
    elif any(other != text for other in given.values()):
        add_problem(field, f"{' and '.join(given)} have different texts", "keep one of them: reasoning_content")
    elif isinstance(content, str) and content.lstrip().startswith(THINK):
        add_problem(
            f"{field}.{key}", f"the text of the answer starts with {THINK}, so that the reasoning is given twice", "keep one of them"
        )
    else:
        return text
    return None


def is_reasoning(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") in BLOCK_TYPES


def text_of(block: Row) -> Any:
    return next((block[key] for key in BLOCK_KEYS if block.get(key) is not None), "")
