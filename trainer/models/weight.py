"""Element types of a model's tensors."""

import torch


def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its parameters and saved buffers in `dtype`, in place, as from_pretrained(dtype=...) makes them.

    Buffers that no file holds, above all the rotary frequencies, stay as they are: in bfloat16 a frequency is off by up to 0.2 %, an
    angle at position 1,000 by up to two radians, and a model that is saved and loaded again would compute something else.
    """
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) in saved and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return model
