"""Options of the whole test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="keep what tests/images has shown in images/proven.json")
    parser.addoption("--rounds", type=int, default=1, help="how often tests/cluster/test_stop.py ends a run in each way")
    parser.addoption("--kills", type=int, default=3, help="how many SIGKILLs tests/trainer/test_kill.py shares out to 1, 2 and 4 ranks")
