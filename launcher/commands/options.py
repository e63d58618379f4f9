"""`omnilaunch options`: the values of each axis, which are the files of conf/AXIS."""

import argparse

from launcher.commands.plan import add_conf, conf_of
from launcher.errors import ConfigRefused, suggest
from trainer.contract import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("axis", nargs="?", default="", metavar="AXIS", help="show only this one")
    add_conf(parser)


def run(arguments: argparse.Namespace) -> int:
    from launcher.config.compose import options

    axes = options(conf_of(arguments))
    if arguments.axis and arguments.axis not in axes:
        raise ConfigRefused(f"unknown axis {arguments.axis!r}; {suggest(arguments.axis, axes)}")
    for axis, names in axes.items():
        if not arguments.axis or axis == arguments.axis:
            print(f"{axis:10} {'  '.join(names)}")
    return Exit.OK
