"""The shapes of JSON files: which rows each has, with which numbers, and how its broken forms are refused. The launcher counts the same rows."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.data.row_count import count_rows
from trainer.data.containers.annotation import read_rows
from trainer.data.rows.indexed_samples import index_samples
from trainer.data.rows.sample import read_samples


def talk(text: str, **more: Any) -> dict[str, Any]:
    return {**more, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "é"}]}


A, B, C = talk("a"), talk("b"), talk("c")
PAIR = {"query": "a", "response": "b"}
GOOD: dict[str, tuple[str, str, list[tuple[int, Any]]]] = {
    "objects over several lines, by the line of each": ("a.jsonl", f"{json.dumps(PAIR, indent=1)}\n\n{json.dumps(A)}\n", [(1, PAIR), (6, A)]),
    "the same in .json": ("a.json", "\n".join(json.dumps(row, indent=2) for row in (PAIR, PAIR)), [(1, PAIR), (5, PAIR)]),
    "one object over several lines": ("a.json", json.dumps(A, indent=1), [(1, A)]),
    "objects next to each other": ("a.jsonl", f"{json.dumps(A)} {json.dumps(B)}{json.dumps(C)}", [(1, A), (1, B), (1, C)]),
    "lines that end with a carriage return alone": ("a.jsonl", "\r".join(map(json.dumps, (A, B))), [(1, A), (2, B)]),
    "a list saved as .jsonl": ("a.jsonl", json.dumps([A, B], indent=1), [(1, A), (2, B)]),
    "a list saved as .jsonl, a row a line": ("a.jsonl", f"[{json.dumps(A)},\n{json.dumps(B)}]\n", [(1, A), (2, B)]),
    "a list on a line of .jsonl is conversations of a row": ("a.jsonl", json.dumps([A, B]), [(1, [A, B])]),
    "lines saved as .json": ("a.json", f"{json.dumps(A)}\n{json.dumps(B)}", [(1, A), (2, B)]),
    "under data": ("a.json", json.dumps({"data": [A, B]}), [(1, A), (2, B)]),
    "under data, over several lines": ("a.json", json.dumps({"version": 1, "data": [A, B]}, indent=2), [(1, A), (2, B)]),
    "under any key": ("a.json", json.dumps({"coco_chat": [PAIR]}), [(1, PAIR)]),
    "under train, with keys that are not known": ("a.json", json.dumps({"train": [{"q": "a", "r": "b"}]}), [(1, {"q": "a", "r": "b"})]),
    "by id": ("a.json", json.dumps({"x1": PAIR, "x2": PAIR}), [(1, {"id": "x1", **PAIR}), (2, {"id": "x2", **PAIR})]),
    "by id, where the rows have one": ("a.json", json.dumps({"x1": {"id": 7, **PAIR}}), [(1, {"id": 7, **PAIR})]),
    "by column": ("a.json", json.dumps({"query": ["a", "a"], "response": ["b", "b"]}, indent=1), [(1, PAIR), (2, PAIR)]),
    "by column, messages": ("a.json", json.dumps({"messages": [A["messages"], B["messages"]], "images": [[], []]}), [
        (1, {**A, "images": []}), (2, {**B, "images": []}),
    ]),
    "by column and index, as pandas": ("a.json", json.dumps({"query": {"0": "a"}, "response": {"0": "b"}}), [(1, PAIR)]),
    "a row whose lists have equal lengths": ("a.jsonl", json.dumps({**A, "images": ["a", "b"]}), [(1, {**A, "images": ["a", "b"]})]),
    "a single row": ("a.jsonl", json.dumps({"data": "x", **PAIR}), [(1, {"data": "x", **PAIR})]),
    "lines that look like wrappers": ("a.jsonl", f"{json.dumps({'data': [A]})}\n{json.dumps(B)}", [(1, {"data": [A]}), (2, B)]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_rows_and_their_numbers(tmp_path: Path, name: str) -> None:
    file, text, rows = GOOD[name]
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    assert read_rows(tmp_path / file) == (tuple(rows), ())
    assert count_rows(tmp_path / file) == sum(len(row) if isinstance(row, list) else 1 for _, row in rows)


@pytest.mark.parametrize("name", [name for name, (_, _, rows) in GOOD.items() if "messages" in str(rows) and "wrappers" not in name])
def test_large_files_have_the_same_samples_by_index(tmp_path: Path, name: str) -> None:
    file, text, _ = GOOD[name]
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    samples, problems = read_samples(tmp_path / file, tmp_path)
    if not problems:
        assert tuple(index_samples(tmp_path / file, tmp_path, tmp_path)) == samples


ENCODED = {
    "gzip": ("a.json.gz", lambda text: gzip.compress(text.encode())),
    "gzip without its name": ("a.json", lambda text: gzip.compress(text.encode())),
    "bzip2": ("a.json.bz2", lambda text: bz2.compress(text.encode())),
    "xz": ("a.json.xz", lambda text: lzma.compress(text.encode())),
    "UTF-16": ("a.json", lambda text: text.encode("utf-16")),
    "UTF-16, the other order": ("a.json", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
    "UTF-32": ("a.json", lambda text: text.encode("utf-32")),
    "gzip of UTF-16": ("a.json.gz", lambda text: gzip.compress(text.encode("utf-16"))),
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("shape", ["list", "lines", "csv"])
def test_compressed_and_other_encodings(tmp_path: Path, name: str, shape: str) -> None:
    file, encode = ENCODED[name]
    texts = {"list": json.dumps([A, B], ensure_ascii=False), "lines": f"{json.dumps(A, ensure_ascii=False)}\n{json.dumps(B)}\n"}
    texts |= {"csv": "query,response\né,b\né,c\n"}
    path = tmp_path / file.replace("json", {"list": "json", "lines": "jsonl", "csv": "csv"}[shape])
    path.write_bytes(encode(texts[shape]))
    rows, problems = read_rows(path)
    assert problems == () and len(rows) == count_rows(path) == 2 and "é" in str(rows)
    assert tuple(index_samples(path, tmp_path, tmp_path)) == read_samples(path, tmp_path)[0]


def test_zstd(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads zstd, and is not installed in this environment")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pyarrow.Codec("zstd").compress(f"{json.dumps(A)}\n{json.dumps(B)}\n".encode(), asbytes=True))
    assert [row for _, row in read_rows(path)[0]] == [A, B]


BAD: dict[str, tuple[str, bytes, int, str, str]] = {
    "rows under two keys": ("a.json", json.dumps({"train": [A], "test": [B]}).encode(), 0, "several keys: 'train' (1), 'test' (1)", "one list of rows"),
    "a wrapper with another list": ("a.json", json.dumps({"data": [A], "names": ["x"]}).encode(), 0, "other lists under 'names'", "one list of rows"),
    "columns of unequal lengths": ("a.json", b'{"query": ["a", "b"], "response": ["c"]}', 0, "'query' 2, 'response' 1", "one list of rows"),
    "by id, and something else": ("a.json", json.dumps({"x": PAIR, "info": {"by": 1}}).encode(), 0, "'info' is not a row", "one list of rows"),
    "an object without rows": ("a.json", b'{\n"a": {"b": 1}\n}', 0, "a single JSON object, not a list of rows; its keys: 'a'", "into a list"),
    "a comma between objects": ("a.jsonl", b'{\n"query": "a"},\n{"query": "b"}', 0, "Expecting value at line 2", "without commas"),
    "an object cut off": ("a.jsonl", b'{\n"query": "a"}\n{\n"query":', 0, "Expecting value at line 4", "one complete JSON object"),
    "a broken first line of lines": ("a.jsonl", b'{"query":\n{"query": "a"}\n', 1, "Expecting value", "one complete JSON object per line"),
    "a key twice": ("a.json", b'[{"query": "a", "query": "b"}]', 1, "the key 'query' is given twice, with different values", "keep one"),
    "a key twice, inside": ("a.jsonl", b'{"m": [{"role": "user", "role": "assistant"}]}', 1, "'role' is given twice", "keep one"),
    "UTF-16 without a mark": ("a.json", '[{"a": 1}]'.encode("utf-16-le"), 0, "zero bytes", "save it as UTF-8"),
    "Chinese text of Windows": ("a.json", '[{"a": "中文"}]'.encode("gb18030"), 0, "is not UTF-8 text", "iconv -f GB18030"),
    "gzip cut off": ("a.json.gz", gzip.compress(b"[1, 2]" * 9)[:-12], 0, "cannot be read", "readable files of rows"),
    "gzip with a wrong checksum": ("a.json.gz", gzip.compress(b"[1, 2]")[:-8] + b"\0" * 8, 0, "cannot be read: CRC check failed", "readable"),
    "a number that is too long": ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", 1, "Exceeds the limit", "shorten this value"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_with_place_and_fix(tmp_path: Path, name: str) -> None:
    file, content, row, expected, fix = BAD[name]
    (tmp_path / file).write_bytes(content)
    _, problems = read_rows(tmp_path / file)
    assert [problem.row for problem in problems] == [row]
    assert expected in problems[0].problem and fix in problems[0].fix and problems[0].file == str(tmp_path / file)


def test_a_key_twice_with_the_same_value_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"query": "a", "query": "a"}]')
    assert read_rows(tmp_path / "a.json") == (((1, {"query": "a"}),), ())
