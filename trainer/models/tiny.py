"""Write a tiny random model as an ordinary checkpoint, to try a config on a laptop.

python -m trainer.models.tiny conf/model/tiny_qwen2_5_vl.yaml FOLDER
"""

import sys
from pathlib import Path

import torch
import yaml

from trainer.contract import InputRefused, ModelSpec, Source, Template, decode
from trainer.models.registry import find_family


def read_model(file: Path) -> ModelSpec:
    """A file of conf/model, for a random start. Raises InputRefused for any other file."""
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        parts = given["architecture"]
        towers = {name: {"options": {}, **parts[name]} for name in ("vision", "text")}
        return ModelSpec(
            name=given["name"],
            family=given["family"],
            source=Source(kind="random"),
            architecture={"audio": {}, "options": {}, **parts, **towers},
            groups=given["groups"],
            image_token=given["image_token"],
            template=decode(Template, given["template"]),
            attention="sdpa",
        )
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputRefused(
            f"{file}: not a model file of conf/model ({error!r})\n    give one, for example conf/model/tiny_llava.yaml"
        ) from error


def write_checkpoint(file: Path, folder: Path, *, seed: int = 0) -> None:
    """A random model with tokenizer and processor, in float32, written by save_pretrained. Raises InputRefused if `folder` is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise InputRefused(f"{folder}: the folder is not empty\n    give a new folder")
    model = read_model(file)
    family = find_family(model.family)
    torch.manual_seed(seed)
    family.create(model).save_pretrained(folder)
    family.create_processor(model).save(folder)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m trainer.models.tiny MODEL.yaml FOLDER", file=sys.stderr)
        return 2
    try:
        write_checkpoint(Path(arguments[0]), Path(arguments[1]))
    except InputRefused as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments[1]}: to start from it, set model.source.path={arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
