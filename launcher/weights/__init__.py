"""Where weights come from: fetched from a hub into a folder, checked there, and recognised as one of our models.

Read `fetch` first: it lists a repository (`huggingface`, `modelscope`), selects the files that are needed (`selection`), downloads each of
them (`download`, over `client`, at an `endpoint`) and writes the `manifest`. `folder` checks a folder, `identity` says which model it holds, and `source`
finds the folder of a config. Nothing here runs code from a repository, and nothing imports torch.
"""
