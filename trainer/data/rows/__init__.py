"""Annotation files to Samples: every supported row format, and every problem of a row with file, row, key and fix.

Read `sample` first: it has the Sample and reads a whole file. `source` finds the files (`column_map` renames their keys), `annotation` reads
JSON and JSON Lines, `row_format` is the table of row formats (`turn` and `row_images` read messages and images into a `parsed_row`).
`request` reads the input file of stage infer: questions without answers.
"""
