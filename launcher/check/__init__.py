"""Every reason why a config cannot work that its own numbers decide, each with overrides that would pass.

Read `rules` first: it runs all rules and judges the overrides that they offer. The rules are grouped by subject (`precision`, `hardware`,
`nodes`, `docker`, `strings`, `recipe`, `adapters`, `inference`). `strategy` resolves what the user left open; `suggestions` refuses what
does not fit in memory, and finds what would.
"""
