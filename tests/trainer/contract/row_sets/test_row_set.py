"""From what the config says to files: globs, folders, names and copies of a hub's data sets."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.contract import DataEntry, Entries
from trainer.contract.row_sets.row_set import describe_entries, find_sets, is_name, make_places

ROWS = ["a.json", "b.json", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")


def look(folder: Path, entries: Entries, **options: Any) -> tuple[list[list[str]], list[str]]:
    """The files of each set below the folder, and the problems as text."""
    held_out = options.pop("held_out", False)
    given = {"images": "", "info": "", "mirror": "", "environ": {}} | options
    sets, problems = find_sets(entries, make_places(str(folder), **given, held_out=held_out))
    found = [[str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file) for file in each.files] for each in sets]
    return found, [str(problem) for problem in problems]


# files that are there, entries -> the files of each set
FOUND: dict[str, tuple[list[str], Entries, list[list[str]]]] = {
    "a file": (["a.json"], "a.json", [["a.json"]]),
    "a file that is not there": ([], "absent.json", [["absent.json"]]),
    "two files": (["a.json", "b.json"], (DataEntry(file="a.json"), DataEntry(file="b.json")), [["a.json"], ["b.json"]]),
    "the same file twice": (["a.json"], (DataEntry(file="a.json"), DataEntry(file="a.json")), [["a.json"], ["a.json"]]),
    "a glob": (["a-1.jsonl", "a-0.jsonl", "b.jsonl", ".a-2.jsonl", "a-3.txt"], "a-*", [["a-0.jsonl", "a-1.jsonl"]]),
    "a glob through folders": (["x/1/r.json", "x/2/r.json", "y/r.json"], "x/**/r.json", [["x/1/r.json", "x/2/r.json"]]),
    "a file with the signs of a glob": (["a[1].json", "a1.json"], "a[1].json", [["a[1].json"]]),
    "a folder": (["d/b.json", "d/a.jsonl", "d/a.png", "d/dataset_info.json", "d/config.json"], "d", [["d/a.jsonl", "d/b.json"]]),
    "a folder of compressed files": (["d/a.jsonl.gz", "d/b.jsonl"], "d", [["d/a.jsonl.gz", "d/b.jsonl"]]),
    "files below a folder": (["d/x/a.csv", "d/y/b.csv", "d/.git/c.csv"], "d", [["d/x/a.csv", "d/y/b.csv"]]),
    "a repository": (
        ["d/README.md", *(f"d/data/{name}" for name in ROWS[2:])],
        "d",
        [["d/data/train-00000-of-00002.parquet", "d/data/train-00001-of-00002.parquet"]],
    ),
    "splits by folders": (["d/train/0.tar", "d/train/1.tar", "d/valid/0.tar"], "d", [["d/train/0.tar", "d/train/1.tar"]]),
    "an imagefolder": (["d/metadata.jsonl", "d/a.png", "d/b.png"], "d", [["d/metadata.jsonl"]]),
    "an imagefolder with splits": (["d/train/metadata.csv", "d/train/a.png", "d/test/metadata.csv"], "d", [["d/train/metadata.csv"]]),
    "words in the names that are no splits": (["d/trainer.json", "d/contest.json"], "d", [["d/contest.json", "d/trainer.json"]]),
    "a name with a number": (["a.json"], "a.json#500", [["a.json"]]),
    "a file with # in its name": (["a#5"], "a#5", [["a#5"]]),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_files_of_an_entry(tmp_path: Path, name: str) -> None:
    files, entries, expected = FOUND[name]
    write(tmp_path, *files)
    assert look(tmp_path, entries) == (expected, [])


def test_held_out_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, *(f"d/data/{name}" for name in ROWS[2:]), "e/train.json", "e/dev.json", "e/test.json")
    assert look(tmp_path, "d", held_out=True) == ([["d/data/test-00000-of-00001.parquet"]], [])
    assert look(tmp_path, "e", held_out=True) == ([["e/dev.json"]], [])


def test_what_datasets_saved(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, f"d/{split}/data-00000-of-00002.arrow", f"d/{split}/data-00001-of-00002.arrow", f"d/{split}/dataset_info.json")
        names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
        (tmp_path / "d" / split / "state.json").write_text(json.dumps({"_data_files": names, "_split": split}))
    (tmp_path / "d/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    train = [f"d/train/data-0000{number}-of-00002.arrow" for number in range(2)]
    assert look(tmp_path, "d") == look(tmp_path, "d/train") == ([train], [])
    assert look(tmp_path, "d", held_out=True)[0] == [[name.replace("train", "test") for name in train]]
    (tmp_path / train[1]).unlink()
    _, (problem,) = look(tmp_path, "d")
    assert "lacks data-00001-of-00002.arrow, which its state.json lists" in problem


def test_options_of_an_entry(tmp_path: Path) -> None:
    write(tmp_path, "a.json")
    entry = DataEntry(file="a.json", images="pictures", samples=3, repeat=2, weight=0.5)
    places = make_places(str(tmp_path), "all", "", "", {}, held_out=False)
    ((one,), _), ((other,), _) = find_sets((entry,), places), find_sets("a.json#7", places)
    assert (one.images, one.samples, one.repeat, one.weight) == (tmp_path / "pictures", 3, 2, 0.5)
    assert (other.images, other.samples, other.files) == (tmp_path / "all", 7, (tmp_path / "a.json",))
    assert describe_entries((entry,) * 5) == "a.json, a.json, a.json and 2 more" and describe_entries("a") == "a"


# files that are there, entry -> parts of the problem
WRONG: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "a glob that matches nothing": (["a.json"], "b*.json", ("matches nothing", "a.json", "quote it")),
    "a glob below no folder": ([], "x/*.json", ("matches nothing; there is no folder",)),
    "a glob of other files": (["a.png", "b.png"], "*.png", ("matches no file of rows, but a.png, b.png", ".parquet")),
    "a glob of several kinds": (["a.json", "a.csv"], "a.*", ("several kinds: CSV (a.csv), JSON (a.json)",)),
    "a folder of images": (["d/a.png"], "d", ("without a file of rows; it has a.png",)),
    "a folder of several kinds": (["d/a.json", "d/b.parquet"], "d", ("several kinds", "JSON (a.json)", "parquet (b.parquet)", "*.json")),
    "a folder without the split": (["d/test.json"], "d", ("has no split train; it has test",)),
    "files with and without a split": (["d/train.json", "d/more.json"], "d", ("(train.json) and others (more.json)",)),
    "a name that is not known": ([], "mllm_demo", ("neither a file nor a folder", "no dataset_info.json", "data.info=FOLDER")),
    "a name without a copy": (
        [],
        "somebody/llava-en-2k",
        (
            "no copy of a hub's data set somebody/llava-en-2k",
            "huggingface-cli download --repo-type dataset somebody/llava-en-2k --local-dir",
            "modelscope download --dataset somebody/llava-en-2k",
            "data.mirror=",
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_found(tmp_path: Path, name: str) -> None:
    files, entry, parts = WRONG[name]
    write(tmp_path, *files)
    found, (problem,) = look(tmp_path, entry)
    assert found == [] and problem.startswith(f"{entry}: ") and all(part in problem for part in parts), problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("mllm_demo", "somebody/llava-en-2k", "AI-ModelScope/LaTeX_OCR:human#20", "HF::a/b", "OpenBMB/x-1.5")),
        *((text, False) for text in ("rows.json", "./rows", "/srv/rows", "a/b/c", "rows*", "data/rows.txt", "~/rows", "a b.jsonl", "")),
    ],
)
def test_names(text: str, expected: bool) -> None:
    assert is_name(text) == expected


# ---------------------------------------------------------------------------------------------------- dataset_info.json


INFO: dict[str, Any] = {
    "plain": {"file_name": "rows.json"},
    "folder": {"file_name": "several"},
    "some": {"file_name": "rows.json", "num_samples": 20},
    "hub": {"hf_hub_url": "owner/name", "ms_hub_url": "other/name", "subset": "en"},
    "code": {"script_url": "script"},
    "gone": {"file_name": "absent.json"},
}


def test_names_of_a_dataset_info(tmp_path: Path) -> None:
    write(tmp_path, "data/rows.json", "data/several/1.json", "data/several/2.json", "mirror/owner/name/en/train.parquet")
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    assert look(tmp_path, "plain") == look(tmp_path, "plain", info="data") == ([["data/rows.json"]], []), (
        "LLaMA-Factory's own folder is looked in"
    )
    assert look(tmp_path, "folder")[0] == [["data/several/1.json", "data/several/2.json"]]
    assert look(tmp_path, "hub", mirror="mirror") == ([["mirror/owner/name/en/train.parquet"]], [])
    places = make_places(str(tmp_path), "", "data/dataset_info.json", "", {}, held_out=False)
    (found,), _ = find_sets("some", places)
    assert (found.samples, found.images) == (20, tmp_path / "data") and found.info is not None and found.info.name == "some"
    for name, part in {
        "code": "a script is never run",
        "gone": "which is not there",
        "hub": "owner/name",
        "palin": "has plain, folder, some, hub, code, gone",
    }.items():
        found_files, (problem,) = look(tmp_path, name)
        assert found_files == [] and part in problem, problem


def test_names_of_ms_swift(tmp_path: Path) -> None:
    write(tmp_path, "rows.jsonl", "mirror/AI-ModelScope/LaTeX_OCR/human/train.jsonl", "mirror/AI-ModelScope/LaTeX_OCR/synth/train.jsonl")
    listed = [
        {"dataset_path": "rows.jsonl"},
        {"ms_dataset_id": "AI-ModelScope/LaTeX_OCR", "hf_dataset_id": "x/y", "subsets": ["human", "synth"]},
    ]
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    human, synth = (f"mirror/AI-ModelScope/LaTeX_OCR/{name}/train.jsonl" for name in ("human", "synth"))
    name = "AI-ModelScope/LaTeX_OCR"
    assert look(tmp_path, f"{name}:human#5", mirror="mirror") == ([[human]], [])
    assert (
        look(tmp_path, f"{name}:human/synth", mirror="mirror") == look(tmp_path, f"{name}:all", mirror="mirror") == ([[human], [synth]], [])
    )
    assert look(tmp_path, "x/y:human", mirror="mirror") == ([[human]], [])
    for text, part in {name: f"has the subsets human, synth\n    write {name}:human", f"{name}:odd": "has no subset 'odd'"}.items():
        _, (problem,) = look(tmp_path, text, mirror="mirror")
        assert part in problem, problem


def test_a_broken_dataset_info(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    _, (problem,) = look(tmp_path, "mllm_demo")
    assert "dataset_info.json cannot be read" in problem


# ------------------------------------------------------------------------------------------------------------------ hubs


def test_copies_in_the_caches_of_hubs(tmp_path: Path) -> None:
    hub, scope = tmp_path / "hf/hub/datasets--a--b.c", tmp_path / "ms/datasets/a/b___c"
    write(hub, "snapshots/old/train.json", "snapshots/new/train.json")
    os.utime(hub / "snapshots/old", (1, 1))
    write(scope, "train.json")
    both = {"HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms")}
    new, old = (f"hf/hub/datasets--a--b.c/snapshots/{name}/train.json" for name in ("new", "old"))
    assert look(tmp_path, "a/b.c", environ=both) == ([[new]], [])
    write(hub, "refs/main")
    (hub / "refs/main").write_text("old")
    assert look(tmp_path, "a/b.c", environ=both)[0] == look(tmp_path, "HF::a/b.c", environ=both)[0] == [[old]]
    assert look(tmp_path, "MS::a/b.c", environ=both)[0] == [["ms/datasets/a/b___c/train.json"]]
    assert look(tmp_path, "a/b.c", mirror="hf/hub/datasets--a--b.c")[0] == look(tmp_path, "a/b.c", mirror="hf/hub")[0] == [[old]]
    assert look(tmp_path, "a/b.c", mirror="ms")[0] == [["ms/datasets/a/b___c/train.json"]]


def test_subsets_of_a_copy(tmp_path: Path) -> None:
    write(tmp_path, "o/n/en/train-0.parquet", "o/n/de/train-0.parquet", "o/n/de/test-0.parquet")
    assert look(tmp_path, "o/n:de", mirror=".") == ([["o/n/de/train-0.parquet"]], [])
    _, (problem,) = look(tmp_path, "m/n:fr", mirror=".")
    assert "m/n" in problem
