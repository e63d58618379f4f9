"""Rows to Samples: every supported row format, and every problem of a row with file, row, key and fix.

Read `sample` first: it has the Sample and reads a whole file. `row_format` is the table of row formats (`turn` and `row_images` read messages
and images into a `parsed_row`; `role`, `loss_flag`, `reasoning` and `tool` what else a message holds; `plain_row` rows without messages),
`row_check`, `known_key` and `text_mark` what is checked without decoding an image. `request` reads the input file of stage infer.
"""
