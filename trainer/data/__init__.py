"""From annotation files and image files to the tensors of a micro-batch.

Read `encode` first: it makes token ids and labels from a conversation. `rows/` reads annotation files into Samples, `media/` decodes images,
`batch/` orders, packs and collates samples for a rank. `check` is the data check before a run (with `length`, `sample_check`, `summary`);
`manifest` lists the files that a run reads with their hashes; `digits` writes the built-in data sets.
"""
