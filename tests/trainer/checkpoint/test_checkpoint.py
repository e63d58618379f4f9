import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from trainer.checkpoint import pending, retention
from trainer.checkpoint.checkpoint import find_defect, require_whole
from trainer.checkpoint.pending import save_checkpoint
from trainer.contract import InputRefused, RunFailed, TrainSpec
from trainer.contract.weight_files import hash_weights
from trainer.models import find_family


@dataclass(frozen=True, kw_only=True)
class LoneEngine:
    """A model on the only rank, without DeepSpeed, after its last step: there is no optimizer whose state could be saved."""

    model: torch.nn.Module
    rank: int = 0
    world_size: int = 1
    average: None = None
    exports_average: bool = False

    def with_exported_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather_averages(self) -> dict[str, torch.Tensor]:
        return {}

    def gather_weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def fail_together(self, problem: str) -> None:
        if problem:
            raise RunFailed(problem)


@pytest.fixture
def parts(tiny_spec: Any) -> tuple[LoneEngine, Any, TrainSpec]:
    spec = tiny_spec(changes={"steps": 1})
    family = find_family("llava")
    torch.manual_seed(0)
    return LoneEngine(model=family.create(spec.model)), family.create_processor(spec.model), spec


@pytest.fixture
def saved(parts: Any) -> tuple[Path, TrainSpec]:
    engine, processor, spec = parts
    return Path(spec.output) / save_checkpoint(engine, processor, spec, 3).path, spec


def test_transformers_opens_a_checkpoint_and_finds_the_same_weights(parts: Any) -> None:
    engine, processor, spec = parts
    result = save_checkpoint(engine, processor, spec, 300)
    assert result.path == "checkpoints/step-000300"
    folder = Path(spec.output) / result.path
    opened = LlavaForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), opened.parameters(), strict=True))
    assert LlavaProcessor.from_pretrained(folder).image_token == "<image>"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()
    assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": 32, "width": 32}
    state = json.loads((folder / "omnilaunch_state.json").read_text())
    assert (state["step"], state["weights_sha256"]) == (300, result.weights_sha256)
    require_whole(folder, "stage.checkpoint")


def test_the_oldest_are_removed_after_the_new_one_is_there(parts: Any) -> None:
    engine, processor, spec = parts
    for step in (1, 2, 3):
        save_checkpoint(engine, processor, spec, step)
    assert sorted(path.name for path in (Path(spec.output) / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_fails_nothing(
    parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is a link to elsewhere, and one that holds a file which comes back, as NFS keeps those that are open."""
    engine, processor, spec = parts
    folder = Path(spec.output) / "checkpoints"
    save_checkpoint(engine, processor, spec, 1)
    elsewhere = (folder / "step-000001").rename(tmp_path / "elsewhere")
    (folder / "step-000001").symlink_to(elsewhere)
    save_checkpoint(engine, processor, spec, 2)
    save_checkpoint(engine, processor, spec, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    assert (elsewhere / "model.safetensors").is_file() and capsys.readouterr().out == ""
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *_, **__: None)
    assert save_checkpoint(engine, processor, spec, 4).path == "checkpoints/step-000004"
    assert ".step-000002.removed could not be removed completely. It is not needed any more" in capsys.readouterr().out
    (folder / "step-000002").mkdir()
    retention.remove(folder / "step-000002")  # its other name is taken by what stays
    assert "step-000002 could not be removed: " in capsys.readouterr().out


def test_what_a_killed_rank_left_is_no_obstacle(parts: Any) -> None:
    engine, processor, spec = parts
    left = Path(spec.output) / "checkpoints" / ".step-000001.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert find_defect(left) == "it was being written when its run ended"
    save_checkpoint(engine, processor, spec, 1)
    assert [path.name for path in left.parent.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("place", ["weights", "processor", "sync"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(place: str, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, processor, spec = parts
    save_checkpoint(engine, processor, spec, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "weights":
        monkeypatch.setattr(type(engine.model), "save_pretrained", fail)
    elif place == "processor":
        processor = replace(processor, save=fail)
    else:
        monkeypatch.setattr(pending, "sync_tree", fail)
    with pytest.raises(RunFailed, match=r"step 2 could not be written.*No space left on device.*step-000001 is complete.*needs 0.06 GiB"):
        save_checkpoint(engine, processor, spec, 2)
    folder = Path(spec.output) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    require_whole(folder / "step-000001", "stage.checkpoint")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(("mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system of its own: {done.stderr.strip()}")
    yield folder
    subprocess.run(("umount", str(folder)), check=True)


def test_a_disk_that_is_really_full(small_disk: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, processor, spec = parts
    spec = replace(spec, output=str(small_disk))
    assert pending.tensor_bytes(engine.gather_weights()) < 400 * 1024  # it fits once
    monkeypatch.setattr(pending, "MARGIN_BYTES", -(2**40))  # past the look at the free space, into the write itself
    save_checkpoint(engine, processor, spec, 1)
    with pytest.raises(RunFailed, match=r"step 2 could not be written.*No space left on device.*step-000001 is complete"):
        save_checkpoint(engine, processor, spec, 2)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-000001"]
    require_whole(small_disk / "checkpoints" / "step-000001", "stage.checkpoint")


def test_room_is_looked_at_first(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, processor, spec = parts
    monkeypatch.setattr(pending, "MARGIN_BYTES", 2**60)
    monkeypatch.setattr(type(engine.model), "save_pretrained", lambda *_, **__: pytest.fail("wrote all the same"))
    with pytest.raises(RunFailed, match=r"not enough room on the disk.*There is no earlier checkpoint"):
        save_checkpoint(engine, processor, spec, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_with_a_file_missing_is_refused(name: str, saved: Any) -> None:
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(InputRefused, match=rf"stage.checkpoint: .*step-000003 is not a complete checkpoint: .*{name}"):
        require_whole(folder, "stage.checkpoint")


def test_a_truncated_file_is_refused_with_and_without_our_own_list(saved: Any) -> None:
    folder, _ = saved
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)
    assert "model.safetensors missing or not of the size" in find_defect(folder)
    (folder / "omnilaunch_state.json").unlink()
    assert "bytes, but its header says" in find_defect(folder)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 16, b"\x02" + b"\x00" * 7 + b"[]", b"\x0b" + b"\x00" * 7 + b'{"a":"b"  }'])
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, saved: Any) -> None:
    folder, _ = saved
    (folder / "omnilaunch_state.json").unlink()
    (folder / "model.safetensors").write_bytes(content)
    assert "is not a safetensors file" in find_defect(folder) or "bytes where" in find_defect(folder)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"model.source.path: .*nowhere is not a complete checkpoint: there is no such folder"):
        require_whole(tmp_path / "nowhere", "model.source.path")


def test_equal_weights_have_equal_hashes_however_they_are_cut(parts: Any, tmp_path: Path) -> None:
    model = parts[0].model
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert hash_weights(tmp_path / "one") == hash_weights(tmp_path / "many")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert hash_weights(tmp_path / "one") != hash_weights(tmp_path / "other")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert hash_weights(tmp_path / "bf16") != hash_weights(tmp_path / "other")
