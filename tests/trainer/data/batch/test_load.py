import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainer.data.conftest import with_data
from trainer.contract import Batch, InputRefused
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import collate
from trainer.data.batch.load import batches, keep_lengths
from trainer.data.batch.order import rows_of_step
from trainer.data.rows.sample import Sample, read_samples


@pytest.fixture
def samples(write_data, tmp_path: Path) -> tuple[Sample, ...]:
    return read_samples(write_data(10), tmp_path)[0]


def colours(steps) -> list[list[list[int]]]:
    """Step -> micro-batch -> the red value of each image, which is its row."""
    return [[micro["pixel_values"][:, 0, 0, 0].int().tolist() for micro in step] for step in steps]


def data_threads() -> int:
    return sum(thread.name.startswith("data") for thread in threading.enumerate())


def test_steps_are_divided_among_ranks_and_micro_batches(samples, processor, spec) -> None:
    seen = [colours(batches(samples, processor, spec, rank=rank, first_step=0)) for rank in (0, 1)]
    assert [len(steps) for steps in seen] == [spec.steps, spec.steps]
    for step in range(spec.steps):
        rows = rows_of_step(step, seed=spec.seed, rows=10, global_batch=4)
        assert seen[0][step] == [[rows[0]], [rows[2]]]
        assert seen[1][step] == [[rows[1]], [rows[3]]]


def test_another_number_of_ranks_sees_the_same_rows(samples, processor, spec) -> None:
    alone = replace(spec, device=replace(spec.device, world_size=1), batch=Batch(global_batch=4, micro_batch=2, accumulation=2))
    one = colours(batches(samples, processor, alone, rank=0, first_step=0))
    two = [colours(batches(samples, processor, spec, rank=rank, first_step=0)) for rank in (0, 1)]
    for step in range(spec.steps):
        together = [row for rank in two for micro in rank[step] for row in micro]
        assert sorted(row for micro in one[step] for row in micro) == sorted(together)


