"""The URLs of images in a row, at the places where the formats of rows have images, and the row with paths in their place."""

import re
from collections.abc import Callable, Iterator
from typing import Any

URL = re.compile(r"https?://[^\s<>\"']+", re.IGNORECASE)
IN_TEXT = re.compile(r"(?<=<img>)\s*(https?://[^\s<>]+?)\s*(?=</img>)", re.IGNORECASE)  # QwenLM/Qwen-VL: tokenization_qwen.py
# Keys of rows, of images in a list and of blocks of a message. A URL elsewhere is text.
KEYS = frozenset({"image", "images", "image_url", "image_path", "image_paths", "img", "picture", "pictures"})
INNER = frozenset({"url", "path", "image", "image_url"})  # below one of KEYS: {"image_url": {"url": ...}}


def is_url(value: Any) -> bool:
    return isinstance(value, str) and URL.fullmatch(value.strip()) is not None


def replace_images(value: Any, change: Callable[[str], str], keys: frozenset[str] = KEYS, *, inside: bool = False) -> Any:
    """The row with each image, a URL or a path, replaced by `change`. `inside`: whether the value is of an image."""
    if isinstance(value, str):
        return change(value) if inside else IN_TEXT.sub(lambda found: change(found[1]), value)
    if isinstance(value, list):
        return [replace_images(item, change, keys, inside=inside) for item in value]
    if isinstance(value, dict):
        marks = inside and not set(value) & INNER  # MiniCPM's {"<image_00>": "a.png"}
        return {
            key: replace_images(item, change, keys, inside=key in keys or (inside and (marks or key in INNER)))
            for key, item in value.items()
        }
    return value


def find_images(value: Any, keys: frozenset[str] = KEYS) -> Iterator[str]:
    found: list[str] = []
    replace_images(value, lambda text: found.append(text) or text, keys)  # type: ignore[func-returns-value]
    yield from found


def find_urls(value: Any, keys: frozenset[str] = KEYS) -> Iterator[str]:
    yield from (text.strip() for text in find_images(value, keys) if is_url(text))
