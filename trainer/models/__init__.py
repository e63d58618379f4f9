"""Model families: how to create and load a model, and how its tokenizer and image processor work.

Read `family` first: it says what a family is. `registry` lists them; each family is one module (`llava`, `qwen2_5_vl`, ...), those of OpenBMB
that transformers lacks are in openbmb/. `architecture` makes and compares configs, `processor` opens and writes processor files, `span` counts
the tokens of an image, and `tiny` writes random checkpoints to try a config.
"""

from trainer.models.registry import FAMILIES as FAMILIES, find_family as find_family
