"""args.json, which ms-swift writes beside the weights: with which chat template and system message the weights were trained.

Weights that are asked with another template than they were trained with answer worse, without any error: the template is taken, or reported.
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.record.reader import read_object
from launcher.redact import printable
from trainer.contract import Template

ARGS_FILE = "args.json"
TABLE = Path(__file__).with_name("swift_templates.yaml")
SHOWN = 60  # characters of a system message


@dataclass(frozen=True, kw_only=True)
class SwiftSettings:
    """`template`: ms-swift's name; `system`: None = that of the template. `max_pixels`: of an image, 0 = not said."""

    template: str
    system: str | None
    chat: bool
    max_pixels: int = 0


def read_swift(folder: Path) -> SwiftSettings | None:
    """None for a folder that ms-swift did not write."""
    content = read_object(folder / ARGS_FILE, []) if (folder / ARGS_FILE).is_file() else {}
    template, system, pixels = (content.get(key) for key in ("template", "system", "max_pixels"))
    if not isinstance(template, str) or not {"swift_version", "model_type"} & content.keys():
        return None
    return SwiftSettings(
        template=template,
        system=system if isinstance(system, str) else None,
        chat=content.get("use_chat_template") is not False,
        max_pixels=pixels if isinstance(pixels, int) and not isinstance(pixels, bool) and pixels > 0 else 0,
    )


@cache
def load_table() -> dict[str, Any]:
    from yaml import safe_load

    table: dict[str, Any] = safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def make_template(settings: SwiftSettings) -> Template | None:
    """In our form; None for a template that the table lacks."""
    table = load_table()
    known = table["templates"].get(settings.template)
    if known is None or not settings.chat:
        return None
    system = known["system"] if settings.system is None else settings.system
    frame = dict(table["frames"][known["frame"]])
    place = frame["system"].replace("{system}", "{content}")
    return Template(**{**frame, "system": frame["system"].replace("{system}", system) if system else "", "system_frame": place})


def take_swift(config: Config, settings: SwiftSettings, typed: Set[str]) -> tuple[Config, tuple[str, ...], tuple[str, ...]]:
    """The config with the template of the weights, what was taken, and notes about what was not."""
    taken: list[str] = []
    if settings.max_pixels and not config.data.max_pixels and "data.max_pixels" not in typed:
        config = replace(config, data=replace(config.data, max_pixels=settings.max_pixels))
        taken.append(f"data.max_pixels={settings.max_pixels}")
    wanted, name = make_template(settings), printable(settings.template)
    if wanted is None:
        how = f"ms-swift's template {name}" if settings.chat else "no chat template (use_chat_template=false)"
        note = (
            f"these weights were trained with {how}, as their {ARGS_FILE} says, and omnilaunch does not have it: it asks with the template of "
            f"{config.model.name}. Where they differ, the answers are worse: set model.template.system, .user, .assistant_open and .end_mark"
        )
        return config, tuple(taken), (note,)
    if "model.chat_template" not in typed:
        config = replace(config, model=replace(config.model, chat_template="conf"))  # ms-swift trains with its own, not that of the folder
    differing = [
        key for key in ("system", "user", "assistant_open", "end_mark") if getattr(wanted, key) != getattr(config.model.template, key)
    ]
    own = {key for key in differing if f"model.template.{key}" in typed}
    if own:
        note = f"{', '.join(f'model.template.{key}' for key in sorted(own))}: these weights were trained with another one, that of ms-swift's template {name}"
        return config, tuple(taken), (note,)
    if differing:
        config = replace(config, model=replace(config.model, template=wanted))
        taken += [f"model.template.{key}={shorten(getattr(wanted, key))}" for key in differing]
    return config, tuple(taken), ()


def shorten(text: str) -> str:
    shown = printable(repr(text))
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
