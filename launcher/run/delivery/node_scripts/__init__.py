"""Programs that the launcher runs on nodes, by `sh -c`, `bash -c` or `python -c`; `script.read_script` reads their text.

The shell scripts need nothing but a POSIX shell (bash for the image transfer) and the usual tools. `serve_image` runs with the Python
of the image.
"""
