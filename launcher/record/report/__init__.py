"""`omnilaunch report`: runs as an HTML page, as Markdown or as CSV, computed from their records alone.

Read `page` first: it puts together what `summary`, `timeline`, `answers` and `figures` (curves as SVG) make of a record.
"""
