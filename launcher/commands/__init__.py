"""The verbs of `omnilaunch`, one module each; launcher/cli.py has the table of them.

Every module has add_arguments(parser) and run(arguments) -> exit code. A verb's heavy imports stand inside its functions, so that
`omnilaunch VERB --help` and shell completion, which import the module as well, stay fast.
Read `plan` first: launch, render, doctor and data build on its plan_of. `live/` holds the verbs for a run that is running.
"""
