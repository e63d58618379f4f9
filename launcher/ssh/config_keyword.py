"""Which keywords of the ssh config a connection honours, and which it ignores: ssh_config_keys.yaml."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("ssh_config_keys.yaml")
OFF = ("no", "none", "any", "")  # values that ask for nothing


@cache
def keywords() -> dict[str, dict[str, str]]:
    """honoured, unneeded, ignored -> keyword -> reason, '' for those that are honoured."""
    import yaml

    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    unneeded = {keyword: reason for reason, words in table["unneeded"].items() for keyword in words}
    return {"honoured": dict.fromkeys(table["honoured"], ""), "unneeded": unneeded, "ignored": table["ignored"]}


def find_ignored(config: Mapping[str, Any]) -> Iterator[str]:
    """One line for each keyword of a host that is ignored although it asks for something. `config`: keyword in lower case -> value."""
    for keyword, reason in keywords()["ignored"].items():
        value = config.get(keyword.lower())
        if value is not None and str(value).lower() not in OFF:
            yield f"{keyword} is ignored: {reason}"
