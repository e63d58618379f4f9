"""What `python -m trainer run` runs: one module per kind of stage, each with `run_program(spec, rank, environ)`.

Read `dispatch` first: checks, process group, and the table from kinds to modules. `inputs` prepares data and model, `environment` writes
environment.json, `device_map` spreads a model over several cards.
"""
