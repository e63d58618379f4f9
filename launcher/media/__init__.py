"""Images that rows name by URL: downloaded once, before any run.

Read `fetch` first: the rows of a file into a folder with their images. `row_url` finds the URLs in a row, `web_image` gets one of them.
"""
