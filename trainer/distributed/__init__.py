"""The ranks of a run together: process group, DeepSpeed and collectives.

Read `engine` first: it wraps DeepSpeed in the operations of the training loop. `zero3` partitions a model among the ranks, `collective` has
collectives over Python objects, `effective_config` checks that DeepSpeed uses the planned config.
"""
