"""From conf/*.yaml and overrides to one frozen, typed Config.

Read `schema` first: it has the dataclass of each axis. `compose` builds a Config with Hydra, or reports every wrong key and value;
`chain` reads the experiments that are several stages one after the other; `credentials` handles the addresses that hold passwords.
`hint` says what an unknown word may mean, by the tables of `synonym` and `variable` and by `official_name`; `fact` which keys no override
may set. `setting`, `axis_value` and `search` are what `omnilaunch options` prints.
"""