def test_a_resumed_run_continues_at_its_step(samples, processor, spec) -> None:
    whole = colours(batches(samples, processor, spec, rank=1, first_step=0))
    assert colours(batches(samples, processor, spec, rank=1, first_step=2)) == whole[2:]
    assert colours(batches(samples, processor, spec, rank=1, first_step=3)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(samples, processor, spec, workers) -> None:
    spec = replace(spec, steps=9)
    inline = list(batches(samples, processor, spec, rank=0, first_step=0))
    ahead = list(batches(samples, processor, with_data(spec, workers=workers), rank=0, first_step=0))
    assert len(ahead) == 9
    for one, other in zip(inline, ahead, strict=True):
        for expected, micro in zip(one, other, strict=True):
            assert all(torch.equal(expected[name], micro[name]) for name in expected)
    assert data_threads() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_reported_at_its_step(samples, processor, spec, workers, tmp_path) -> None:
    row = rows_of_step(1, seed=spec.seed, rows=10, global_batch=4)[0]
    assert row not in rows_of_step(0, seed=spec.seed, rows=10, global_batch=4)
    (tmp_path / f"{row}.png").write_text("not an image")
    steps = batches(samples, processor, with_data(spec, workers=workers), rank=0, first_step=0)
    next(steps)
    with pytest.raises(InputRefused, match=f"train.json row {row + 1}, key 'image': .*{row}.png: is not an image"):
        next(steps)
    assert data_threads() == 0


def test_closing_stops_the_threads(samples, processor, spec) -> None:
    steps = batches(samples, processor, with_data(spec, workers=2), rank=0, first_step=0)
    next(steps)
    assert data_threads() > 0
    steps.close()
    assert data_threads() == 0


def test_few_batches_are_prepared_in_advance(samples, processor, spec) -> None:
    """A long run must not fill the memory with prepared batches."""
    spec = with_data(replace(spec, steps=500), workers=2)
    taken = []

    def count(image):
        taken.append(image)
        return processor.image_features(image)

    steps = batches(samples * 100, replace(processor, image_features=count), spec, rank=0, first_step=0)
    next(steps)
    steps.close()
    assert len(taken) <= 2 * (spec.batch.accumulation + 2)


def test_no_rows(processor, spec) -> None:
    with pytest.raises(InputRefused, match=r"train.json has no usable row"):
        next(batches((), processor, spec, rank=0, first_step=0))


def test_a_length_that_cannot_be_measured_is_reported_at_its_step(samples, processor, spec, tmp_path) -> None:
    """An earlier error would lose the previous step; ignoring it would divide the step differently on this rank."""
    spec = with_data(spec, packing=True, workers=1)
    row = rows_of_step(1, seed=spec.seed, rows=10, global_batch=4)[0]
    (tmp_path / f"{row}.png").write_text("not an image")
    for rank in (0, 1):
        steps = batches(samples, processor, spec, rank=rank, first_step=0)
        next(steps)
        with pytest.raises(InputRefused, match=f"train.json row {row + 1}, key 'image'"):
            next(steps)
    assert data_threads() == 0


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True}, {"length_aware": "step"}, {"length_aware": "window"}])
def test_workers_and_ranks_do_not_change_the_samples_of_a_step(samples, processor, spec, changes) -> None:
    spec = with_data(replace(spec, steps=9), **changes)
    alone = replace(spec, device=replace(spec.device, world_size=1), batch=Batch(global_batch=4, micro_batch=2, accumulation=2))
    several = [with_data(spec, workers=workers) for workers in (0, 3)]
    one = colours(batches(samples, processor, alone, rank=0, first_step=0))
    for same in several:
        two = [colours(batches(samples, processor, same, rank=rank, first_step=0)) for rank in (0, 1)]
        for step in range(9):
            assert len(two[0][step]) == len(two[1][step])
            together = [row for rank in two for micro in rank[step] for row in micro]
            assert sorted(row for micro in one[step] for row in micro) == sorted(together)
    assert data_threads() == 0


def test_lengths_are_those_of_the_encoded_samples(samples, processor, spec, tmp_path) -> None:
    """Only the header of an image is read, no pixel."""
    measure = keep_lengths(samples, processor, spec, Cache(0))
    found = [collate([sample], processor, spec)["input_ids"].shape[1] for sample in samples]
    assert measure(range(10)) == found
    for row in range(10):
        header = (tmp_path / f"{row}.png").read_bytes()[:45]
        (tmp_path / f"{row}.png").write_bytes(header)
    assert measure([3, 3]) == [found[3]] * 2
    assert keep_lengths(samples, processor, spec, Cache(0))([0, 1]) == found[:2]


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_packing_is_refused_for_a_family_that_does_not_support_it(samples, processor, spec, key) -> None:
    with pytest.raises(
        InputRefused, match=rf"data.{key}=true is not possible with llava: samples in the same row.*\n    set data.{key}=false"
    ):
        next(batches(samples, replace(processor, position_ids=None), with_data(spec, **{key: True}), rank=0, first_step=0))


def rotate_by_a_tag_at_the_end(path: Path) -> None:
    """As old exiftools write it: after the pixels, not in the header."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])


def test_a_text_encoded_for_measuring_is_reused_only_if_the_image_size_is_the_same(samples, processor, spec, tmp_path) -> None:
    for row in range(10):
        rotate_by_a_tag_at_the_end(tmp_path / f"{row}.png")
    (image,) = processor.span((30, 40), 0)[:1]
    upright = replace(processor, span=lambda size, index: (image,) * size[1])
    spec = with_data(replace(spec, device=replace(spec.device, world_size=1), batch=Batch(global_batch=4, micro_batch=2, accumulation=2)))
    for step in batches(samples, upright, with_data(spec, length_aware="step"), rank=0, first_step=0):
        assert all((micro["input_ids"] == image).sum(dim=1).tolist() == [40, 40] for micro in step)
