import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.data.conftest import TOKENS, conversation, with_data
from trainer.contract import DataReport, Expectation, InputRefused, TrainSpec
from trainer.data.check import KEPT_PROBLEMS, examine_data, resolve
from trainer.data.manifest import list_inputs
from trainer.data.media.image import ORIENTATION, Examined


@pytest.fixture(autouse=True)
def tiny_processor(monkeypatch, processor):
    """The tiny tokenizer and 4 tokens per image instead of the processor of a model."""
    monkeypatch.setattr("trainer.data.length.open_processor", lambda spec: processor)


def check_data(spec: TrainSpec) -> DataReport:
    return examine_data(spec)[0]


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, trainer.data.check; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "trainer" in modules
    assert not {"torch", "transformers", "sklearn", "deepspeed"} & set(modules)


def test_good_data(spec, write_data) -> None:
    write_data(5), write_data(3, "held-out.json")
    report = check_data(with_data(spec, evaluation="held-out.json"))
    assert (report.train_rows, report.evaluation_rows, report.images, report.problems) == (5, 3, 5, ())


def test_digits_are_written_and_checked(spec, tmp_path) -> None:
    spec = with_data(spec, builtin="digits", root=str(tmp_path / "data"), train="", evaluation="", images="")
    report = check_data(spec)
    assert (report.train_rows, report.evaluation_rows, report.images, report.problems) == (1500, 297, 1797, ())
    assert check_data(spec) == report


def test_the_hash_covers_files_and_images_in_order(spec, write_data, tmp_path) -> None:
    file = write_data(2)
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, tmp_path / "0.png", tmp_path / "1.png")]
    assert check_data(spec).sha256 == hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.mark.parametrize("change", ["an image", "an answer", "the held-out file"])
def test_any_change_changes_the_hash(spec, write_data, tmp_path, change) -> None:
    write_data(3), write_data(2, "held-out.json")
    spec = with_data(spec, evaluation="held-out.json")
    before = check_data(spec).sha256
    if change == "an image":
        (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes())
    else:
        name = "train.json" if change == "an answer" else "held-out.json"
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("number 1", "number 9"))
    assert check_data(spec).sha256 != before


def test_the_folder_does_not_change_the_hash(spec, write_data, tmp_path) -> None:
    write_data(3)
    before = check_data(spec).sha256
    (tmp_path / "elsewhere").mkdir()
    for path in [*tmp_path.glob("*.png"), tmp_path / "train.json"]:
        path.rename(tmp_path / "elsewhere" / path.name)
    assert check_data(with_data(spec, root=str(tmp_path / "elsewhere"))).sha256 == before


def test_problems_of_rows_images_and_template_are_sorted_by_row(spec, write_data, tmp_path) -> None:
    file = write_data(5)
    rows = json.loads(file.read_text())
    rows[0]["conversations"].pop()
    rows[2]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    rows[4]["image"] = "absent.png"
    file.write_text(json.dumps(rows))
    (tmp_path / "1.png").write_text("not an image")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    report = check_data(spec)
    found = [(problem.row, problem.problem) for problem in report.problems]
    assert [row for row, _ in found] == [1, 2, 3, 4, 5]
    for (_, problem), text in zip(
        found,
        ["without an answer", "1.png is not an image", "does not support a system message", "3.png is truncated", "absent.png"],
        strict=True,
    ):
        assert text in problem
    assert report.train_rows == 3


def test_an_image_of_many_rows_is_examined_once(spec, write_data, tmp_path, monkeypatch) -> None:
    write_data(1)
    (tmp_path / "train.json").write_text(json.dumps([conversation("0.png", number) for number in range(30)]))
    opened = []
    monkeypatch.setattr("trainer.data.sample_check.examine_image", lambda path, **_: opened.append(path) or Examined(sha256=""))
    assert check_data(spec).images == 1
    assert opened == [tmp_path / "0.png"]


def test_many_problems_are_counted_not_listed(spec, tmp_path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([conversation("absent.png", number) for number in range(KEPT_PROBLEMS + 7)]))
    problems = check_data(spec).problems
    assert len(problems) == KEPT_PROBLEMS + 1
    assert problems[-1].problem == "7 more problems"


def test_an_image_that_is_deleted_after_reading(spec, write_data, tmp_path, monkeypatch) -> None:
    write_data(1)
    monkeypatch.setattr("trainer.data.rows.row_check.is_file", lambda _: True)
    (tmp_path / "0.png").unlink()
    (problem,) = check_data(spec).problems
    assert "0.png cannot be read: No such file" in problem.problem


def test_a_missing_file_is_a_problem(spec, tmp_path) -> None:
    (problem,) = check_data(spec).problems
    assert str(problem).startswith(f"{tmp_path}/train.json: cannot be read: No such file")


