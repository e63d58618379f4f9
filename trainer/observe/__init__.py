"""What a run reports about itself while it runs. Reports are computed elsewhere, from these files.

Read `metric` first: metrics.jsonl, one row per step. `tracker` feeds TensorBoard and others, `memory` measures peaks per phase, `profile`
runs the profiler, `environment` collects the facts of environment.json.
"""
