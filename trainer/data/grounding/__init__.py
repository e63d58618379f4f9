"""Boxes and points in texts: ms-swift's objects, and boxes that are written in the text.

Read `placement` first: it fills a sample's objects in and converts the boxes of its texts to the coordinates of the model. `box_form` is the
table of how each family writes them, `box_text` finds them in a text, `objects` reads and checks the key of a row.
"""
