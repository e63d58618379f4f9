"""The sets of rows that a config names: the launcher counts their rows, the trainer reads them. Standard library only.

Read `row_set` first: from an entry of data.train to files. `row_files` looks into folders, `data_set_info` reads dataset_info.json, `hub_copy` finds
copies of a hub's data sets; `selection` says how many rows of each set are used.
"""
