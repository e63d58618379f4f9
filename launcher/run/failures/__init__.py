"""Known failures as data: one YAML file for each part of the stack, with what a failure looks like in a log, what it means and what to do.

Read `symptom` first: it loads the files, and only when a log is to be explained. `explanation` looks for all of them in a log of any program.
docs/errors.md is written from them: `python -m launcher.run.diagnosis > docs/errors.md`.
"""
