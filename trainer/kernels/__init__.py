"""Kernels that replace operations of transformers' models.

Read `fused` first: fused norms, SwiGLU and rotary positions of liger-kernel and torch_npu, patched into a built model. `cross_entropy`
computes the loss in chunks of tokens, on every device.
"""
