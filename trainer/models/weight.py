"""Convert the weights of a model to another dtype."""

import torch


def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Converts parameters and saved buffers to `dtype` in place, as from_pretrained(dtype=...) does, and returns the model.

    Buffers that are not saved, such as rotary frequencies, are not changed. In bfloat16 the relative error of a frequency is up to 0.2 %,
    the error of an angle at position 1,000 up to two radians, and a saved and reloaded model would compute other values.
    """
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) in saved and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return model
