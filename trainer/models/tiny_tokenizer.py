"""The tokenizer of every model that starts with random weights: byte-level BPE with fewer than 384 ids, so that any text has tokens."""

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.contract import Template

VOCABULARY = 320  # 256 bytes and 64 merges; with the special tokens it stays below the vocab_size of conf/model/tiny_llava.yaml
PAD = "<pad>"
LINES = (
    "USER: Which digit is this? ASSISTANT: It is this one.",
    "USER: What is in this image? ASSISTANT: This is what the image shows.",
    "USER: What is written in this picture? ASSISTANT: The answer is in the image.",
    "USER: Which of these is in the picture? ASSISTANT: This one is.",
)


def tiny_tokenizer(image_token: str, template: Template, more: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Always the same ids. EOS is the end mark of the template, there is no BOS, padding is on the right. `image_token` is one token, and
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
