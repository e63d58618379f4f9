"""What a rule of `check` says when a config cannot work."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.config.schema import Config
from launcher.image.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`changes`: overrides that would pass, each by itself. `launch_only`: a plan can be made, but not carried out. `forcible`:
    `run.force` may override it, since the run could at least be tried."""

    key: str
    what: str
    changes: tuple[str, ...] = ()
    launch_only: bool = False
    forcible: bool = False

    def __str__(self) -> str:
        return f"  {self.key}: {self.what}" + (f"\n    would pass: {'  or  '.join(self.changes)}" if self.changes else "")


# Holds a config, and the rows of images/versions.yaml by name, against one fact.
Rule = Callable[[Config, Mapping[str, Stack]], Iterator[Problem]]
