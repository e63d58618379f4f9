"""Checkpoints that are made from other checkpoints: merged, converted or quantized.

Read `derived_checkpoint` first: it writes, checks and renames the new folder. `probe` compares logits, `calibration` measures the inputs of
layers, `nf4` quantizes to 4 bits.
"""
