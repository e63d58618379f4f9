"""Problems of data as text: rows with the same cause are one entry, with their number and three examples."""

import re
from collections.abc import Mapping, Sequence

from trainer.contract.rows import DataProblem, LeftOutRow
from trainer.contract.wording import shorten_values

MODEL = "model "  # in place of the file, and before the name of the model: a problem of the model, of which no row is the cause
_EXAMPLES = 3
# What differs between rows with the same cause: quoted values, paths and numbers.
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S+\.\w{2,4}\b|\d+")
_LENGTH = re.compile(r"data\.max_length=(\d+)")


def describe_groups(problems: Sequence[DataProblem], groups: int) -> tuple[str, ...]:
    """A text for each cause, at most `groups` of them, in the order of the first row of each; then how many are left out."""
    found = group_problems(problems)
    shown = tuple(map(describe_group, found[:groups]))
    rest = sum(map(len, found[groups:]))
    return (*shown, f"... and {rest:,} more") if rest else shown


def blame(problems: Sequence[DataProblem]) -> str:
    """What has these problems: "data", or "model" where no row is the cause."""
    return "model" if problems and all(problem.file.startswith(MODEL) for problem in problems) else "data"


def suggest_skip(problems: Sequence[DataProblem], good_rows: int) -> str:
    """How to go on without the rows that have these problems; "" where that would leave less than half of the rows, or a file or the model is the
    cause. `good_rows`: rows without a problem."""
    bad_rows = len({(problem.file, problem.row) for problem in problems})
    if not problems or not all(problem.row for problem in problems) or bad_rows > good_rows:
        return ""
    these, are = ("this row", "is") if bad_rows == 1 else ("these rows", "are")
    return f"or add data.bad_rows=skip: {these} {are} left out and listed, and the others are trained on"


def describe_left_out(counts: Mapping[str, int]) -> str:
    """`counts`: as of DataReport.left_out. "3 training rows left out, 1 held-out row cut"."""
    names = {"train": "training row", "evaluation": "held-out row"}
    parts = ((names.get(use, use), count, done) for key, count in counts.items() for use, _, done in (key.partition(" "),))
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'} {done}" for name, count, done in parts)


def as_problem(row: LeftOutRow) -> DataProblem:
    """For a text: rows with the same reason are grouped as problems are. What was done takes the place of the fix."""
    use = "" if row.use == "train" else "held-out: "
    return DataProblem(file=row.file, row=row.row, field=row.key, problem=row.reason, fix=f"{use}{row.done}")


def group_problems(problems: Sequence[DataProblem]) -> tuple[tuple[DataProblem, ...], ...]:
    """Problems of one file, key and cause together."""
    groups: dict[tuple[str, str, str], list[DataProblem]] = {}
    for problem in problems:
        field, cause = (_VARYING.sub("*", text) for text in (problem.field, problem.problem))
        groups.setdefault((problem.file, field, cause if problem.row else problem.problem), []).append(problem)
    return tuple(map(tuple, groups.values()))


def describe_group(group: Sequence[DataProblem]) -> str:
    """One problem as it is; several as one line with their number and the first rows, and the texts of those where they differ."""
    group = [shorten_problem(problem) for problem in group[:_EXAMPLES]] + list(group[_EXAMPLES:])
    first = group[0]
    if len(group) == 1:
        return str(first)
    shown = list(dict.fromkeys(problem.row for problem in group))
    rows = ", ".join(map(str, shown[:_EXAMPLES])) + (", ..." if len(shown) > _EXAMPLES else "")
    key = f", key {first.field!r}" if first.field else ""
    texts = list(dict.fromkeys(problem.problem for problem in group[:_EXAMPLES]))
    others = [f"    also: {'; '.join(texts[1:])}"] if len(texts) > 1 else []
    return "\n".join(
        (
            f"{first.file}, {len(shown):,} {'row' if len(shown) == 1 else 'rows'} ({rows}){key}: {texts[0]}",
            *others,
            f"    {choose_fix(group)}",
        )
    )


def shorten_problem(problem: DataProblem) -> DataProblem:
    return DataProblem(
        file=problem.file,
        row=problem.row,
        field=shorten_values(problem.field),
        problem=shorten_values(problem.problem),
        fix=shorten_values(problem.fix),
    )


def choose_fix(group: Sequence[DataProblem]) -> str:
    """That of the first row; where it is a length, that of the longest row, which is right for all of them."""
    lengths = [int(found[1]) if (found := _LENGTH.search(problem.fix)) else 0 for problem in group]
    return group[lengths.index(max(lengths))].fix
