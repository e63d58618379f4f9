"""Trains, evaluates, exports and serves a model: one process for each rank, inside the image. Never imports the launcher.

Read `__main__` first, then `programs.train`: the story of a training run. `contract` is what the launcher and the trainer share.
The packages in the order of their imports: contract, device, tensor, optim, kernels, distributed, data, models, stages, generation,
memory_model, checkpoint, observe, evaluation, train, export, serving, programs.
"""
