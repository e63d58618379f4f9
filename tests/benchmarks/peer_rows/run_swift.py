"""Run by the Python of an environment with ms-swift: what ms-swift makes of rows, one JSON line a row on standard output.

python run_swift.py MODEL_FOLDER ROWS.jsonl TYPE: each row is a data set of its own, so that the columns of one do not change another. TYPE: the
model_type of ms-swift.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

stand_in.declare_operators()

from swift import get_processor, get_template  # noqa: E402
from swift.dataset import load_dataset  # noqa: E402


def rows_of(model: str, file: Path, kind: str) -> Iterator[dict[str, Any]]:
    os.chdir(file.parent)  # ms-swift reads relative paths from the current folder
    template = get_template(get_processor(model, model_type=kind), template_type=kind)
    template.set_mode("train")
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            one = Path(folder) / f"{number}.jsonl"
            one.write_text(line + "\n", encoding="utf-8")
            try:
                rows = list(load_dataset([str(one)], num_proc=1, shuffle=False)[0])
                if not rows:
                    yield {"dropped": True}
                    continue
                found = template.encode(rows[0])
            except Exception as error:  # whatever it refuses a row with
                yield {"refused": f"{type(error).__name__}: {error}"[:200]}
                continue
            yield {"input_ids": list(map(int, found["input_ids"])), "labels": list(map(int, found["labels"]))}


if __name__ == "__main__":
    for number, found in enumerate(rows_of(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3]), start=1):
        print("ROW " + json.dumps({"row": number, **found}), flush=True)