def test_a_spec_without_data_is_refused(spec) -> None:
    with pytest.raises(InputRefused, match=r"stage full needs data.train, which is empty"):
        check_data(with_data(spec, train=""))
    evaluation = replace(spec, stage=replace(spec.stage, name="evaluate", kind="evaluate"))
    with pytest.raises(InputRefused, match=r"stage evaluate needs data.evaluation"):
        check_data(evaluation)
    with pytest.raises(InputRefused, match=r"data.builtin='letters' is not known\n    valid values: digits"):
        check_data(with_data(spec, builtin="letters"))


def test_a_root_that_cannot_be_written(spec, tmp_path) -> None:
    (tmp_path / "file").write_text("a file instead of a folder")
    with pytest.raises(InputRefused, match=r"data.root=.*/file: cannot write the built-in set digits: .*\n    free disk space"):
        check_data(with_data(spec, builtin="digits", root=str(tmp_path / "file"), train=""))


def test_an_evaluation_reads_only_the_held_out_rows(spec, write_data) -> None:
    write_data(2, "held-out.json")
    evaluation = replace(with_data(spec, train="", evaluation="held-out.json"), stage=replace(spec.stage, kind="evaluate"))
    report = check_data(evaluation)
    assert (report.train_rows, report.evaluation_rows, report.problems) == (0, 2, ())


# (builtin, train, evaluation, images) -> (train, evaluation, images)
PATHS = {
    ("digits", "", "", ""): ("/data/digits/train.json", "/data/digits/evaluation.json", "/data/digits"),
    ("", "a.json", "", "pictures"): ("/data/a.json", None, "/data/pictures"),
    ("", "sub/a.json", "b.json", ""): ("/data/sub/a.json", "/data/b.json", None),
    ("", "/x/a.json", "/y/b.json", "/z"): ("/x/a.json", "/y/b.json", "/z"),
    ("", "", "/y/b.json", ""): (None, "/y/b.json", None),
}


@pytest.mark.parametrize("given", PATHS)
def test_paths(spec, given) -> None:
    builtin, train, evaluation, images = given
    paths = resolve(with_data(spec, root="/data", builtin=builtin, train=train, evaluation=evaluation, images=images).data)
    expected = tuple(Path(path) if path else None for path in PATHS[given])
    assert (paths.train, paths.evaluation, paths.images) == expected


