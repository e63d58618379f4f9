"""Lists of sets, and held-out rows by number."""

import re
from functools import cache
from pathlib import Path

import pytest

from launcher.check.rules import check
from launcher.config.compose import compose
from launcher.image.stack import Stack, load_stacks

ROOT = Path(__file__).parents[3]


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


# override -> what is refused, or ''
CASES = {
    "data.train=[a.json,b.json]": "",
    "data.train=[]": "data.train: is an empty list",
    "data.train=[{file: a.json, samples: -1}]": "data.train.0.samples: ",
    "data.train=[{file: ''}]": "data.train.0.file: is empty",
    "data.train=[{file: a.json, repeat: 2}]": "",
    "data.train=[{file: a.json, repeat: 0.5}]": "",
    "data.train=[{file: a.json, repeat: 1.5}]": "data.train.0.repeat: is 1.5",
    "data.train=[{file: a.json, repeat: 0}]": "data.train.0.repeat: is 0",
    "data.train=[{file: a.json, weight: 0.5}]": "data.train.0.weight: counts with data.mixing=interleave only",
    "data.train=[{file: a.json, weight: 0.5}] data.mixing=interleave": "",
    "data.train=[{file: a.json, weight: 0}] data.mixing=interleave": "data.train.0.weight: is 0; it must be above 0",
    "data.evaluation=[{file: b.json, repeat: 2}]": "data.evaluation.0.repeat: is for training rows",
    "data.evaluation=[b.json,c.json]": "",
    "data.evaluation=0.05": "",
    "data.evaluation=5%": "",
    "data.evaluation=200": "",
    "data.evaluation=0": "data.evaluation: 0 holds out no row",
    "data.evaluation=0.0": "data.evaluation: 0.0 holds out no row",
    "data.evaluation=1.5": "data.evaluation: 1.5 is neither a share below 1 nor a number of rows",
    "data.evaluation=150%": "data.evaluation: 150% is neither",
    "data.evaluation=0.1 data.train=": "data.evaluation: 0.1 is held out of data.train, which is empty",
    "data.evaluation=200.json": "",
    "data.max_samples=-1": "data.max_samples: ",
}


@pytest.mark.parametrize("words", CASES)
def test_entries_and_splits(words: str) -> None:
    given = dict(word.split("=", 1) for word in re.split(r" (?=data\.)", words))
    overrides = ["data=files", *(f"{key}={value or repr(value)}" for key, value in ({"data.train": "a.json"} | given).items())]
    problems = check(compose(overrides, ROOT / "conf"), stacks()).problems
    found = [str(problem).strip() for problem in problems if problem.key.startswith("data.")]
    assert (found == []) if not CASES[words] else any(text.startswith(CASES[words]) for text in found), found


def test_built_in_rows_have_held_out_ones() -> None:
    verdict = check(compose(("data=digits", "data.evaluation=0.1"), ROOT / "conf"), stacks())
    assert any("has held-out rows of its own" in problem.what for problem in verdict.problems)
