"""What is wrong with a file that is not JSON, in the usual cases of files that were written by hand or with Python's str(), and a command that
writes it again as JSON. The command is given only where it works on this file."""

import ast
import json
import re
import shlex
from pathlib import Path

USUAL = "JSON requires double quotes and no comma before a closing bracket; to find the error, run: python -m json.tool {file}"
MOST_BYTES = 2**25  # of a file that is looked at; parsing Python's syntax takes 20 times its size in memory
FULL_WIDTH = {"【": "[", "】": "]", "［": "[", "］": "]", "｛": "{", "｝": "}", "：": ":", "，": ",", "＂": '"', "“": '"', "”": '"'}
COMMAS = r",(\s*[\]}])"
AS_PYTHON = 'import ast, json, sys; json.dump(ast.literal_eval(open(sys.argv[1], encoding="utf-8-sig").read()), open(sys.argv[2], "w"))'
WITHOUT_COMMA = (
    r'import re, sys; open(sys.argv[2], "w").write(re.sub(r",(\s*[\]}])", r"\1", open(sys.argv[1], encoding="utf-8-sig").read()))'
)


def advise(file: Path) -> str:
    """The fix of a list that is not JSON."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return USUAL.format(file=file)
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return USUAL.format(file=file)
    new = file.with_name(f"{file.stem}_fixed{file.suffix}")
    names = f"{shlex.quote(str(file))} {shlex.quote(str(new))}"
    if len(re.findall(COMMAS, text)) == 1 and is_json(re.sub(COMMAS, r"\1", text)):  # of several, some may be in texts
        return f"a comma stands before a closing bracket; to write the file without it, run: python -c {shlex.quote(WITHOUT_COMMA)} {names}"
    if is_python(text):
        return f"it is a list as Python writes it, with single quotes or a last comma; to write it as JSON, run: python -c {shlex.quote(AS_PYTHON)} {names}"
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
