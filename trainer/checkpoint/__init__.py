"""Checkpoints: writing them completely or not at all, resuming from them, and where weights come from.

Read `checkpoint` first: the layout of a folder, and opening it. `retention` removes old ones. `pending` and `writer` save one, `state` holds the optimizer's state,
`resume` chooses where a run continues, `best` finds the best evaluation, `lineage` traces weights through stages, `adapter` reads peft
adapters, `journal` records finished batches of evaluate and infer.
"""
