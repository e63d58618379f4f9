"""Scripts that the doctor runs on a node. They are sent as text, and need only what a node has.

`reach` is Python, and runs in a container of the run's image. The *.sh need a POSIX shell and coreutils; questions.py says which
arguments each of them takes. None of them is imported by the launcher.
"""
