"""Samples that are read by an index are those that are read whole; an index is made once, and again when the file changes."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from trainer.contract import InputRefused
from trainer.data.containers import row_index
from trainer.data.containers.row_index import identity, open_index
from trainer.data.rows import indexed_samples
from trainer.data.rows.indexed_samples import index_samples, open_samples
from trainer.data.rows.sample import read_samples
from trainer.data.sources.source import hash_sources


def talk(number: int, text: str = "") -> dict[str, Any]:
    return {"id": number, "messages": [{"role": "user", "content": f"{number}? {text}"}, {"role": "assistant", "content": "漢字\u2028 ü"}]}


def lines(rows: list[Any], rng: random.Random) -> str:
    written = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    before = ("", "", "\n", "  \n", "\r\n", " ")
    return "".join(f"{rng.choice(before)}{line}\n" for line in written)


def listed(rows: list[Any], rng: random.Random) -> str:
    return rng.choice(["", "\n "]) + json.dumps(rows, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)


@pytest.mark.parametrize("write", [lines, listed])
@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_that_are_read_whole(write, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines, spaces before a row, several conversations in a row, a byte order mark, no line feed at the end, chunks of a few bytes."""
    rng = random.Random(seed)
    monkeypatch.setattr(row_index, "CHUNK_BYTES", rng.choice([7, 64, 2**24]))
    monkeypatch.setattr(row_index, "EDGE_BYTES", rng.choice([9, 2**16]))
    rows: list[Any] = [talk(number, "x" * rng.randint(0, 50)) for number in range(rng.randint(1, 30))]
    if rng.random() < 0.5:
        rows[rng.randrange(len(rows))] = [talk(100), talk(101)]
    text = write(rows, rng)
    file = tmp_path / f"rows.{'jsonl' if write is lines else 'json'}"
    file.write_bytes((b"\xef\xbb\xbf" if rng.random() < 0.5 else b"") + (text.rstrip() if rng.random() < 0.5 else text).encode())
    whole, problems = read_samples(file, tmp_path)
    found = index_samples(file, tmp_path, tmp_path)
    assert problems == () and tuple(found) == whole
    assert found[len(found) - 1] == whole[-1]
    assert hash_sources(file, tmp_path, found.hash_of) == hash_sources(file, tmp_path)
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_meta_file_with_repeated_and_shortened_sets(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 7)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(talk(number, name)) + "\n" for number in range(count)))
    meta = {"a": {"root": "", "annotation": "a.jsonl", "repeat_time": 2}, "b": {"root": "", "annotation": "b.jsonl", "repeat_time": 0.5}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    found = index_samples(tmp_path / "meta.json", tmp_path, tmp_path)
    assert tuple(found) == read_samples(tmp_path / "meta.json", tmp_path)[0] and len(found) == 13
    assert list(found.find_rows({str(tmp_path / "a.jsonl"): {2}, str(tmp_path / "b.jsonl"): {3, 4}})) == [
        (1, str(tmp_path / "a.jsonl"), 2),
        (12, str(tmp_path / "b.jsonl"), 3),
    ]


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "rows.jsonl", tmp_path / "index"
    folder.mkdir()
    file.write_text("".join(json.dumps(talk(number)) + "\n" for number in range(3)))
    first = open_index(file, folder)
    made = row_index.make_index
    monkeypatch.setattr(row_index, "make_index", lambda *_: pytest.fail("made again"))
    assert len(open_index(file, folder)) == len(first) == 3
    monkeypatch.setattr(row_index, "make_index", made)
    before = identity(file)
    stat = file.stat()
    file.write_text("".join(json.dumps(talk(9 - number)) + "\n" for number in range(3)))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and identity(file) != before
    assert open_index(file, folder).read(0)[2]["id"] == 9
    assert len(list(folder.glob("*.rows"))) == 1, "the old index is removed"


def test_a_bad_row_is_named_when_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(talk(1)) + "\n{not json\n" + json.dumps({"messages": []}) + "\n")
    found = index_samples(file, tmp_path, tmp_path)
    assert len(found) == 3 and found[0].id == "1"
    with pytest.raises(InputRefused, match=r"rows\.jsonl row 2: is not valid JSON"):
        found[1]
    with pytest.raises(InputRefused, match=r"rows\.jsonl row 3"):
        found[2]


def test_a_list_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, {"b": 2},]')
    with pytest.raises(InputRefused, match=r"rows\.json: is not valid JSON: .* at line 1 column 21"):
        index_samples(tmp_path / "rows.json", tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.rows")) and not list(tmp_path.glob(".*.rows*"))


def test_only_large_files_are_read_by_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(talk(1)) + "\n")
    assert open_samples(file, tmp_path, tmp_path) is None
    monkeypatch.setattr(indexed_samples, "LARGE_BYTES", 10)
    found = open_samples(file, tmp_path, tmp_path)
    assert found is not None and len(found) == 1
