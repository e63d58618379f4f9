"""Which files `data.train` and `data.evaluation` name, and how their rows are to be read.

Read `source` first: it finds the files of a meta file. `column_map` renames the keys of a file as the dataset_info.json beside it says.
"""
