"""The container image of a run: what is in it, how it is built, and which images this machine's Docker engine has.

Read `stack` first: the rows of images/versions.yaml, and the one image (Dockerfile, files, fingerprint) that belongs to a row. `build` builds
it, `docker` asks the engine, `wheelhouse` is for sites without a network, `refresh` resolves the locks (with `resolver` and `registry`),
`proof` and `docs` keep and print what was built and tested, `licence` which licences the user has accepted.
"""
