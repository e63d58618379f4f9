import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.digits import MANIFEST, hash_set, load_pixels, png, write_digits
from trainer.data.rows.sample import read_samples


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_digits(root)
    return root


def test_all_digits_once_with_297_held_out(root: Path) -> None:
    train, problems = read_samples(root / "digits" / "train.json", root / "digits")
    evaluation, more = read_samples(root / "digits" / "evaluation.json", root / "digits")
    assert (len(train), len(evaluation), problems, more) == (1500, 297, (), ())
    assert len({sample.images[0] for sample in train + evaluation}) == 1797
    counts = [sum(sample.messages[1].content == str(digit) for sample in evaluation) for digit in range(10)]
    assert min(counts) >= 15, "every digit is held out often enough"


def test_the_files_have_the_pixels_of_scikit_learn(root: Path) -> None:
    pixels, labels = load_pixels()
    assert pixels.min() == 0 and pixels.max() == 255
    train, _ = read_samples(root / "digits" / "train.json", root / "digits")
    for sample in train[::50]:
        index = int(sample.id.removeprefix("digit-"))
        with Image.open(sample.images[0]) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            assert np.array_equal(np.asarray(image), pixels[index])
        assert sample.messages[1].content == str(labels[index])


def test_the_bytes_are_the_same_on_every_machine(root: Path) -> None:
    """Golden: the data's hash in a record must not depend on the versions of zlib, Pillow or numpy."""
    assert hash_set(root / "digits") == "fe8a56061e842118988bd803eb2ed5f25e996a779d1e8f2fdb5fee3ab48dd8a7"


def test_a_complete_set_is_not_changed(root: Path) -> None:
    before = (root / "digits" / MANIFEST).stat().st_ino
    write_digits(root)
    assert (root / "digits" / MANIFEST).stat().st_ino == before
    assert sorted(path.name for path in root.iterdir()) == [".digits.lock", "digits"]


@pytest.mark.parametrize("damage", ["an image", "the manifest", "a row", "a file", "the manifest's text"])
def test_a_damaged_set_is_written_again(tmp_path: Path, damage: str) -> None:
    write_digits(tmp_path)
    folder = tmp_path / "digits"
    whole = hash_set(folder)
    {
        "an image": lambda: (folder / "images" / "0007.png").write_bytes(b""),
        "the manifest": lambda: (folder / MANIFEST).unlink(),
        "a row": lambda: (folder / "train.json").write_text("[]"),
        "a file": lambda: (folder / "evaluation.json").unlink(),
        "the manifest's text": lambda: (folder / MANIFEST).write_text("{"),
    }[damage]()
    write_digits(tmp_path)
    assert hash_set(folder) == whole
    assert json.loads((folder / MANIFEST).read_text()) == {"sha256": whole}
    assert len(list(tmp_path.glob("digits.damaged.*"))) == 1, "files that may belong to the user are not deleted"


def test_concurrent_processes_see_a_complete_set(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_digits, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits.lock", "digits"]
    assert json.loads((tmp_path / "digits" / MANIFEST).read_text()) == {"sha256": hash_set(tmp_path / "digits")}


def test_a_failed_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.data.digits.png", fail)
    with pytest.raises(OSError, match="No space left"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".digits.lock"]


def test_png_of_any_shape(tmp_path: Path) -> None:
    image = np.arange(35, dtype=np.uint8).reshape(5, 7)
    (tmp_path / "a.png").write_bytes(png(image))
    with Image.open(tmp_path / "a.png") as read:
        assert np.array_equal(np.asarray(read), image)
