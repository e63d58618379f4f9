"""The devices that the caller's environment leaves a run on this machine: as overrides, which are recorded, and named in refusals."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from launcher.config.compose import compose
from launcher.config.conf_folder import ConfFolder
from launcher.config.defaults import keys_of
from launcher.config.variable import DEVICES, VISIBLE, describe_devices, use_visible_devices
from launcher.errors import ConfigRefused
from launcher.memory.states import device_count
from launcher.plan.plan import on_one_rank


@contextmanager
def naming_devices(typed: Sequence[str], used: Sequence[str], environ: Mapping[str, str]) -> Iterator[None]:
    """A refusal of the overrides `used` says which of them were not typed, but come from the caller's environment."""
    try:
        yield
    except ConfigRefused as error:
        if DEVICES in keys_of(typed) or not (note := describe_devices(environ, used)):
            raise
        raise type(error)(f"{error}\n  {note}") from error


def with_visible_devices(overrides: Sequence[str], conf: ConfFolder, environ: Mapping[str, str]) -> Sequence[str]:
    """With those by which a run on this machine takes the devices that the caller's environment leaves it."""
    if not any(environ.get(name) for name in VISIBLE.values()):
        return overrides
    config = compose(overrides, conf)
    return (*overrides, *use_visible_devices(environ, config, most=device_count(on_one_rank(config)), overrides=overrides))
