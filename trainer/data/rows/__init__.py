"""Rows to Samples: every supported row format, and every problem of a row with file, row, key and fix.

Read `sample` first: it has the Sample and reads a whole file. `row_format` is the table of row formats (`turn` and `row_images` read messages
and images into a `parsed_row`), `row_check` what is checked without decoding an image. `request` reads the input file of stage infer:
questions without answers.
"""
