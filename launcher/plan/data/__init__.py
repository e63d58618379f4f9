"""The rows that a run trains on, counted before it: what run.epochs stands for.

Read `rows` first: it finds the files and counts them with `row_count`. `usable_rows` runs the data check where rows may be left out.
"""
