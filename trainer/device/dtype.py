"""The contract's dtype names as torch dtypes, and torch dtypes as names."""

import torch

from trainer.contract import Dtype, Precision

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def loading_dtype(precision: Precision) -> torch.dtype:
    """The dtype in which weights are loaded: that of the module's parameters.

    The optimizer makes wider master weights from these. A random start is drawn in float32 and rounded, so that one seed gives the same
    start in every precision; trainer.train.model documents the exceptions.
    """
    return DTYPES[precision.weights]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")
