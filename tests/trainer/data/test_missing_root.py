"""Images of another machine: what is said about them, and that the override or the command that is given finds them."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.data.conftest import conversation, with_data
from trainer.contract import DataProblem, TrainSpec, describe_groups
from trainer.data.check import check_data


@pytest.fixture(autouse=True)
def local_processor(processor: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


def write_rows(folder: Path, names: list[str]) -> None:
    (folder / "train.json").write_text(json.dumps([conversation(name, number) for number, name in enumerate(names)]))


def draw(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")


def fix_of(spec: TrainSpec) -> str:
    found = check_data(spec)
    (fix,) = {problem.fix for problem in found.problems if problem.row}
    return fix


# names in the rows, folder of the images below tmp_path, whether the folder is given
PLACES: dict[str, tuple[str, str, str]] = {
    "in a folder beside the rows": ("{}.png", "pictures", ""),
    "the given folder is one too deep": ("pictures/{}.png", "pictures", "pictures/deep"),
    "the given folder is another one": ("{}.png", "pictures", "empty"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_override_finds_them(name: str, spec: TrainSpec, tmp_path: Path) -> None:
    pattern, folder, images = PLACES[name]
    draw(tmp_path / folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    write_rows(tmp_path, [pattern.format(number) for number in range(6)])
    given = with_data(spec, images=images)
    assert len(check_data(given).problems) == 6
    fix = fix_of(given)
    assert fix.startswith("all 6 missing paths are in ") and "set data.images=" in fix
    assert check_data(with_data(spec, images=fix.partition("data.images=")[2])).problems == ()


@pytest.mark.parametrize("prefix", ["/home/some-one/data.1+[x]/", "coco/train2017/"])
def test_the_command_writes_rows_that_are_read(prefix: str, spec: TrainSpec, tmp_path: Path) -> None:
    draw(tmp_path / "my pictures")
    write_rows(tmp_path, [f"{prefix}{number}.png" for number in range(6)])
    fix = fix_of(spec)
    command, _, overrides = fix.partition("run ")[2].partition(" and set ")
    subprocess.run(["sh", "-c", command], check=True)
    given = dict(part.removeprefix("data.").split("=", 1) for part in shlex.split(overrides))
    assert check_data(with_data(spec, **given)).problems == ()


def test_escaped_slashes_are_not_given_to_sed(spec: TrainSpec, tmp_path: Path) -> None:
    draw(tmp_path / "pictures")
    write_rows(tmp_path, [f"/home/someone/{number}.png" for number in range(6)])
    file = tmp_path / "train.json"
    file.write_text(file.read_text().replace("/home", "\\/home"))
    assert "sed" not in fix_of(spec) and "files of the same names are in" in fix_of(spec)


def test_what_is_found_nowhere(spec: TrainSpec, tmp_path: Path) -> None:
    write_rows(tmp_path, [f"/home/someone/data/{number}.png" for number in range(6)])
    fix = fix_of(spec)
    assert "all 6 missing paths are in /home/someone/data, which is no folder here, and no files of these names are in" in fix
    assert "write the paths relative to the folder of the images" in fix, "data.images does not change whole paths"


def test_an_override_that_loses_other_images_is_not_given(spec: TrainSpec, tmp_path: Path, write_data: Callable[..., Path]) -> None:
    write_data(2)
    draw(tmp_path / "pictures", 12)
    for number in (0, 1):
        (tmp_path / f"pictures/{number}.png").unlink()
    write_rows(tmp_path, [f"{number}.png" for number in range(12)])
    assert "set data.images=" not in fix_of(spec)


def test_one_missing_image_keeps_its_own_fix(spec: TrainSpec, tmp_path: Path, write_data: Callable[..., Path]) -> None:
    write_data(6)
    (tmp_path / "3.png").unlink()
    assert fix_of(spec).startswith("put the file there, or set data.images")


def test_one_cause_is_one_entry(spec: TrainSpec, tmp_path: Path) -> None:
    write_rows(tmp_path, [f"/home/someone/data/{number}.png" for number in range(300)])
    (text,) = describe_groups(check_data(spec).problems, 20)
    assert len(text.splitlines()) == 3 and "300 rows (1, 2, 3, ...)" in text and text.count("/home/someone/data/") == 3


def test_long_values_are_shortened_everywhere(spec: TrainSpec, tmp_path: Path) -> None:
    """80 kB for each of 40 rows, as an image in base64 where its path is expected, and as other values."""
    long = "QUJD" * 20_000
    broken = (
        {"image": long, "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": long, "value": "?"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": [{"type": long}]}, {"from": "gpt", "value": "a"}]},
        {f"{key} {long[:200]}": key for key in range(4000)},
        {long: 1},
        {"images": {long: long}, "messages": [{long: long}]},
    )
    (tmp_path / "train.json").write_text(json.dumps(broken * 40))
    problems = check_data(spec).problems
    assert len(problems) >= 240 and max(len(str(problem)) for problem in problems) < 6000
    assert len("\n".join(describe_groups(problems, 20))) < 20_000


def test_a_long_file_name_in_a_group() -> None:
    group = [DataProblem(file="a.json", row=row, field="x" * 9999, problem="y" * 9999, fix="z " * 9999) for row in (1, 2, 3, 4)]
    assert len(describe_groups(group, 20)[0]) < 4000
