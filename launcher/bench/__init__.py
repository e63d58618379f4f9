"""Benchmarks and reruns: runs that repeat other runs, and what is published of them.

Read `cell` first: a pinned experiment. `repeats` runs it several times, `measure` makes the published result (`result`), and `matrix` the
table of docs/status.md. `rerun` makes the plan of a rerun from a record, with the code that `worktree` finds; `restore` makes such a record from
a published result, and `verdict` says whether the result was reproduced. `resume` makes the plan of another attempt of a run that ended early,
which `paused_run` reads.
"""
