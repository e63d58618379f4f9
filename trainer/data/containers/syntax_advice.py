"""What is wrong with a file that is not JSON, in the usual cases of files that were written by hand or with Python's str(). An advice is given only
where following it makes this file JSON."""

import ast
import json
import re
from pathlib import Path

USUAL = "JSON requires double quotes and no comma before a closing bracket; to find the error, run: python -m json.tool {file}"
MOST_BYTES = 2**25  # of a file that is looked at; parsing Python's syntax takes 20 times its size in memory
FULL_WIDTH = {"【": "[", "】": "]", "［": "[", "］": "]", "｛": "{", "｝": "}", "：": ":", "，": ",", "＂": '"', "“": '"', "”": '"'}
COMMAS = r",(\s*[\]}])"


def advise(file: Path) -> str:
    """The fix of a list that is not JSON."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return USUAL.format(file=file)
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return USUAL.format(file=file)
    commas = list(re.finditer(COMMAS, text))
    if len(commas) == 1 and is_json(re.sub(COMMAS, r"\1", text)):  # of several, some may be in texts
        return f"remove the comma before the closing bracket in line {text.count(chr(10), 0, commas[0].start()) + 1}"
    if is_python(text):
        return "it is a list as Python writes it, with single quotes or a last comma: write it with json.dump, not with str or print"
    return find_full_width(text) or USUAL.format(file=file)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def is_python(text: str) -> bool:
    """A list that could be written as JSON."""
    try:
        return isinstance(value := ast.literal_eval(text.strip()), list) and is_json(json.dumps(value))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def find_full_width(text: str) -> str:
    """Where a full-width character stands in place of JSON's own."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        for place in (error.pos, len(text[: error.pos].rstrip()) - 1):
            if (near := text[place : place + 1]) and near in FULL_WIDTH:
                line = text.count("\n", 0, place) + 1
                return f"{near} in line {line} is a full-width character: write {FULL_WIDTH[near]} in its place"
    except (ValueError, RecursionError):
        pass
    return ""
