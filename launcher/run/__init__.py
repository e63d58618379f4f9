"""Carrying out a plan on its nodes: prepare, start, watch, restart, stop, and explain a failure.

Read `launch` first: its `launch` and `supervise` are the whole path. `prepare` and `monitor` are its two halves; `gang` handles all nodes together,
`node_process` one of them. delivery/ brings the image and files to the nodes, offline/ writes a run as scripts, failures/ holds known failures.
"""
