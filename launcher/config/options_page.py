"""Writes docs/options.md from the tables of words: `python -m launcher.config.options_page > docs/options.md`."""

import sys
from collections.abc import Iterable, Iterator

from launcher.config.synonym import HOLE, UNFILLED, Synonym, load_synonyms
from launcher.config.variable import Variable, load_variables

HEAD = """# Options, and the words of other tools

<!-- Written by `python -m launcher.config.options_page > docs/options.md` from synonyms.yaml and variables.yaml in launcher/config. -->

```console
$ omnilaunch options
$ omnilaunch options stage.optimizer.lr stage=lora
$ omnilaunch options --search cutoff_len
```

The first lists every value of every axis, the second shows one key: its type, allowed values, default, current value, the file that sets it, and its
names in other tools. A key or a section may be followed by overrides. `--search` looks for a word among keys, values, meanings and the words below,
Chinese ones too (`--search 学习率`); `--json` prints the same as JSON.

A word of another tool is refused with what to write instead. Nothing is translated silently, since a batch size, a length or a stage may mean something
else there. `--learning_rate 1e-4` and `learning_rate: 1e-4` are answered in the same way. Keys that describe a model or a chip, such as the most pixels of
its processor, cannot be overridden: they would change the plan and not the run. launcher/config/facts.toml lists them.
"""
VARIABLES = """## Environment variables

Ranks do not inherit the variables of your shell, so that a line of a .bashrc cannot change a result. Of those below, `plan` and `launch` name each that is
set and matters for the run, with the override to write. Two are used: on this machine a run takes the devices that `CUDA_VISIBLE_DEVICES` or
`ASCEND_RT_VISIBLE_DEVICES` leaves it, as `cluster.nodes.0.devices`, which is recorded like an override. With `cluster.runtime=process` the ranks also get
`HF_HOME`, `HF_TOKEN` and `XDG_CACHE_HOME`, and where CANN is, as its `set_env.sh` exports it (`ASCEND_HOME_PATH` and the others); a container gets a
secret only through `cluster.secrets`.
"""


def write_page() -> str:
    table = load_synonyms()
    values = [(f"{axis}={row.words[0]}", row) for axis, rows in table.values.items() for row in dict.fromkeys(rows.values())]
    parts = [
        HEAD,
        section("Keys", "of another tool", ((row.words, row) for row in dict.fromkeys(table.keys.values()))),
        section("Sections", "of the nested config of another tool", ((row.words, row) for row in dict.fromkeys(table.sections.values()))),
        section("Values", "as people say it", (((first, *row.words[1:]), row) for first, row in values)),
        section("Verbs", "of another tool", ((row.words, row) for row in dict.fromkeys(table.verbs.values()))),
        VARIABLES,
        "\n".join(("| variable | write |", "|---|---|", *map(write_variable, (row for row in load_variables() if not row.kept)))),
    ]
    tools = ", ".join(f"{code} {name}" for code, name in table.tools.items())
    return "\n".join((*parts, "", f"Tools: {tools}.")) + "\n"


def section(title: str, column: str, rows: Iterable[tuple[tuple[str, ...], Synonym]]) -> str:
    return "\n".join(
        (f"## {title}", "", f"| {column} | here | tools |", "|---|---|---|", *(write_row(words, row) for words, row in rows), "")
    )


def write_row(words: tuple[str, ...], row: Synonym) -> str:
    return f"| {code(words)} | {'; '.join(list_answers(row))} | {' '.join(row.tools)} |"


def list_answers(row: Synonym) -> Iterator[str]:
    if row.axis:
        yield f"`{row.axis}=NAME`"
    if row.write:
        yield " or ".join(f"`{text.replace(HOLE, UNFILLED)}`" for text in row.write)
    if row.group:
        yield f"`stage.trainable` with{'out' if row.frozen else ''} {row.group}"
    if row.says:
        yield row.says


def write_variable(row: Variable) -> str:
    names = (*row.names, *(f"{prefix}*" for prefix in row.prefixes))
    written = row.write.replace(HOLE, UNFILLED).replace("{name}", row.names[0] if len(row.names) == 1 else "NAME")
    return f"| {code(names)} | {f'`{written}`' if written else row.says} |"


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    sys.stdout.write(write_page())
