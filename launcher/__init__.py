"""Plans, starts, supervises and records runs, on this machine or over SSH. Never imports torch.

Read `cli` first: its table names the module of each verb in `commands`. The packages in the order of their imports: config, image, memory,
check, plan, ssh, record, doctor, run, bench, commands. `errors` has one class for each exit code, `redact` keeps secrets out of texts.
docs/architecture.md has a picture, and the path of a run through the packages.
"""
