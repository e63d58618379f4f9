"""Real runs of two ranks from a parquet file, a webdataset and base64: the losses are bitwise those of the same rows in JSON with image files."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.launcher.planted import result_of, rows_of
from tests.launcher.run.test_launch import launch

RANKS = ("hardware=cpu", "strategy=ddp", "cluster.devices_per_node=2")
RUN = (
    "data=files",
    "run.deterministic=true",
    "data.max_length=128",
    "run.steps=3",
    "stage.optimizer.warmup=1",
    "stage.global_batch=8",
    *RANKS,
)


def talk(number: int, **image: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": f"number {number}"}]
    return {"id": str(number), "messages": turns, **image}


def write_all(folder: Path) -> dict[str, Path]:
    """The same 24 rows in each container."""
    contents = []
    for number in range(24):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (number * 10, 0, 255 - number)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
        (folder / f"{number}.png").write_bytes(contents[-1])
    files = {name: folder / f"rows.{name}" for name in ("json", "parquet", "jsonl", "tar")}
    files["json"].write_text(json.dumps([talk(number, image=f"{number}.png") for number in range(24)]))
    coded = [base64.b64encode(content).decode() for content in contents]
    files["jsonl"].write_text("".join(json.dumps(talk(number, image=text)) + "\n" for number, text in enumerate(coded)))
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed in this environment")
    rows = [talk(number, image={"bytes": content, "path": None}) for number, content in enumerate(contents)]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), files["parquet"], row_group_size=5)
    with tarfile.open(files["tar"], "w") as archive:
        for number, content in enumerate(contents):
            for name, data in ((f"{number:03}.png", content), (f"{number:03}.json", json.dumps(talk(number)).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return files


@pytest.mark.slow
def test_losses_are_those_of_the_same_rows_in_json(tmp_path: Path) -> None:
    losses, data = {}, {}
    for name, file in write_all(tmp_path).items():
        done = launch(tmp_path, f"data.train={file}", "run.evaluation.enabled=false", *RUN, name=name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert result_of(tmp_path, name)["status"] == "finished"
        losses[name] = [(row["loss"], row["grad_norm"]) for row in rows_of(tmp_path, name)]
        data[name] = json.loads((tmp_path / "runs" / name / "inputs.json").read_text())["data"]
    assert len(losses["json"]) == 3 and all(found == losses["json"] for found in losses.values())
    images = {name: sorted(digest for path, digest in found.items() if path.endswith(".png")) for name, found in data.items()}
    assert len(images["json"]) == 24 and all(found == images["json"] for found in images.values()), "hashes are those of the bytes"
    assert all(path.startswith("media/") for path in data["parquet"] if path.endswith(".png"))
