"""Words of texts that people read, for launcher and trainer."""


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `1,500 rows`. `noun`: in the singular, of which the plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
