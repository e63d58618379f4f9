"""Rules about free text: what env-files, mounts and configuration files cannot carry unchanged is refused, with its key. All other text
reaches the ranks as it was written; no shell reads it on the way."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from trainer.contract.row_sets.row_set import as_entries

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_VARIABLES = "OMNILAUNCH_"  # identify the processes of a run
VALUE_LIMIT_BYTES = 60_000  # docker reads lines of an environment file up to 64 KiB
PATH_LIMIT_BYTES = 4000  # PATH_MAX of Linux is 4096, and our own files are below these folders
MOUNT_SYNTAX = re.compile(r'[,"\n\r]')  # docker reads --mount as a line of CSV, and drops a carriage return at its end
IMAGE_NAME = re.compile(r"\w[\w./:@-]*")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PATHS = ("cluster.root", "data.images", "data.info", "data.mirror", "stage.checkpoint", "model.source.path")
PATH_LISTS = ("cluster.mounts", "cluster.sync")


def texts_are_utf8(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A lone surrogate comes from a file or a terminal that is not UTF-8."""
    for key, text in read_texts(config):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            yield Problem(key=key, what=f"{text!a} is not UTF-8: it contains a lone surrogate, which cannot be written to a file")


def read_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a dataclass, including the keys of tables."""
    if isinstance(value, str):
        yield key, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from read_texts(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from read_texts(item, f"{key}.{place}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from read_texts(item, f"{key}.{name}")


def variables_can_be_carried(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """In an env-file, which has lines of NAME=value without any quoting."""
    for section, environment in (("cluster", config.cluster.environment), ("hardware", config.hardware.environment)):
        for name, value in environment.items():
            key = f"{section}.environment.{name}"
            if not VARIABLE.fullmatch(name):
                yield Problem(key=f"{section}.environment", what=f"{name!r} is not a valid name of a variable")
            elif name.startswith(OWN_VARIABLES):
                yield Problem(key=key, what=f"variables that begin with {OWN_VARIABLES} are set by omnilaunch")
            elif re.search(r"[\n\r\0]", value):
                # Docker reads it line by line, and drops a carriage return at the end of a line.
                yield Problem(
                    key=key, what="an env-file cannot hold a newline or a NUL: put the text in a file, and set the variable to its path"
                )
            elif len(value.encode(errors="replace")) > VALUE_LIMIT_BYTES:
                what = f"a line of an env-file holds at most {VALUE_LIMIT_BYTES:,} bytes: put the text in a file, and set the variable to its path"
                yield Problem(key=key, what=what)


def paths_can_be_carried(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for key, path in read_paths(config):
        if "\0" in path or len(path.encode(errors="replace")) > PATH_LIMIT_BYTES:
            what = f"{path[:100]!r} is not a valid path: it contains a NUL, or has more than {PATH_LIMIT_BYTES} bytes"
            yield Problem(key=key, what=what)
        elif config.cluster.runtime == "docker" and not key.startswith("cluster.sync.") and (why := why_no_mount(path)):
            yield Problem(key=key, what=why)


def read_paths(config: Config) -> Iterator[tuple[str, str]]:
    yield from ((key, attrgetter(key)(config)) for key in PATHS)
    for side in ("train", "evaluation"):
        for place, entry in enumerate(as_entries(entries := getattr(config.data, side))):
            key = f"data.{side}.{place}.file" if isinstance(entries, tuple) else f"data.{side}"
            yield from ((name, path) for name, path in ((key, entry.file), (f"data.{side}.{place}.images", entry.images)) if path)
    for key in PATH_LISTS:
        yield from ((f"{key}.{place}", path) for place, path in enumerate(attrgetter(key)(config)))


def why_no_mount(path: str) -> str:
    """Why `docker run --mount` cannot take the path; '' if it can."""
    if not MOUNT_SYNTAX.search(path):
        return ""
    return (
        f"Docker cannot mount the path {path!r}: it reads commas, quotes and newlines as syntax. Rename it, or make a symbolic link to it"
    )


def delivery_can_be_written(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """The base image is written to a Dockerfile, mirrors to pip's configuration, and the CA bundle to an option in CSV."""
    delivery = config.cluster.delivery
    for key, text in read_texts(delivery, "cluster.delivery"):
        if CONTROL.search(text):
            yield Problem(key=key, what=f"{text!r} contains a newline or another control character, which would start another setting")
    if delivery.base and not CONTROL.search(delivery.base) and not IMAGE_NAME.fullmatch(delivery.base):
        yield Problem(key="cluster.delivery.base", what=f"{delivery.base!r} is not the name of an image: HOST[:PORT]/PATH[:TAG][@DIGEST]")
    if re.search(r'[,"]', delivery.ca_bundle):
        what = f"Docker reads commas and quotes in {delivery.ca_bundle!r} as syntax. Rename it, or make a symbolic link to it"
        yield Problem(key="cluster.delivery.ca_bundle", what=what)


TEXT_RULES: tuple[Rule, ...] = (texts_are_utf8, variables_can_be_carried, paths_can_be_carried, delivery_can_be_written)
