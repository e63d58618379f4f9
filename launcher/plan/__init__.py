"""A plan: everything that a run will do, decided and written down before anything happens.

`plan` makes it from a config and is the module to read first. `commands` holds the start command of each node, `container` the options of
its container and the `docker run` made of them, `devices` what gives a container its accelerators. `local_context` reads this machine,
and `machine` judges what it lacks.
`short` and `full` describe a plan; `trace` measures the memory of one step in place of the estimate.
"""
