"""Messages: role and text under the names that people use, content as a string or as blocks of text and images."""

from typing import Any

from trainer.data.rows.parsed_row import MARK, Complain, ImageReference, Role, Row, Turn, keys_of, kind

ROLES: dict[str, Role] = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Of a block {"type": "image", KEY: path}: transformers' chat templates know the first three, ms-swift and OpenAI the last.
PATH_KEYS = ("image", "path", "url", "image_url")
IMAGE_TYPES = ("image", "image_url")
FROM_IMAGES = object()  # in place of a path: the block says only that an image stands here, and `images` has it

Read = tuple[Turn, tuple[ImageReference, ...]]


def read_turns(row: Row, key: str, complain: Complain) -> tuple[tuple[Turn, ...] | None, tuple[ImageReference, ...]]:
    """The messages below `key`, None when one of them cannot be understood; and the images that stand in their blocks."""
    if not isinstance(row[key], list) or not row[key]:
        fix = 'give it the messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        complain(key, "is empty" if row[key] == [] else f"is {kind(row[key])}, not a list of messages", fix)
        return None, ()
    read = [read_turn(item, f"{key}[{place}]", complain) for place, item in enumerate(row[key])]
    pictures = tuple(picture for found in read if found for picture in found[1])
    return (tuple(found[0] for found in read if found) if all(read) else None), pictures


def read_turn(item: Any, field: str, complain: Complain) -> Read | None:
    if not isinstance(item, dict):
        complain(field, f"is {kind(item)}, not an object", 'give it "from" and "value", or "role" and "content"')
        return None
    role_key = "from" if "from" in item else "role" if "role" in item else ""
    text_key = "value" if "value" in item else "content" if "content" in item else ""
    if not role_key or not text_key:
        complain(field, f"has the keys {keys_of(item)}", 'give it "from" and "value", or "role" and "content"')
        return None
    role = item[role_key]
    if not isinstance(role, str) or role not in ROLES:
        complain(f"{field}.{role_key}", f"unknown role {role!r}", f"valid are: {', '.join(ROLES)}")
        return None
    content = read_content(item[text_key], f"{field}.{text_key}", complain)
    trained = read_loss(item, ROLES[role], field, complain) if "loss" in item else True
    if content is None or trained is None:
        return None
    return Turn(role=ROLES[role], content=content[0], field=field, text_key=text_key, in_loss=trained), content[1]


def read_loss(item: Row, role: Role, field: str, complain: Complain) -> bool | None:
    """ms-swift: an answer with `loss: false` is read and not learned."""
    loss = item.get("loss")
    if loss is None:
        return True
    if not isinstance(loss, bool) or (loss and role != "assistant"):
        problem = "only answers are learned" if loss is True else f"is {kind(loss)}, not true or false"
        complain(f"{field}.loss", problem, "set it to false to leave an answer out of the loss, or take the key out")
        return None
    return loss


def read_content(value: Any, field: str, complain: Complain) -> tuple[str, tuple[ImageReference, ...]] | None:
    if isinstance(value, str):
        return value, ()
    if not isinstance(value, list):
        complain(field, f"is {kind(value)}, not a string", f"write the text itself, with {MARK} where an image stands")
        return None
    blocks = [read_block(block, f"{field}[{place}]", complain) for place, block in enumerate(value)]
    if not all(blocks):
        return None
    return "".join(block[0] for block in blocks if block), tuple(block[1] for block in blocks if block and block[1])


def read_block(block: Any, field: str, complain: Complain) -> tuple[str, ImageReference | None] | None:
    """Its text, MARK for an image, and the image."""
    if isinstance(block, str):
        return block, None
    if not isinstance(block, dict):
        complain(field, f"is {kind(block)}, not an object", 'give it a "type": "text" or "image"')
        return None
    if block.get("type") == "text" or ("type" not in block and "text" in block):
        if not isinstance(block.get("text"), str):
            complain(f"{field}.text", f"is {kind(block.get('text'))}, not a string", "write the text itself")
            return None
        return block["text"], None
    given = [key for key in PATH_KEYS if block.get(key) is not None]
    if block.get("type", "image") in IMAGE_TYPES and len(given) <= 1 and (given or "type" in block):
        name = block[given[0]] if given else FROM_IMAGES
        if given and isinstance(name, dict):  # OpenAI: {"type": "image_url", "image_url": {"url": ...}}
            name = name.get("url")
        return MARK, ImageReference(name=name, field=f"{field}.{given[0]}" if given else field)
    complain(field, describe_block(block, given), 'a block is {"type": "text", "text": ...} or {"type": "image", "image": PATH}')
    return None


def describe_block(block: Row, given: list[str]) -> str:
    if len(given) > 1:
        return f"has an image under {' and '.join(given)}"
    if isinstance(block.get("type"), str) and block["type"] not in IMAGE_TYPES:
        return f"is a block of the type {block['type']!r}; text and images are read"
    return f"has the keys {keys_of(block)}"


def pair(question: Any, answer: Any, fields: tuple[str, str], complain: Complain) -> tuple[Turn, Turn] | None:
    """A question and its answer, where neither has a role of its own."""
    wrong = [(text, field) for text, field in zip((question, answer), fields, strict=True) if not isinstance(text, str)]
    for text, field in wrong:
        complain(field, "is missing" if text is None else f"is {kind(text)}, not a string", "write the text itself")
    if wrong:
        return None
    return Turn(role="user", content=question, field=fields[0]), Turn(role="assistant", content=answer, field=fields[1])


def read_system(row: Row, turns: tuple[Turn, ...] | None, complain: Complain) -> tuple[Turn, ...] | None:
    """The turns behind the row's own system message, if it has one."""
    text = row.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        complain("system", f"is {kind(text)}, not a string", "write the system message itself")
        return None
    if turns and turns[0].role == "system":
        complain("system", f"there is another system message in {turns[0].field}", "keep one of them")
        return None
    return (Turn(role="system", content=text, field="system"), *turns) if turns is not None else None
