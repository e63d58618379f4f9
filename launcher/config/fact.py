"""Which keys of the config describe the world and may not be overridden: `facts.toml` lists them with the reason and what to write instead."""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.defaults import keys_of
from launcher.config.schema import Config
from launcher.errors import ConfigRefused

FILE = Path(__file__).with_name("facts.toml")


@cache
def load_facts() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def is_fixed(key: str) -> bool:
    """Whether no override may ever set the key."""
    row = find_row("fixed", key)
    return row is not None and "unless" not in row


def may_set(key: str, source: str) -> bool:
    """Whether an override may set the key, where `source` is model.source.kind."""
    row = find_row("fixed", key)
    return row is None or row.get("unless") == source


def refuse_fixed(key: str, text: str) -> None:
    """Raises ConfigRefused for a key that is fixed whatever the model."""
    if is_fixed(key):
        raise ConfigRefused(explain(key, text))


def refuse_facts(overrides: Sequence[str], source: str) -> None:
    """Raises ConfigRefused naming every override of a fact about weights that exist. `source`: model.source.kind of the config."""
    pairs = [override.partition("=") for override in overrides]
    fixed = [(key, text) for key, _, text in pairs if not may_set(key, source)]
    if fixed:
        lines = (f"  {key}={text}: {explain(key, text)}" for key, text in fixed)
        heading = (
            "the config is refused, one override is wrong:"
            if len(fixed) == 1
            else f"the config is refused, {len(fixed)} overrides are wrong:"
        )
        raise ConfigRefused("\n".join((heading, *lines)))


def refuse_ignored(overrides: Sequence[str], model: str, rule: str) -> None:
    """Raises ConfigRefused for a limit of images that this model's processor does not have. `rule`: of model.image_tokens."""
    for override in overrides:
        key, _, text = override.partition("=")
        row = next((row for row in load_facts()["limit"] if row["key"] == key), None)
        if row and rule not in row["rules"] and text.strip() not in ("0", "null"):
            other = next((each for each in load_facts()["limit"] if rule in each["rules"]), None)
            instead = (
                f"write {other['key']}=N, {other['means']}" if other else "every image has the same size and number of tokens: leave it out"
            )
            raise ConfigRefused(
                f"the config is refused, one override is wrong:\n  {override}: {key} is {row['means']}, and {model} has no such limit; {instead}"
            )


def explain(key: str, text: str) -> str:
    """Why the key cannot be set, and what to write."""
    row, instead = find_row("fixed", key) or {}, load_facts()["instead"]
    offer = next((instead[name] for name in prefixes(key) if name in instead), row.get("instead", ""))
    sentence = f"{key} is {row['what']}: an override would change the plan and not the run"
    return f"{sentence}; {offer.replace('{}', text.strip())}" if offer else f"{sentence}. Leave it out"


def find_row(section: str, key: str) -> dict[str, Any] | None:
    """The row of `section` that lists the key, or a section that the key is in."""
    names = prefixes(key)
    found: dict[str, Any] | None = next((row for row in load_facts()[section] if set(names) & set(row["keys"])), None)
    return found


def prefixes(key: str) -> list[str]:
    """The key, and the sections that it is in: a.b.c, a.b, a."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


# ------------------------------------------------------------------------------------- once all overrides are known


def use_checkpoint_template(config: Config) -> Config:
    """A new config, with the chat template of the checkpoint where it has one. A plan of an earlier version does not say which one it used."""
    return replace(config, model=replace(config.model, chat_template=config.model.chat_template or "auto"))


def complete(config: Config, overrides: Sequence[str]) -> Config:
    """Activations are in the dtype of the weights, and a chat template that was typed is used. Raises ConfigRefused for overrides of facts about
    weights that exist."""
    typed = keys_of(overrides)
    refuse_facts(overrides, config.model.source.kind)
    if "stage.checkpoint" not in typed:  # whose model is judged where it is known
        refuse_ignored(overrides, config.model.name, config.model.image_tokens.rule)
    if any(key.startswith("model.template.") for key in typed) and "model.chat_template" not in typed:
        config = replace(config, model=replace(config.model, chat_template="conf"))
    if "precision.weights" in typed:
        return replace(config, precision=replace(config.precision, compute=config.precision.weights))
    return config
