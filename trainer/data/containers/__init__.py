"""Files of rows, by their format. The content of a row is not interpreted here.

Read `annotation` first: it streams the rows of a JSON list or of JSON Lines. `row_index` finds the rows of a large file without reading it
whole.
"""
