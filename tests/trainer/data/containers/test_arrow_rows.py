"""parquet and Arrow files, written here by pyarrow: their rows, images as bytes, and damaged files."""

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.plan.data.row_count import count_rows
from trainer.contract import InputRefused
from trainer.data.containers.annotation import read_rows
from trainer.data.media.store import MediaStore
from trainer.data.rows.indexed_samples import index_samples
from trainer.data.rows.sample import read_samples

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed in this environment")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")


def png(shade: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (12, 12), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def talk(text: str, **more: Any) -> dict[str, Any]:
    return {**more, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "é"}]}


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    table = pyarrow.Table.from_pylist(rows, **options)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".feather":
        with ipc.new_file(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    else:
        with ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    return path


KINDS = ["a.parquet", "a.feather", "a.arrow"]
IMAGE = {"bytes": png(1), "path": "one.png"}
KEPT = object()  # stands for the path of the file with the bytes of png(1)
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nested structs": (talk("a", id=1), talk("a", id=1)),
    "an image of the datasets library": (talk("<image>a", image=IMAGE), talk("<image>a", image=KEPT)),
    "a list of them": (talk("a", images=[IMAGE, IMAGE]), talk("a", images=[KEPT, KEPT])),
    "bytes": (talk("a", image=png(1)), talk("a", image=KEPT)),
    "a list of bytes": (talk("a", images=[png(1)]), talk("a", images=[KEPT])),
    "a path": (talk("a", image={"bytes": None, "path": "a.png"}), talk("a", image={"path": "a.png"})),
    "nulls are missing keys": (talk("a", loss=None, system=None), talk("a")),
    "a list in JSON": (
        {"conversations": json.dumps([{"from": "human", "value": "a"}])},
        {"conversations": [{"from": "human", "value": "a"}]},
    ),
    "a struct of lists": ({"messages": {"role": ["user"], "content": ["a"]}}, {"messages": [{"role": "user", "content": "a"}]}),
    "numbers": ({"id": 7, "query": "a", "weight": 0.5, "good": True}, {"id": 7, "query": "a", "weight": 0.5, "good": True}),
}


def with_path(value: Any, path: str) -> Any:
    if value is KEPT:
        return path
    if isinstance(value, dict):
        return {key: with_path(item, path) for key, item in value.items()}
    return [with_path(item, path) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_rows(tmp_path: Path, kind: str, name: str) -> None:
    given, expected = GOOD[name]
    file, store = write(tmp_path / kind, [given] * 7), MediaStore(folders=(tmp_path / "media",))
    rows, problems = read_rows(file, store)
    digest = hashlib.sha256(png(1)).hexdigest()
    path = tmp_path / "media" / digest[:2] / f"{digest}.png"
    assert problems == () and rows == tuple((number, with_path(expected, str(path))) for number in range(1, 8))
    assert count_rows(file) == 7
    assert path.exists() == (with_path(expected, "x") != with_path(expected, "y"))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_same_rows_in_json(tmp_path: Path, kind: str) -> None:
    shades = [number % 3 for number in range(8)]
    for shade in range(3):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    file = write(tmp_path / kind, [talk(f"{n}?", id=str(n), image={"bytes": png(shade), "path": None}) for n, shade in enumerate(shades)])
    plain = tmp_path / "a.json"
    plain.write_text(json.dumps([talk(f"{n}?", id=str(n), image=f"{shade}.png") for n, shade in enumerate(shades)]))
    store = MediaStore(folders=(tmp_path / "media",))
    samples, problems = read_samples(file, tmp_path, store=store)
    expected, _ = read_samples(plain, tmp_path)
    assert problems == () and [sample.messages for sample in samples] == [sample.messages for sample in expected]
    assert [[path.read_bytes() for path in each.images] for each in samples] == [
        [path.read_bytes() for path in each.images] for each in expected
    ]
    assert len(list((tmp_path / "media").glob("*/*"))) == 3, "each image once"
    indexed = index_samples(file, tmp_path, tmp_path, store)
    assert tuple(indexed) == samples and indexed.hash_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_rows_that_name_kept_images_go_with_them(tmp_path: Path) -> None:
    """Also after the folder with the images was removed: the rows are then read from the table again."""
    file, store = write(tmp_path / "a.parquet", [talk("a", image=png(1))]), MediaStore(folders=(tmp_path / "media",))
    (first,) = index_samples(file, tmp_path, tmp_path, store)
    (tmp_path / "media").rename(tmp_path / "gone")
    (again,) = index_samples(file, tmp_path, tmp_path, store)
    assert again == first and again.images[0].read_bytes() == png(1)


def corrupt(file: Path, offset: int, size: int = 8) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + size] = bytes(255 - byte for byte in content[offset : offset + size])
    file.write_bytes(content)


