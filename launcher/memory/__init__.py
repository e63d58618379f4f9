"""The memory of a run, by arithmetic and without torch: what each device and each node needs at the peak of a step.

Read `estimate` first: it adds up model states (`states`), activations (`activations`), buffers (`buffers`) and the sizes of a
micro-batch (`tokens`) into one estimate, item by item. `deepspeed` renders the DeepSpeed config from the fields of strategy and
precision, and holds the facts about DeepSpeed that the estimate counts with. docs/fit.md says how far off the estimate is.
"""
