"""Optimizers and the learning rate schedule.

Read `adamw` first: AdamW on bfloat16 with stochastic rounding. `adamw_8bit` holds both moments in 8 bits with the maps of `blockwise`,
`stochastic_rounding` has the random bits, `optimizer_shard` finds what a rank's optimizer holds under ZeRO, `schedule` is the learning rate.
"""