def test_the_summary(spec, tmp_path) -> None:
    rows = [conversation("photo.jpg", 1), conversation("drawing.png", 2), conversation("photo.jpg", 3), conversation("lying.jpg", 4)]
    rows.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}]})
    rows.append(conversation("absent.png", 5))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    Image.new("CMYK", (30, 20)).save(tmp_path / "photo.jpg")
    Image.new("P", (10, 50)).save(tmp_path / "drawing.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    Image.new("RGB", (40, 20)).save(tmp_path / "lying.jpg", exif=exif)
    report = check_data(spec)
    summary = report.summary
    assert (report.train_rows, report.images, report.problem_count) == (5, 3, 1)
    assert (summary.rows, summary.rows_with_images) == (5, 4)
    assert (summary.smallest, summary.largest) == ((10, 50), (20, 40))
    assert summary.conversions == {"CMYK": 1, "palette": 1, "turned by EXIF": 1}
    assert summary.image_tokens == 4 * TOKENS
    assert 0 < summary.length_p50 <= summary.length_p95 == summary.length_max < summary.tokens
    assert summary.unmeasured == ""


def test_too_long_samples_and_end_marks_in_messages_are_problems_of_their_rows(spec, write_data, tmp_path) -> None:
    file = write_data(4)
    rows = json.loads(file.read_text())
    rows[1]["conversations"][1]["value"] = "word " * 300
    rows[2]["conversations"][1]["value"] = "It is </s> this."
    rows[3]["conversations"][0]["value"] = "<image> What does </s> mean?"
    file.write_text(json.dumps(rows))
    first, second, third = check_data(spec).problems
    assert (first.row, second.row, third.row) == (2, 3, 4)
    assert "(4 of them for images) are more than data.max_length=256" in first.problem
    assert second.problem == "message 2 (assistant) contains the end mark '</s>': the model would learn to stop there"
    assert third.problem == "message 1 (user) contains the end mark '</s>': the model would read it as the end of the turn"


def test_problems_of_repeated_rows_are_reported_once(spec, write_data, tmp_path) -> None:
    write_data(2, "rows.json")
    (tmp_path / "1.png").write_text("not an image")
    (tmp_path / "train.json").write_text(json.dumps({"set": {"annotation": "rows.json", "repeat_time": 3}}))
    report = check_data(spec)
    assert (report.train_rows, report.images, report.problem_count, report.summary.rows) == (6, 2, 1, 2)
    before = report.sha256
    (tmp_path / "rows.json").write_text((tmp_path / "rows.json").read_text() + " ")
    assert check_data(spec).sha256 != before, "the hash covers the files that the meta file lists"


# (rows, global batch, ranks, planned rows) -> (problem, fix), or nothing
COUNTS = {
    (4, 4, 1, 0): (),
    (4, 4, 2, 4): (),
    (4, 8, 1, 0): (
        "has 4 rows, fewer than stage.global_batch=8: a step would train on the same row twice",
        "set stage.global_batch=4 or less",
    ),
    (5, 8, 2, 0): ("has 5 rows, fewer than stage.global_batch=8", "set stage.global_batch=4 or less"),
    (1, 8, 2, 0): ("has 1 rows, fewer than", "add rows, or use fewer devices: each of 2 ranks needs one"),
    (4, 2, 1, 5): ("has 4 rows, but run.epochs was turned into", "launch it again with data.rows=4"),
}


@pytest.mark.parametrize("given", COUNTS)
def test_the_number_of_rows(spec, write_data, given) -> None:
    rows, batch, ranks, planned = given
    write_data(rows)
    changed = replace(
        with_data(spec, rows=planned), batch=replace(spec.batch, global_batch=batch), device=replace(spec.device, world_size=ranks)
    )
    found = check_data(changed).problems
    assert [(problem.row, problem.problem.startswith(COUNTS[given][0]), problem.fix) for problem in found] == (
        [(0, True, COUNTS[given][1])] if COUNTS[given] else []
    )
    again = replace(changed, expects=Expectation(run_id="earlier"))
    assert check_data(again).problems == (), "a rerun repeats what its record did"
    assert check_data(replace(again, accepted_changes=("steps",))).problems == (), "and so does a run that is resumed"
    assert check_data(replace(again, accepted_changes=("data",))).problems == found, "other data must have the rows of a batch"


def test_without_a_folder_of_images_each_file_has_its_own(spec, write_data, tmp_path) -> None:
    """Two files of the same name, with images of the same names, in two folders."""
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "0.png")
        (tmp_path / folder / "rows.json").write_text(json.dumps([conversation("0.png", 1)]))
    both = replace(with_data(spec, train="one/rows.json", evaluation="two/rows.json", images=""), batch=replace(spec.batch, global_batch=1))
    report, _, hashes = examine_data(both)
    assert (report.problems, report.images, report.train_rows, report.evaluation_rows) == ((), 2, 1, 1)
    listed = list_inputs(both, resolve(both.data), hashes).data
    assert set(listed) == {"rows.json", "0.png", "two/rows.json", "two/0.png"} and len(set(listed.values())) == 3


def test_adjusted_rows_are_counted(spec, write_data) -> None:
    file = write_data(4)
    rows = json.loads(file.read_text())
    for row in rows[:2]:
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "")
        row["conversations"][1]["value"] += " </s>"
    file.write_text(json.dumps(rows))
    report = check_data(spec)
    assert (report.problems, set(report.summary.adjustments.values()), len(report.summary.adjustments)) == ((), {2}, 2)


def test_rows_of_text_alone_need_no_folder_of_images(spec, tmp_path) -> None:
    turns = [{"role": "user", "content": "Say one"}, {"role": "assistant", "content": "One"}]
    (tmp_path / "train.json").write_text(json.dumps([{"messages": turns}] * 4))
    report = check_data(with_data(spec, images=""))
    assert (report.problems, report.train_rows, report.images, report.summary.rows_with_images) == ((), 4, 0, 0)


@pytest.mark.parametrize(("rule", "adjusted"), [("row", 0), ("default", 1), ("none", 1), ("Be brief.", 1)])
def test_system_messages_of_rows_that_are_not_used_are_counted(rule: str, adjusted: int, spec: TrainSpec, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rows = [{"messages": [{"role": "system", "content": "Own."}, *turns]}, {"messages": [{"role": "user", "content": "Ho"}, turns[1]]}]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    framed = replace(spec, model=replace(spec.model, template=replace(spec.model.template, system_frame="{content} ")))
    framed = replace(framed, batch=replace(framed.batch, global_batch=2))
    report, problems, _ = examine_data(with_data(framed, system=rule))
    assert problems == ()
    assert sum(report.summary.adjustments.values()) == adjusted
    if rule != "default":
        return
    plain = replace(spec, batch=framed.batch)  # the template has no place for it, and data.system=default leaves it out
    assert examine_data(with_data(plain, system="default"))[1] == ()
    (problem,) = examine_data(with_data(plain, system="row"))[1]
    assert "data.system=default" in problem.fix
