"""The doctor: what is wrong with the nodes of a plan, before a launch.

`doctor` is the module to read first: it asks every node once and runs all checks on the answers. `questions` holds what is asked, `parse`
and `smi` turn the answers into `node_facts`, `network` chooses interfaces. The checks are in `host_checks`, `device_checks`, `free_memory`,
`cross_node_checks` and `live_checks`; `findings` is how they report, `offers` makes sure that what they advise can work.
"""