def test_a_corrupt_page_is_reported_after_the_rows_before_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [talk(f"{number} " + "x" * 500) for number in range(9)])
    group = parquet.ParquetFile(file).metadata.row_group(2)
    corrupt(file, group.column(0).dictionary_page_offset or group.column(0).data_page_offset, 12)
    _, (problem,) = read_rows(file)
    assert problem.row == 0 and "cannot be read" in problem.problem and "copy it again" in problem.fix
    with pytest.raises(InputRefused, match="cannot be read"):
        index_samples(file, tmp_path, tmp_path, MediaStore(folders=(tmp_path / "media",)))
    assert not list((tmp_path / "media" / "rows").glob("*.rows")), "no incomplete index is kept"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_that_is_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    file = write(tmp_path / kind, [talk(f"{number} " + "x" * 500) for number in range(9)])
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    rows, (problem,) = read_rows(file)
    assert rows == () and problem.row == 0 and "cannot be read" in problem.problem


def test_offsets_of_an_arrow_file_are_not_trusted(tmp_path: Path) -> None:
    """An offset beyond the texts would read other memory of the process."""
    batch = pyarrow.record_batch({"query": ["abc", "def", "ghi"]})
    with ipc.new_file(str(tmp_path / "a.arrow"), batch.schema) as out:
        out.write_batch(batch)
    content = (tmp_path / "a.arrow").read_bytes()
    before, after = (b"".join(number.to_bytes(4, "little") for number in numbers) for numbers in ((0, 3, 6, 9), (0, 10**6, 6, 9)))
    assert content.count(before) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(before, after))
    _, (problem,) = read_rows(tmp_path / "a.arrow")
    assert "cannot be read" in problem.problem


BAD = {
    "no rows": (pyarrow.table({"query": pyarrow.array([], pyarrow.string())}), 0, "", "has no rows"),
    "an image without bytes": (pyarrow.table({"image": [b""], "query": ["a"]}), 1, "image", "has no bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_without_rows_or_images(tmp_path: Path, name: str) -> None:
    table, row, field, expected = BAD[name]
    parquet.write_table(table, tmp_path / "a.parquet")
    _, (problem,) = read_rows(tmp_path / "a.parquet")
    assert (problem.row, problem.field) == (row, field) and expected in problem.problem


def test_wrong_types_and_missing_columns_are_problems_of_their_rows(tmp_path: Path) -> None:
    rows = [talk("a"), {"messages": None, "query": "a"}, {"messages": None, "query": None}]
    samples, problems = read_samples(write(tmp_path / "a.parquet", rows), tmp_path)
    assert [sample.row for sample in samples] == [1] and {problem.row for problem in problems} == {2, 3}


def test_feather_of_version_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(20))
    _, (problem,) = read_rows(tmp_path / "a.feather")
    assert "version 1" in problem.problem and "as parquet" in problem.fix


def test_without_pyarrow_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", [talk("a")])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    _, (problem,) = read_rows(file)
    assert "without pyarrow" in problem.problem and "pip install 'pyarrow>=17'" in problem.fix
    assert count_rows(file) == 0
