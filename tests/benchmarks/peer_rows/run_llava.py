"""Run by the Python of an environment with torch and transformers: what LLaVA's, or ShareGPT4V's, own code makes of rows, one JSON line a row.

python run_llava.py MODEL_FOLDER ROWS.json CHECKOUT PACKAGE: CHECKOUT has the package llava or share4v, whose train/train.py is run with the
conversation vicuna_v1. Its model is not loaded.
"""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stand_in

stand_in.declare_operators()

from transformers import AutoTokenizer  # noqa: E402

IMAGE = -200  # IMAGE_TOKEN_INDEX of both


def rows_of(model: str, file: Path, checkout: str, package: str) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, checkout)
    trainer = "llava_trainer" if package == "llava" else "share4v_trainer"
    stand_in.add_modules(package, f"{package}.model", f"{package}.train", f"{package}.train.{trainer}")
    sys.modules[package].__path__ = [f"{checkout}/{package}"]
    sys.modules[f"{package}.train"].__path__ = [f"{checkout}/{package}/train"]
    for name in ("constants", "conversation", "mm_utils"):
        setattr(sys.modules[package], name, importlib.import_module(f"{package}.{name}"))
    train = importlib.import_module(f"{package}.train.train")
    talk = train.conversation_lib
    talk.default_conversation = talk.conv_templates["vicuna_v1" if "vicuna_v1" in talk.conv_templates else "v1"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.legacy, tokenizer.model_max_length = True, 100_000  # as Vicuna's tokenizer has it
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    for row in json.loads(file.read_text(encoding="utf-8")):
        try:
            talks = [copy.deepcopy(row["conversations"])]
            talks = train.preprocess_multimodal(talks, settings) if "image" in row else talks
            found = train.preprocess(talks, tokenizer, has_image="image" in row)
            ids, labels = found["input_ids"][0].tolist(), found["labels"][0].tolist()
            if all(label == -100 for label in labels):
                yield {"refused": "nothing is trained: its count of tokens does not match"}
                continue
            yield {"input_ids": [image if token == IMAGE else token for token in ids], "labels": labels}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
