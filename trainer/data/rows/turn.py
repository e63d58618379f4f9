"""Read messages: role and text under all usual names, the content as a string or as blocks of text and images."""

from typing import Any

from trainer.data.rows.parsed_row import MARK, AddProblem, ImageReference, Role, Row, Turn, keys_of, kind, quote

ROLES: dict[str, Role] = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Of a block {"type": "image", KEY: path}: transformers' chat templates use the first three, ms-swift and OpenAI the last.
PATH_KEYS = ("image", "path", "url", "image_url")
IMAGE_TYPES = ("image", "image_url")
WRITE_TEXT = "write the text as a string"
FROM_IMAGES = object()  # instead of a path: the block only marks the position, and the row lists the path under image or images

Read = tuple[Turn, tuple[ImageReference, ...]]


def read_turns(row: Row, key: str, add_problem: AddProblem) -> tuple[tuple[Turn, ...] | None, tuple[ImageReference, ...]]:
    """The messages under `key`, None if one of them cannot be parsed; and the images in their blocks."""
    if not isinstance(row[key], list) or not row[key]:
        fix = 'write a list of messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        add_problem(key, "is empty" if row[key] == [] else f"is {kind(row[key])}, not a list of messages", fix)
        return None, ()
    read = [read_turn(item, f"{key}[{index}]", add_problem) for index, item in enumerate(row[key])]
    images = tuple(image for found in read if found for image in found[1])
    return (tuple(found[0] for found in read if found) if all(read) else None), images


def read_turn(item: Any, field: str, add_problem: AddProblem) -> Read | None:
    if not isinstance(item, dict):
        add_problem(field, f"is {kind(item)}, not an object", 'give it "from" and "value", or "role" and "content"')
        return None
    role_key = "from" if "from" in item else "role" if "role" in item else ""
    text_key = "value" if "value" in item else "content" if "content" in item else ""
    if not role_key or not text_key:
        add_problem(field, f"has the keys {keys_of(item)}", 'give it "from" and "value", or "role" and "content"')
        return None
    role = item[role_key]
    if not isinstance(role, str) or role not in ROLES:
        add_problem(f"{field}.{role_key}", f"unknown role {quote(role)}", f"valid roles: {', '.join(ROLES)}")
        return None
    content = read_content(item[text_key], f"{field}.{text_key}", add_problem)
    in_loss = read_loss(item, ROLES[role], field, add_problem) if "loss" in item else True
    if content is None or in_loss is None:
        return None
    parts = isinstance(item[text_key], list)
    return Turn(role=ROLES[role], content=content[0], field=field, text_key=text_key, in_loss=in_loss, in_parts=parts), content[1]


def read_loss(item: Row, role: Role, field: str, add_problem: AddProblem) -> bool | None:
    """ms-swift: an answer with `loss: false` is context and not trained on."""
    loss = item.get("loss")
    if loss is None:
        return True
    if not isinstance(loss, bool) or (loss and role != "assistant"):
        problem = "only answers can be in the loss" if loss is True else f"is {kind(loss)}, not true or false"
        add_problem(f"{field}.loss", problem, "set it to false to exclude an answer from the loss, or remove the key")
        return None
    return loss


def read_content(value: Any, field: str, add_problem: AddProblem) -> tuple[str, tuple[ImageReference, ...]] | None:
    if isinstance(value, str):
        return value, ()
    if not isinstance(value, list):
        add_problem(field, f"is {kind(value)}, not a string", f"write the text, with {MARK} at the position of each image")
        return None
    blocks = [read_block(block, f"{field}[{index}]", add_problem) for index, block in enumerate(value)]
    if not all(blocks):
        return None
    return "".join(block[0] for block in blocks if block), tuple(block[1] for block in blocks if block and block[1])


def read_block(block: Any, field: str, add_problem: AddProblem) -> tuple[str, ImageReference | None] | None:
    """(text, None) or (MARK, image)."""
    if isinstance(block, str):
        return block, None
    if not isinstance(block, dict):
        add_problem(field, f"is {kind(block)}, not an object", 'write {"type": "text" or "image", ...}')
        return None
    if block.get("type") == "text" or ("type" not in block and "text" in block):
        if not isinstance(block.get("text"), str):
            add_problem(f"{field}.text", f"is {kind(block.get('text'))}, not a string", WRITE_TEXT)
            return None
        return block["text"], None
    given = [key for key in PATH_KEYS if block.get(key) is not None]
    if block.get("type", "image") in IMAGE_TYPES and len(given) <= 1 and (given or "type" in block):
        name = block[given[0]] if given else FROM_IMAGES
        if given and isinstance(name, dict):  # OpenAI: {"type": "image_url", "image_url": {"url": ...}}
            name = name.get("url")
        return MARK, ImageReference(name=name, field=f"{field}.{given[0]}" if given else field)
    add_problem(field, describe_block(block, given), 'a block is {"type": "text", "text": ...} or {"type": "image", "image": PATH}')
    return None


def describe_block(block: Row, given: list[str]) -> str:
    if len(given) > 1:
        return f"has more than one image path: {' and '.join(given)}"
    if isinstance(block.get("type"), str) and block["type"] not in IMAGE_TYPES:
        return f"has the type {quote(block['type'])}; only text and images are supported"
    return f"has the keys {keys_of(block)}"


def pair(question: Any, answer: Any, fields: tuple[str, str], add_problem: AddProblem) -> tuple[Turn, Turn] | None:
    """A question and its answer, in a format without roles."""
    invalid = [(text, field) for text, field in zip((question, answer), fields, strict=True) if not isinstance(text, str)]
    for text, field in invalid:
        add_problem(field, "is missing" if text is None else f"is {kind(text)}, not a string", WRITE_TEXT)
    if invalid:
        return None
    return Turn(role="user", content=question, field=fields[0]), Turn(role="assistant", content=answer, field=fields[1])


def read_system(row: Row, turns: tuple[Turn, ...] | None, add_problem: AddProblem) -> tuple[Turn, ...] | None:
    """The turns, after the value of the key `system` as a system message, if there is one."""
    text = row.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        add_problem("system", f"is {kind(text)}, not a string", "write the text of the system message")
        return None
    if turns and turns[0].role == "system":
        add_problem("system", f"there is another system message in {turns[0].field}", "keep one of them")
        return None
    return (Turn(role="system", content=text, field="system"), *turns) if turns is not None else None
