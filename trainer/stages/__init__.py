"""What a stage trains: parameter groups, LoRA, resets and learning rates. A stage knows nothing of the loop, and the loop nothing of stages.

Read `group` first: it applies a stage to a model. `lora` adds adapters, `reset` draws a group again, `rate` gives groups their own learning
rate, `gradient_checkpointing` saves memory, `nf4_linears` quantizes frozen layers, `chain` says what earlier stages have trained.
"""
