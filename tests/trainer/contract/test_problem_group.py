"""Rows with the same cause are one entry, with their number and three examples."""

from trainer.contract import DataProblem, describe_groups


def problem(row: int, text: str, *, field: str = "image", fix: str = "fix it", file: str = "a.json") -> DataProblem:
    return DataProblem(file=file, row=row, field=field, problem=text, fix=fix)


def test_one_problem_is_written_as_it_is() -> None:
    only = problem(3, "is 7")
    assert describe_groups([only], 9) == (str(only),)


def test_forty_rows_of_one_cause_are_one_entry() -> None:
    rows = [problem(row, f"no image file at /d/{row}.png") for row in range(1, 41)]
    (text,) = describe_groups(rows, 9)
    assert text.splitlines() == [
        "a.json, 40 rows (1, 2, 3, ...), key 'image': no image file at /d/1.png",
        "    also: no image file at /d/2.png; no image file at /d/3.png",
        "    fix it",
    ]


def test_the_same_text_is_written_once_and_other_causes_and_files_stay_apart() -> None:
    same = [problem(row, "empty answer", field=f"conversations[{row}].value") for row in (1, 2)]
    other = [problem(5, "empty answer", field="conversations[1].value", file="b.json"), problem(6, "is a number, not a path")]
    assert describe_groups([*same, *other], 9) == (
        "a.json, 2 rows (1, 2), key 'conversations[1].value': empty answer\n    fix it",
        *map(str, other),
    )


def test_the_fix_of_a_length_is_that_of_the_longest_row() -> None:
    rows = [
        problem(row, f"{n} tokens are more than 9", fix=f"set data.max_length={n}, or split it") for row, n in ((1, 10), (2, 100), (3, 99))
    ]
    (text,) = describe_groups(rows, 9)
    assert text.endswith("    set data.max_length=100, or split it")


def test_causes_that_are_left_out_are_counted() -> None:
    rows = [problem(row, f"cause {'xyz'[row % 3]}") for row in range(1, 10)]
    texts = describe_groups(rows, 1)
    assert len(texts) == 2 and texts[1] == "... and 6 more"


def test_files_that_cannot_be_read_are_not_put_together() -> None:
    files = [problem(0, f"cannot be read: {n}", field="") for n in (1, 2)]
    assert describe_groups(files, 9) == tuple(map(str, files))


def test_a_row_with_several_problems_is_counted_once() -> None:
    twice = [DataProblem(file="a.json", row=10, field=f"c[{index}]", problem="is missing", fix="write it") for index in range(2)]
    (text,) = describe_groups(twice, 9)
    assert text.startswith("a.json, 1 row (10), key 'c[0]': is missing")
