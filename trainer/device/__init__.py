"""The accelerator and process of a rank: devices, dtypes, random state, and the prefix of its log lines.

Read `device` first: one adapter per kind of accelerator (CPU, CUDA, NPU), so that no other package asks which one it runs on. `rank` reads
what torchrun sets, `rng` saves and restores random numbers, `dtype` maps dtype names, `log_prefix` puts the rank in front of log lines.
"""
