"""The rows of several sets: the same for the ranks that read them whole, for those that use an index, and for the data check."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.data.conftest import conversation, with_data
from trainer.contract import DataEntry, InputRefused, TrainSpec
from trainer.data.check import check_data, resolve
from trainer.data.rows.indexed_samples import index_set
from trainer.data.rows.row_choice import choose_rows
from trainer.data.rows.sample import Sample, read_set
from trainer.data.sources.data_set import hash_data_set


@pytest.fixture(autouse=True)
def local_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """a.json with 12 rows, b.jsonl with 8, c.json with 4: an image each, those of c are copies of images of a."""
    for name, rows, first in (("a", 12, 0), ("b", 8, 100), ("c", 4, 200)):
        (tmp_path / name).mkdir()
        listed = [conversation(f"{name}/{number}.png", first + number) for number in range(rows)]
        for number in range(rows):
            colour = (number, 0, 0) if name in "ac" else (0, number, 9)
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{number}.png")
        lines = "\n".join(map(json.dumps, listed))
        (tmp_path / f"{name}.json").write_text(json.dumps(listed)) if name != "b" else (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "meta.json").write_text(
        json.dumps({"one": {"annotation": "a.json", "repeat_time": 2}, "two": {"annotation": "b.jsonl", "repeat_time": 0.5}})
    )
    return tmp_path


A, B, C = DataEntry(file="a.json"), DataEntry(file="b.jsonl"), DataEntry(file="c.json")
# options -> (training rows, held-out rows)
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "a file": ({"train": "a.json"}, 12, 0),
    "a list of one": ({"train": (A,)}, 12, 0),
    "a list": ({"train": (A, B, C)}, 24, 0),
    "a glob": ({"train": "[ac].json"}, 16, 0),
    "a meta file": ({"train": "meta.json"}, 28, 0),
    "repeats": ({"train": (replace(A, repeat=2), replace(B, repeat=0.25))}, 26, 0),
    "a number of samples": ({"train": (replace(A, samples=5), B)}, 13, 0),
    "more samples than rows": ({"train": (replace(B, samples=20),)}, 20, 0),
    "the first of each": ({"train": (A, B), "max_samples": 3}, 6, 0),
    "the first of a meta file": ({"train": "meta.json", "max_samples": 4}, 12, 0),
    "mixed": ({"train": (replace(A, weight=3), replace(B, weight=1)), "mixing": "interleave"}, 16, 0),
    "mixed, all used": (
        {"train": (replace(A, weight=1), replace(B, weight=3)), "mixing": "interleave", "mixing_stop": "all_exhausted"},
        48,
        0,
    ),
    "a split": ({"train": (A, B), "split": 0.25}, 15, 5),
    "a split of rows": ({"train": "b.jsonl", "split": 2}, 6, 2),
    "a split of a meta file": ({"train": "meta.json", "split": 0.25}, 21, 4),
    "a split with copies of images": ({"train": (A, C), "split": 0.25}, 12, 4),
    "files for both": ({"train": (A, B), "evaluation": (C,)}, 20, 4),
    "the same files for both": ({"train": (A, B), "evaluation": (A, B)}, 20, 20),
    "capped, and held out by itself": ({"train": (A, B), "max_samples": 2, "evaluation": "c.json"}, 4, 4),
}


def sides(spec: TrainSpec, folder: Path) -> dict[str, tuple[tuple[Sample, ...], tuple[Sample, ...], str]]:
    """Side -> (the samples that are read whole, those by an index, the hash)."""
    found = {}
    for side in ("train", "evaluation"):
        rows = resolve(spec.data).rows_of(side)  # type: ignore[arg-type]
        if rows is not None:
            samples, problems = read_set(rows, selection=choose_rows(rows))
            assert problems == ()
            indexed = index_set(rows, folder)
            found[side] = samples, tuple(indexed), hash_data_set(rows, indexed.hash_of)
    return found


@pytest.mark.parametrize("name", CASES)
def test_all_ways_to_the_rows_agree(spec: TrainSpec, files: Path, name: str) -> None:
    options, trained, held_out = CASES[name]
    spec = with_data(spec, **options)
    found = sides(spec, files)
    assert len(found["train"][0]) == trained and len(found.get("evaluation", ((),))[0]) == held_out
    assert all(samples == indexed for samples, indexed, _ in found.values())
    report, problems, _ = (lambda each: (each.report, each.problems, each.hashes))(
        check_data(replace(spec, batch=replace(spec.batch, global_batch=1)))
    )
    assert problems == () and (report.train_rows, report.evaluation_rows) == (trained, held_out)
    if spec.data.split:
        images = [
            {hashlib.sha256(path.read_bytes()).hexdigest() for sample in samples for path in sample.images}
            for samples, _, _ in found.values()
        ]
        assert not images[0] & images[1] and report.learning.shared_images == report.learning.shared_rows == 0
    if name == "a file":
        assert found["train"][2] == hashlib.sha256((files / "a.json").read_bytes()).hexdigest()


def test_the_hash_changes_with_what_is_chosen(spec: TrainSpec, files: Path) -> None:
    """And with nothing else: a list of one file is another data set than the file only by its name."""
    made = {name: sides(with_data(spec, **options), files)["train"][2] for name, (options, _, _) in CASES.items()}
    assert made["a file"] == made["a list of one"]
    others = [digest for name, digest in made.items() if name not in ("a list of one", "files for both", "the same files for both")]
    assert len(set(others)) == len(others)
    checked = {seed: check_data(with_data(spec, train=(A, B), split=0.25, split_seed=seed)).report.sha256 for seed in (1, 2)}
    assert checked[1] != checked[2]


def test_images_start_at_the_folder_of_an_entry(spec: TrainSpec, files: Path) -> None:
    (files / "rows").mkdir()
    (files / "b.jsonl").rename(files / "rows/b.jsonl")
    missing = check_data(with_data(spec, train=(A, DataEntry(file="rows/b.jsonl")))).problems
    assert len(missing) == 8
    assert check_data(with_data(spec, train=(A, DataEntry(file="rows/b.jsonl", images=".")))).problems == ()
    assert check_data(with_data(spec, train=(A, DataEntry(file="rows/b.jsonl")), images=str(files))).problems == ()


def test_rows_that_are_not_used_are_not_judged(spec: TrainSpec, files: Path) -> None:
    rows = json.loads((files / "a.json").read_text())
    rows[11]["conversations"].pop()
    (files / "a.json").write_text(json.dumps(rows))
    assert [problem.row for problem in check_data(with_data(spec, train="a.json")).problems] == [12]
    assert check_data(with_data(spec, train="a.json", max_samples=11)).problems == ()


# options -> the problem
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a glob": ({"train": "z*.json"}, "z*.json: matches nothing"),
    "a missing file of a list": ({"train": (A, DataEntry(file="z.json"))}, "z.json: cannot be read: No such file"),
    "a missing file to split": ({"train": "z.json", "split": 0.5}, "z.json: cannot be read: No such file"),
    "a meta file with samples": ({"train": (DataEntry(file="meta.json", samples=3),)}, "meta.json: is a meta file"),
    "a meta file in a glob": ({"train": "[am]*.json"}, "meta.json: is a meta file, which lists sets of its own: it is one of several"),
}


@pytest.mark.parametrize("name", WRONG)
def test_problems_of_finding_files(spec: TrainSpec, files: Path, name: str) -> None:
    options, expected = WRONG[name]
    texts = [str(problem) for problem in check_data(with_data(spec, **options)).problems]
    assert any(expected in text for text in texts), texts


def test_options_that_do_not_fit_the_rows(spec: TrainSpec, files: Path) -> None:
    with pytest.raises(InputRefused, match=r"data\.evaluation=0\.01 holds out no row of 8"):
        check_data(with_data(spec, train="b.jsonl", split=0.01))


def test_a_meta_file_may_ask_for_what_the_run_does(spec: TrainSpec, files: Path) -> None:
    """OpenGVLab/InternVL: internvl_chat_finetune.py, build_datasets. Its conv_style is an option of the script, and a root may be left out."""
    entry = {"annotation": "a.json", "data_augment": True, "max_dynamic_patch": 6, "length": 12, "conv_style": "internvl2_5"}
    (files / "meta.json").write_text(json.dumps({"one": entry}))
    augmented = replace(spec.data.augmentation, jpeg=75)
    found = check_data(with_data(spec, train="meta.json")).problems
    assert [(problem.field, problem.fix.partition(",")[0]) for problem in found] == [
        ("one.data_augment", "set data.augmentation.jpeg=75"),
        ("one.max_dynamic_patch", "set data.max_tiles=6"),
    ]
    assert check_data(with_data(spec, train="meta.json", augmentation=augmented, max_tiles=6)).problems == ()
