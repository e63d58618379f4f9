"""The usual learning rates for random weights, which are far above those of fine-tuning."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RandomRate:
    """Peak rates of AdamW. `source`: where they are from."""

    low: float
    high: float
    source: str


@cache
def load_random_rate() -> RandomRate:
    import yaml

    return RandomRate(**yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))
