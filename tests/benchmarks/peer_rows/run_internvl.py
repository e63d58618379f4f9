"""Run by the Python of an environment with torch and transformers: what internvl_chat of OpenGVLab/InternVL makes of rows, one JSON line a row.

python run_internvl.py MODEL_FOLDER ROWS.jsonl CHECKOUT: with its template internvl2_5. An image is one token.
"""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()
stand_in.add_modules("cv2", "imageio", "decord")

from transformers import AutoTokenizer  # noqa: E402

TEMPLATE = "internvl2_5"


def rows_of(model: str, file: Path, checkout: str) -> Iterator[dict[str, Any]]:
    root = f"{checkout}/internvl_chat/internvl"
    sys.path.insert(0, f"{checkout}/internvl_chat")
    stand_in.add_modules("internvl", "internvl.train")
    sys.modules["internvl"].__path__, sys.modules["internvl.train"].__path__ = [root], [f"{root}/train"]
    made = importlib.import_module("internvl.train.dataset")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            talk, images = copy.deepcopy(row["conversations"]), row.get("image") or []
            images = [images] if isinstance(images, str) else images
            if len(images) == 1 and "<image>" not in talk[0]["value"]:  # as multi_modal_get_item of internvl_chat_finetune.py
                talk[0]["value"] = "<image>\n" + talk[0]["value"]
            count = {"text_only": True} if not images else {"num_image": len(images)}
            found = made.preprocess_internvl2_5(TEMPLATE, [talk], tokenizer, [1] * max(1, len(images)), use_packed_ds=True, **count)
            yield {"input_ids": found["input_ids"][0].tolist(), "labels": found["labels"][0].tolist()}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]), sys.argv[3]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
