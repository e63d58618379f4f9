"""Predicts the memory of one training step, by tracing the real model on tensors without memory.

Read `trace` first. `fake_tensors` makes tensors without memory, `allocation_tracker` records what is alive, `sharding` computes what one rank
holds under ZeRO, `synthetic_batch` makes the input.
"""
