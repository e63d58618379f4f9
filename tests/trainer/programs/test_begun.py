"""Stages that work on files say what they run in before their long work: the launcher ends a stage that never says that it has begun."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.trainer.product import run_program, stage_spec, write_adapter, write_model
from trainer.contract import ENVIRONMENT_FILE, EnvReport, Kind, read

pytestmark = pytest.mark.usefixtures("process_group")


class Begun(Exception):
    """Raised in the place of the long work."""


@pytest.mark.parametrize("kind", ("merge", "convert", "quantize"))
def test_the_environment_is_told_before_a_weight_is_read(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("tiny_llava", tmp_path / "base")
    write_adapter(model, tmp_path / "base", tmp_path / "adapter")
    begun = tmp_path / "adapter" if kind == "merge" else tmp_path / "base"
    spec = stage_spec(kind, model, begun, tmp_path / "run")

    def stop(folder: Path) -> None:
        raise Begun

    monkeypatch.setattr(import_module(f"trainer.programs.{kind}"), "open_tensors", stop)
    with pytest.raises(Begun):
        run_program(spec)
    report = read(EnvReport, tmp_path / "run" / ENVIRONMENT_FILE)
    assert report.origin.path == str(begun) and report.packages["torch"] and report.world_size == 1
