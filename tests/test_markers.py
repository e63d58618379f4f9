"""The targets of the Makefile and .ci/run leave no test out, whatever its marks are."""

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("docker", "network", "cluster", "slow", "long")
pytest_plugins = ("pytester",)


def read_expressions() -> dict[str, str]:
    """Target -> what it hands to -m."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    offline = re.search(r"^OFFLINE := (.*)$", text, re.M)
    assert offline
    found = dict(re.findall(r'^([a-z-]+): setup .*\n\t@.*?-m "?([a-z() $A-Z]+?)"? \$\(ARGS\)$', text, re.M))
    return {target: expression.replace("$(OFFLINE)", offline[1]) for target, expression in found.items()}


def targets_of(marks: dict[str, bool]) -> set[str]:
    """An expression of pytest's is one of Python's too."""
    return {target for target, expression in read_expressions().items() if eval(expression, {"__builtins__": {}}, dict(marks))}


def test_all_markers_are_declared() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert tuple(line.split(":")[0] for line in options["markers"]) == MARKERS
    assert "--strict-markers" in options["addopts"].split()


@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=len(MARKERS))))
def test_every_test_has_a_target(values: tuple[bool, ...]) -> None:
    marks = dict(zip(MARKERS, values, strict=True))
    if marks["cluster"]:
        expected = {"test-cluster"}
    elif marks["docker"] or marks["network"]:
        expected = {"image-check"}
    elif marks["long"]:
        expected = {"test-all"}
    else:
        expected = {"test-all", "test-slow" if marks["slow"] else "test"}
    assert targets_of(marks) == expected


def test_ci_runs_every_target_but_the_long_one() -> None:
    """By marks alone: `--deselect` of a test that has another name by now deselects nothing, without a word."""
    lines = [shlex.split(line) for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    targets = [words[1] for words in lines]
    assert targets == ["lint", "test", "test-slow", "image-check", "test-cluster"]
    assert not any("deselect" in word or " -m" in word for words in lines for word in words)


def test_a_test_that_is_both_slow_and_long_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n slow\n long")
    pytester.makepyfile("import pytest\npytestmark = pytest.mark.slow\n\n\n@pytest.mark.long\ndef test_both():\n    pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_both is marked slow and long: leave one of them"])
