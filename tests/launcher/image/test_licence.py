"""The table of licences, and the file of those that a user has accepted."""

import json
import multiprocessing
import stat
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.image import licence as module
from launcher.image.licence import (
    accept,
    find_licence,
    find_text,
    how_to_accept,
    licence_of,
    load_licences,
    read_acceptances,
    store_path,
    valid_acceptance,
    withdraw,
)
from launcher.image.stack import load_stacks

ROOT = Path(__file__).resolve().parents[3]
CANN = load_licences()["cann"]
WHO = {"at": "2026-12-01T10:00:00+00:00", "user": "ann", "host": "npu1"}


def test_every_licence_of_the_stacks_is_in_the_table_and_no_other() -> None:
    columns = {stack.licence for stack in load_stacks(ROOT / "images").values() if stack.licence}
    assert {licence.column for licence in load_licences().values()} == columns
    assert all(licence_of(column) is not None for column in columns)


def test_the_wheels_that_hold_a_text_are_those_of_the_locks() -> None:
    locked = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "images/locks").glob("cuda*.txt"))
    packages = [package for licence in load_licences().values() for package in licence.packages]
    assert packages and all(f"{package} " in locked for package in packages)


def test_what_is_accepted_is_identified_by_all_that_is_known_of_it() -> None:
    assert CANN.sha256 == sha256(f"cann\n{CANN.title}\n{CANN.url}\n".encode()).hexdigest()
    changes = {"title": "3.0", "url": "https://example.org", "text_sha256": "00"}
    assert len({CANN.sha256, *(replace(CANN, **{key: value}).sha256 for key, value in changes.items())}) == 4
    assert replace(CANN, source="read again").sha256 == CANN.sha256


def test_a_licence_that_the_table_lacks_can_only_be_accepted_by_the_override() -> None:
    assert licence_of("Licence of an earlier commit") is None and "omnilaunch" not in how_to_accept("Licence of an earlier commit")
    assert how_to_accept(CANN.column).endswith("omnilaunch licence accept cann")
    for name in ("nvidia", "EULA"):
        with pytest.raises(ConfigRefused, match=rf"unknown licence '{name}'; did you mean 'cuda' \(NVIDIA End User License Agreement"):
            find_licence(name)
    with pytest.raises(ConfigRefused, match=r"unknown licence 'can'; did you mean 'cann'"):
        find_licence("can")


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"XDG_CONFIG_HOME": "/c", "HOME": "/home/ann"}, "/c/omnilaunch/licences.json"),
        ({"XDG_CONFIG_HOME": "", "HOME": "/home/ann"}, "/home/ann/.config/omnilaunch/licences.json"),
        ({"XDG_CONFIG_HOME": "relative", "HOME": "/home/ann"}, "/home/ann/.config/omnilaunch/licences.json"),
    ],
)
def test_where_the_file_is(environ: dict[str, str], path: str) -> None:
    assert store_path(environ) == Path(path)


def test_accepting_reading_and_withdrawing(tmp_path: Path) -> None:
    path = tmp_path / "omnilaunch/licences.json"
    assert read_acceptances(path) == {} and not withdraw("cann", path) and not path.exists()
    accept(CANN, path, **WHO)
    accept(find_licence("cuda"), path, **WHO)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and {*read_acceptances(path)} == {"cann", "cuda"}
    found = valid_acceptance(CANN, path)
    assert found is not None and (found.user, found.host, found.accepted_at, found.sha256) == (*("ann", "npu1", WHO["at"]), CANN.sha256)
    assert withdraw("cann", path) and {*read_acceptances(path)} == {"cuda"} and valid_acceptance(CANN, path) is None
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".lock"] == ["licences.json"]


def test_a_licence_that_changed_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "licences.json"
    accept(replace(CANN, title="CANN Open Software License Agreement Version 1.0"), path, **WHO)
    assert valid_acceptance(CANN, path) is None and "cann" in read_acceptances(path)
    accept(CANN, path, **WHO)
    assert valid_acceptance(CANN, path) is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "line 1 column 2"),
        ("", "line 1 column 1"),
        ("[]", "no object `accepted`"),
        ('{"schema": 1, "accepted": []}', "no object `accepted`"),
        ('{"schema": 2, "accepted": {}}', "its schema is 2, and this version reads 1"),
        ('{"schema": 1, "accepted": {"cann": {"title": "x"}}}', "accepted.cann"),
        ('{"schema": 1, "accepted": {"cann": 3}}', "accepted.cann"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_kept(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "licences.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match="Nothing was changed") as caught:
        read_acceptances(path)
    assert why in str(caught.value) and str(path) in str(caught.value) and f"mv {path}" in str(caught.value)
    if "accepted.cann" not in why:  # an entry of another licence is carried over as it is
        with pytest.raises(ConfigRefused, match="Nothing was changed"):
            accept(CANN, path, **WHO)
    assert path.read_text(encoding="utf-8") == text


def test_what_a_later_version_added_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "licences.json"
    later = {"schema": 1, "note": "x", "accepted": {"other": {"anything": 1}}}
    path.write_text(json.dumps(later), encoding="utf-8")
    accept(CANN, path, **WHO)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["note"] == "x" and data["accepted"]["other"] == {"anything": 1} and "cann" in data["accepted"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigRefused, match=r"licences\.json cannot be written: .* XDG_CONFIG_HOME"):
        accept(CANN, tmp_path / "file/omnilaunch/licences.json", **WHO)


def accept_numbered(path: Path, number: int) -> None:
    accept(replace(CANN, name=f"n{number}"), path, **WHO)


def test_commands_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "licences.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=accept_numbered, args=(path, number)) for number in range(12)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {*read_acceptances(path)} == {f"n{number}" for number in range(12)}


def test_the_text_comes_from_a_wheel_and_a_broken_wheel_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = replace(find_licence("cuda"), packages=("nvidia-of-a-test==1",))
    assert find_text(cuda, (tmp_path,)) is None and find_text(CANN, (tmp_path,)) is None
    (tmp_path / "nvidia_of_a_test-0-py3-none-any.whl").write_bytes(b"half")
    with zipfile.ZipFile(tmp_path / "nvidia_of_a_test-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nvidia_of_a_test-1.dist-info/licenses/License.txt", "terms\n")
    assert find_text(cuda, (tmp_path,)) == ("terms\n", str(tmp_path / "nvidia_of_a_test-1-py3-none-any.whl"))
    info = tmp_path / "site/nvidia_of_a_test-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-of-a-test\nVersion: 1\n", encoding="utf-8")
    (info / "License.txt").write_text("installed\n", encoding="utf-8")
    (info / "RECORD").write_text("nvidia_of_a_test-1.dist-info/License.txt,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_text(cuda, (tmp_path,)) == ("installed\n", "nvidia-of-a-test 1 of this interpreter")


def test_the_table_is_read_with_the_names_of_its_rows() -> None:
    assert {name: licence.name for name, licence in load_licences().items()} == {"cann": "cann", "cuda": "cuda"}
    assert module.TABLE.is_file()


def test_the_command_that_moves_an_unreadable_file_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "my config" / "licences.json"
    path.parent.mkdir()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigRefused) as caught:
        read_acceptances(path)
    assert f"(mv '{path}' '{path}.broken')" in str(caught.value)
