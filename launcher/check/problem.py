"""What a rule of `check` reports when a config cannot work."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.config.schema import Config
from launcher.image.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`changes`: overrides that would pass, each by itself. `launch_only`: a plan can be made, but not launched. `forcible`: `run.force`
    may override the refusal, because the run could at least be tried."""

    key: str
    what: str
    changes: tuple[str, ...] = ()
    launch_only: bool = False
    forcible: bool = False

    def __str__(self) -> str:
        return f"  {self.key}: {self.what}" + (f"\n    would pass: {'  or  '.join(self.changes)}" if self.changes else "")


# Checks a config with a resolved strategy, given the rows of images/versions.yaml by name.
Rule = Callable[[Config, Mapping[str, Stack]], Iterator[Problem]]
