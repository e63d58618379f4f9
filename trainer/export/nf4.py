"""The stage quantize with 4-bit normal floats and double-quantized scales (Dettmers et al., QLoRA, arXiv 2305.14314, section 3), by
bitsandbytes, on CUDA: transformers quantizes while it loads, and saves the result. The whole model passes through the device.

Not tested: no such device was available.
"""

import importlib.util
import time
from pathlib import Path

import torch

from trainer.contract import InputRefused, Quantization, TrainResult, TrainSpec, WeightsLineage
from trainer.device.dtype import loading_dtype
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import DerivedCheckpoint, write_derived_checkpoint


def write_nf4_checkpoint(
    spec: TrainSpec, rank: Rank, lineage: WeightsLineage, folder: Path, meta_model: torch.nn.Module, weights: frozenset[str]
) -> TrainResult:
    """`weights`: those to quantize, by name in memory. Raises InputRefused if the device or the package is missing."""
    require_nf4(rank)
    from transformers import BitsAndBytesConfig

    wanted, dtype = spec.stage.quantization or Quantization(), loading_dtype(spec.precision)
    kept = [name for name, module in meta_model.named_modules() if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in weights]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    began = time.perf_counter()
    options = {"dtype": dtype, "device_map": {"": rank.torch_device}, "local_files_only": True, "quantization_config": how}
    model = type(meta_model).from_pretrained(folder, config=meta_model.config, **options)  # type: ignore[attr-defined]

    def finish(partial_folder: Path) -> dict[str, float]:
        model.save_pretrained(partial_folder, max_shard_size=wanted.shard_bytes)
        size = sum(file.stat().st_size for file in partial_folder.glob("*.safetensors"))
        return {"bytes": float(size), "seconds": time.perf_counter() - began}

    return write_derived_checkpoint(
        DerivedCheckpoint(tensors=(), folders=(folder,), shard_bytes=wanted.shard_bytes, finish=finish), spec, lineage
    )


def require_nf4(rank: Rank) -> None:
    if rank.device.name != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        missing = "the package bitsandbytes" if rank.device.name == "cuda" else f"a kernel for {rank.device.name}"
        raise InputRefused(
            f"stage.quantization.scheme=nf4: {missing} is missing; bitsandbytes has NF4 for CUDA only. Set stage.quantization.scheme=int8, "
            "which works on every device, or run this stage on a CUDA card with bitsandbytes installed."
        )
