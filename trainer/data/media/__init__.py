"""Media files that rows refer to: open, check and convert them.

Read `image`: it opens an image file as upright RGB pixels, reads its size from the header, and checks and hashes it.
"""
