"""Run by the Python of an environment with torch and transformers: what qwen-vl-finetune of QwenLM/Qwen3-VL makes of rows, one JSON line a row.

python run_qwen.py MODEL_FOLDER ROWS.json CHECKOUT
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()

from PIL import Image  # noqa: E402
from transformers import AutoProcessor  # noqa: E402


def rows_of(model: str, file: Path, checkout: str) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, f"{checkout}/qwen-vl-finetune")
    made = importlib.import_module("qwenvl.data.data_processor")
    made._make_abs_paths = lambda base, name: Image.open(base / name).convert("RGB")  # torchvision cannot open files here, see stand_in.py
    processor = AutoProcessor.from_pretrained(model)
    for row in json.loads(file.read_text(encoding="utf-8")):
        try:
            found = made.preprocess_qwen_visual([{**row, "data_path": str(file.parent)}], processor)
            yield {"input_ids": found["input_ids"][0].tolist(), "labels": found["labels"][0].tolist()}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
