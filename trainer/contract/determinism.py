"""The variables of a run with run.deterministic=true: the table is determinism.toml."""

from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("determinism.toml")


@cache
def deterministic_variables(accelerator: str) -> dict[str, tuple[str, ...]]:
    """Variable -> the values that make it deterministic; the first one is set by the launcher. `accelerator`: cpu, cuda or npu."""
    import tomllib  # 4 ms, which only a deterministic run needs

    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: tuple(values) for name, values in table[accelerator].items()}
