"""The demo files of LLaMA-Factory's data folder: a few short rows of each, unchanged, in their own container, with images of our own."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

DATA = "src/LLaMA-Factory/data"
COMMON = "the first rows of at most 900 bytes of hiyouga/LLaMA-Factory data"


@dataclass(frozen=True, kw_only=True)
class DemoSet:
    """`most`: rows that are kept. `model`, `also`: as in meta.yaml."""

    file: str
    most: int = 10
    model: str = "qwen"
    also: tuple[str, ...] = ("separator",)
    what: str = "llamafactory 0.9.5, template qwen2_vl, stage sft"


V1 = {"model": "qwen3", "also": ("header", "separator"), "what": "llamafactory.v1 0.9.5, template qwen3_nothink"}
DEMO_SETS = {
    "identity": DemoSet(file="identity.json"),
    "alpaca_en_demo": DemoSet(file="alpaca_en_demo.json"),
    "alpaca_zh_demo": DemoSet(file="alpaca_zh_demo.json"),
    "glaive_toolcall_en_demo": DemoSet(file="glaive_toolcall_en_demo.json"),
    "glaive_toolcall_zh_demo": DemoSet(file="glaive_toolcall_zh_demo.json"),
    "mllm_demo": DemoSet(file="mllm_demo.json"),
    "mllm_video_demo": DemoSet(file="mllm_video_demo.json"),
    "mllm_audio_demo": DemoSet(file="mllm_audio_demo.json"),
    "mllm_video_audio_demo": DemoSet(file="mllm_video_audio_demo.json"),
    "c4_demo": DemoSet(file="c4_demo.jsonl", most=3),
    "dpo_en_demo": DemoSet(file="dpo_en_demo.json", most=3),
    "dpo_zh_demo": DemoSet(file="dpo_zh_demo.json", most=3),
    "kto_en_demo": DemoSet(file="kto_en_demo.json", most=4),
    "v1_sft_demo": DemoSet(file="v1_sft_demo.jsonl", **V1),
    "v1_multimodal_demo": DemoSet(file="v1_multimodal_demo.jsonl", most=6, **V1),
    "v1_dpo_demo": DemoSet(file="v1_dpo_demo.jsonl", most=3, **V1),
    "reason_tool_use_demo": DemoSet(file="reason_tool_use_demo_50.jsonl", most=4, **V1),
}


def copy_set(peers: Path, name: str, folder: Path, *, most: int = 0, longest: int = 900) -> None:
    """Write the rows of at most `longest` bytes (or the shortest, if there are too few), meta.yaml, dataset_info.json and the media to `folder`."""
    known = DEMO_SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    rows = choose(read_rows(peers / DATA / known.file), most or known.most, longest)
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / known.file).write_text(
        "\n".join(text) + "\n" if known.file.endswith("l") else json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    )
    info = json.loads((peers / DATA / "dataset_info.json").read_text(encoding="utf-8"))
    if name in info:
        (folder / "dataset_info.json").write_text(json.dumps({name: info[name]}, indent=1) + "\n")
    meta: dict[str, Any] = {
        "model": known.model,
        "rows": known.file,
        "what": f"{known.what}; {COMMON}/{known.file}",
        "also_trained": list(known.also),
    }
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta, sort_keys=False, width=150))
    for row in rows:
        draw_media(row, folder, peers)


def read_rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else json.loads(text)


def choose(rows: list[dict[str, Any]], most: int, longest: int) -> list[dict[str, Any]]:
    sizes = [len(json.dumps(row, ensure_ascii=False).encode()) for row in rows]
    short = [row for row, size in zip(rows, sizes, strict=True) if size <= longest][:most]
    order = sorted(range(len(rows)), key=lambda place: (sizes[place], place))[:most]
    return short if len(short) == min(most, len(rows)) else [rows[place] for place in sorted(order)]


def draw_media(row: Mapping[str, Any], folder: Path, peers: Path) -> None:
    """Each image and film that a row names, made again: those of the demo are not copied. Sound is left out, which the template refuses anyway."""
    for name in {*(row.get("images") or ()), *names_in_blocks(row), *(row.get("videos") or ())}:
        target = folder / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in (row.get("videos") or ()):
            subprocess.run((peers / "lf" / "bin" / "python", Path(__file__).parent / "make_film.py", target), check=True)
            continue
        picture = Image.new("RGB", (48, 32), "white")
        ImageDraw.Draw(picture).ellipse((12, 4, 36, 28), fill=(30, 90, 160))
        picture.save(target)


def names_in_blocks(row: Mapping[str, Any]) -> list[str]:
    blocks = [block for message in row.get("messages", ()) if isinstance(message.get("content"), list) for block in message["content"]]
    return [block["value"] for block in blocks if block.get("type") == "image_url"]
