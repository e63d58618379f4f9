"""Options of the whole test suite."""

import os
import signal

import pytest

# What `make` hands on to the programs that it starts: a `make` of a test would take its flags and the variables of its command line (ARGS).
OF_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="keep what tests/images has shown in images/proven.json")
    parser.addoption("--rounds", type=int, default=1, help="how often tests/cluster/test_stop.py ends a run in each way")
    parser.addoption(
        "--kills", type=int, default=3, help="how many SIGKILLs tests/trainer/train/test_kill.py shares out to 1, 2 and 4 ranks"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The targets of the Makefile choose by the marks. With two of them a test would run under a target that its reader does not expect."""
    for item in items:
        marks = [name for name in ("slow", "long") if item.get_closest_marker(name)]
        if len(marks) > 1:
            raise pytest.UsageError(f"{item.nodeid} is marked {' and '.join(marks)}: leave one of them")


def pytest_configure() -> None:
    for name in OF_MAKE:
        os.environ.pop(name, None)
    take_signals()


def take_signals() -> None:
    """What tests start begins with default signals, also where they run in the background of a shell or under nohup, which ignore some: a
    handler of Python's, unlike that, is not handed on to a program."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, _: print(f"the tests go on in spite of {signal.Signals(number).name}"))
