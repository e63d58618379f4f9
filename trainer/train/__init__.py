"""The training loop and its parts.

Read `loop` first: from micro-batches to optimizer steps. `model` builds the model of a run, `steps` connects the loop with checkpoints,
metrics and trackers, `step_hooks` runs between two steps, `watchdog` detects steps that hang, `nonfinite` finds the layer of a NaN.
"""
