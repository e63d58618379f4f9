"""Element types: the contract's names as torch dtypes, and what DeepSpeed made of them."""

import torch

from trainer.contract import Dtype, Precision

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def loading_dtype(precision: Precision) -> torch.dtype:
    """The dtype that weights are read in: that of the module's parameters.

    Masters, where they are wider, are made from these by the optimizer. A random start is drawn in float32 and rounded, so
    that one seed gives the same start in every precision (trainer.train.model says for which models it does not).
    """
    return DTYPES[precision.weights]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")
