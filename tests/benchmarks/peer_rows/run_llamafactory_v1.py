"""Run by the Python of an environment with llamafactory: what its second edition (llamafactory.v1) makes of rows, one JSON line a row on standard output.

python run_llamafactory_v1.py MODEL_FOLDER ROWS.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()
stand_in.add_modules("torchaudio")

from llamafactory.v1.core.utils.rendering import Renderer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TEMPLATE = "qwen3_nothink"


def rows_of(model: str, file: Path) -> Iterator[dict[str, Any]]:
    renderer = Renderer(TEMPLATE, AutoTokenizer.from_pretrained(model))
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found = renderer.process_samples([json.loads(line)])[0]
            yield {"input_ids": found["input_ids"], "labels": found["labels"]}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2])), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
