"""Tiny random models as ordinary checkpoints, to try a config on a laptop, and the tokenizer of everything that starts at random.

    python -m trainer.models.tiny conf/model/tiny_qwen2_5_vl.yaml FOLDER

The tokenizer is byte-level BPE, so that any text has tokens, in fewer than 384 ids.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.contract import InputRefused, ModelSpec, Source, Template, decode

VOCABULARY = 320  # 256 bytes and 64 merges; with the special tokens it stays below the vocab_size of conf/model/tiny_llava.yaml
PAD = "<pad>"
LINES = (
    "USER: Which digit is this? ASSISTANT: It is this one.",
    "USER: What is in this image? ASSISTANT: This is what the image shows.",
    "USER: What is written in this picture? ASSISTANT: The answer is in the image.",
    "USER: Which of these is in the picture? ASSISTANT: This one is.",
)


def tiny_tokenizer(image_token: str, template: Template, more: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """The same ids every time. EOS is the template's end mark, there is no BOS, padding is on the right; `image_token` is one token, and
    so are those of `more`, attribute of the tokenizer -> token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=template.end_mark.strip(),
        pad_token=PAD,
        padding_side="right",
        extra_special_tokens={"image_token": image_token, **(more or {})},
    )


def read_model(file: Path) -> ModelSpec:
    """A file of conf/model, for a random start. Raises InputRefused for one that is none."""
    import yaml

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
        raise InputRefused(f"{file}: is no model of conf/model ({error!r})\n    name one, as conf/model/tiny_llava.yaml") from error


def write_checkpoint(file: Path, folder: Path, *, seed: int = 0) -> None:
    """A random model with tokenizer and processor, in float32, as save_pretrained writes it. Raises InputRefused where `folder` is full."""
    import torch

    from trainer.models import find_family  # the families take their tokenizer from this module

    if folder.exists() and any(folder.iterdir()):
        raise InputRefused(f"{folder}: is not empty\n    name a folder that is not there yet")
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
    print(f"{arguments[1]}: start from it with model.source.kind=path model.source.path={arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
