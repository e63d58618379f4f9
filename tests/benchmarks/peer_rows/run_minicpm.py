"""Run by the Python of an environment with torch and transformers: what finetune/dataset.py of OpenBMB/MiniCPM-V makes of rows, one JSON line a row.

python run_minicpm.py MODEL_FOLDER ROWS.json CHECKOUT: with llm_type qwen, as for MiniCPM-V 2.6. Its targets are shifted by one place; here they are at
the place of their token. The target after an answer, the end of the text in place of the line feed that follows, is left out.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

MARKS = {"im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"}
NUMBERS = {"im_id_start": "<image_id>", "im_id_end": "</image_id>"}


def rows_of(model: str, file: Path, checkout: str) -> Iterator[dict[str, Any]]:
    os.chdir(file.parent)
    sys.path.insert(0, f"{checkout}/finetune")
    made = importlib.import_module("dataset")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, token in {**MARKS, **NUMBERS}.items():  # the attributes that the published tokenizer class has
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.eos_id, tokenizer.unk_token = tokenizer.eos_token_id, "<unk>"
    own = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *given, **named: own(*given, **named, **({"return_dict": False} if named["tokenize"] else {}))
    sizes = json.loads(Path(model, "preprocessor_config.json").read_text(encoding="utf-8"))
    slicing = {"patch_size": sizes["patch_size"], "max_slice_nums": sizes["max_slice_nums"], "scale_resolution": sizes["scale_resolution"]}
    for row in json.loads(file.read_text(encoding="utf-8")):
        try:
            given = row.get("image", {})
            images = {"<image>": given} if isinstance(given, str) else given
            opened = {name: Image.open(path).convert("RGB") for name, path in images.items()}
            found = made.preprocess(
                opened, row["conversations"], tokenizer, lambda image: image, query_nums=sizes["image_feature_size"],
                slice_config=slicing, llm_type="qwen", patch_size=sizes["patch_size"], max_length=100_000,
            )  # fmt: skip
            ids, targets = found["input_ids"].tolist(), [-100, *found["target"].tolist()[:-1]]
            yield {"input_ids": ids, "labels": [target if target == token else -100 for token, target in zip(ids, targets, strict=True)]}
        except Exception as error:  # whatever it refuses a row with
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
