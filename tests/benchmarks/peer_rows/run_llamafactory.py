"""Run by the Python of an environment with llamafactory: what LLaMA-Factory makes of rows, one JSON line a row on standard output.

python run_llamafactory.py MODEL_FOLDER DATASET_FOLDER NAME MOST: the first MOST rows of the data set NAME of DATASET_FOLDER/dataset_info.json,
with the template qwen2_vl. A row that its processor drops has `dropped`, and one that its loader refuses has `refused`.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()
stand_in.add_modules("torchaudio")

from llamafactory.data.loader import _get_merged_dataset  # noqa: E402
from llamafactory.data.processor import SupervisedDatasetProcessor  # noqa: E402
from llamafactory.data.template import get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import DataArguments, ModelArguments  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer, Seq2SeqTrainingArguments  # noqa: E402


def rows_of(model: str, folder: str, name: str, most: int) -> Iterator[dict[str, Any]]:
    data = DataArguments(dataset=name, dataset_dir=folder, template="qwen2_vl", cutoff_len=100_000, media_dir=folder, max_samples=most)
    training = Seq2SeqTrainingArguments(output_dir=os.devnull, report_to=[], use_cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = get_template_and_fix_tokenizer(tokenizer, data)
    try:
        rows = _get_merged_dataset([name], ModelArguments(model_name_or_path=model), data, training, "sft")
    except Exception as error:  # whatever it refuses a data set with
        why = {"refused": f"{type(error).__name__}: {error}"[:200]}
        yield from [why] * min(most, count_rows(folder, name))
        return
    processor = AutoProcessor.from_pretrained(model)
    made = SupervisedDatasetProcessor(template=template, tokenizer=tokenizer, processor=processor, data_args=data)
    for row in rows:
        try:
            found = made.preprocess_dataset({key: [value] for key, value in row.items()})
        except Exception as error:
            yield {"refused": f"{type(error).__name__}: {error}"[:200]}
            continue
        if not found.get("input_ids"):
            yield {"dropped": True}
        else:
            yield {"input_ids": found["input_ids"][0], "labels": found["labels"][0]}


def count_rows(folder: str, name: str) -> int:
    """For a data set that is refused as a whole."""
    file = Path(folder) / json.loads((Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))[name]["file_name"]
    text = file.read_text(encoding="utf-8")
    return len(text.splitlines() if file.suffix == ".jsonl" else json.loads(text))


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
