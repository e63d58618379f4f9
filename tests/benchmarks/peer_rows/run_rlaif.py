"""Run by the Python of an environment with torch and transformers: what muffin of RLHF-V/RLAIF-V makes of the chosen answers, one JSON line a row.

python run_rlaif.py MODEL_FOLDER ROWS.jsonl CHECKOUT: as for LLaVA-1.5 (muffin/train/train_llava15.py, muffin/data/datasets.py).
"""

import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()

from transformers import AutoTokenizer  # noqa: E402

IMAGE = -200  # IMAGE_TOKEN_INDEX


def rows_of(model: str, file: Path, checkout: str) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, checkout)
    talk = importlib.import_module("muffin.conversation")
    made = importlib.import_module("muffin.train.train_utils")
    talk.default_conversation = talk.conv_templates["vicuna_v1_1" if "vicuna_v1_1" in talk.conv_templates else "v1"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.legacy, tokenizer.model_max_length = True, 100_000
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = {"is_multimodal": True, "keep_image_tag": True, "image_token_len": 1, "image_processor": lambda picture: picture}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = {"from": "human", "value": f"<image>\n{row['question']}"}
        pair = {name: {"from": "gpt", "value": row[name]} for name in ("chosen", "rejected")}
        try:
            given = {"image": row["image"], "question": question, **pair}
            _, won = made.encode_multimodal_preference_sample(given, tokenizer, settings, partial(made.preprocess_v1, has_image=True))
            ids = [image if token == IMAGE else token for token in won["input_ids"].tolist()]
            yield {"input_ids": ids, "labels": won["labels"].tolist()}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]), sys.argv[3]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
