"""The record of a run, `runs/<run_id>/`: written by the launcher, read back by every command that looks at runs.

Read `record` first: it says what a record is, and opens and closes it. `reader` reads its files, strictly or leniently; `recorded_run` and
`run_files` read whole folders with it, `metrics` the rows of steps. `verdict` compares runs, `report/` draws them, `index` lists and `prune`
removes them, `lock` keeps a second launcher away.
"""
