"""The micro-batches of a rank.

Read `load` first: it prepares the batches of each step in threads. `order` says which samples a step trains on, `assign_to_ranks` divides them
among ranks and micro-batches (`bin_packing` when rows are packed), `collate` and `pack` make the tensors, and `cache` keeps processed images
and encoded texts.
"""
