"""The values of a run that decide whether two runs are the same: how they are collected, by key, and which of them must match.

RULES is the contract: `rerun` and `compare` promise what it says.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from launcher.record.reader import nested
from launcher.record.run_files import RunFiles
from trainer.contract.environment_facts import was_left_out


class ComparableKind(Enum):
    """experiment: if it differs, the runs do different things, and are compared only with --unlike. input, environment: must match. free: may
    differ."""

    EXPERIMENT = "experiment"
    INPUT = "input"
    ENVIRONMENT = "environment"
    FREE = "free"


# The first pattern that matches a key decides. A key without a pattern is a part of the environment and must match: a new key is never ignored.
RULES: tuple[tuple[ComparableKind, tuple[str, ...]], ...] = (
    (
        ComparableKind.FREE,
        (
            *("config.*.title", "config.*.notes", "config.*.notes.*", "config.*.pending", "config.model.licence.*", "config.model.ready"),
            *("config.hardware.peaks", "config.hardware.peaks.*", "config.hardware.driver.*", "config.*.parameters.source"),
            *(
                "config.model.source.path",
                "config.model.source.modelscope",
                "config.model.source.endpoint",
                "config.model.source.dtype",
                "config.stage.checkpoint",
                "config.stage.base",
                "config.stage.needs",
                "config.stage.recorded*",
            ),
            *("config.data.train", "config.data.evaluation", "config.data.images", "config.data.workers"),
            *("config.data.rows", "config.run.epochs"),  # config.run.steps decides, and the hash of the data
            *("config.run.*timeout_s", "config.run.save_every*", "config.run.keep_*", "config.run.checkpoint_background"),
            *("config.run.trackers", "config.run.profile.*", "config.run.restarts", "config.run.minimum_nodes", "config.run.force"),
            *("config.run.bands.*", "config.cluster.name", "config.cluster.root", "config.cluster.nodes.*", "config.cluster.delivery.*"),
            *("config.cluster.*_s", "config.cluster.rendezvous_port", "config.cluster.mounts", "config.cluster.sync"),
            *("config.cluster.shared", "config.cluster.secrets", "config.cluster.user", "config.run.repeats"),
            *("variables.*.OMNILAUNCH_RUN_*", "environment.environment.OMNILAUNCH_RUN_*", "environment.environment.TORCHELASTIC_*"),
            *("environment.environment.MASTER_*", "variables.*.MASTER_*", "variables.*.*_SOCKET_IFNAME", "variables.*.*_IF_IP"),
            *("environment.environment.*_SOCKET_IFNAME", "environment.environment.*_IF_IP"),
            *("environment.ranks.*.hostname", "*.ASCEND_PROCESS_LOG_PATH", "*_VISIBLE_DEVICES"),
            *("origin.path", "origin.base", "origin.run_id", "result.attempts", "source.record_schema", "source.diff_bytes"),
            *("source.untracked", "source.changed", "source.conf"),
            "origin.images.*",  # as the weights, whose hash is compared; earlier versions have none
        ),
    ),
    (
        ComparableKind.EXPERIMENT,
        (
            *("config.model.name", "config.model.family", "config.model.architecture.*"),
            *("config.stage.name", "config.stage.kind", "config.data.name", "config.data.builtin"),
        ),
    ),
    (
        ComparableKind.INPUT,
        (
            *("data.*", "source.*", "origin.*", "result.*", "image.files.*", "image.lock*"),
            *("config.model.*", "config.stage.*", "config.precision.*", "config.strategy.*", "config.data.*", "config.run.*"),
        ),
    ),
    (ComparableKind.ENVIRONMENT, ("*",)),
)
# Sets of keys by name, for --allow: what differs on purpose when a run is repeated on other hardware, with another image ...
ALLOWANCES: dict[str, tuple[str, ...]] = {
    "hardware": (
        *("config.hardware.*", "config.cluster.*", "config.strategy.*"),
        *("environment.*", "variables.*", "image.*", "batch.*", "layout.*"),
    ),
    "image": ("config.cluster.runtime", "environment.*", "variables.*", "image.*"),
    "data": ("data.*", "inputs.data.*"),
    "code": ("source.*", "image.files.trainer/*", "image.fingerprint"),
}
# If only one run has one of these keys, that is a difference. Any other key that only one run has was not recorded by the other.
OPEN = (
    *("variables.*", "image.files.*", "config.*.environment.*"),
    *("environment.environment.*", "environment.packages.*", "environment.kernels.*", "result.resumed.*"),
    "data.left_out.*",
)
REPORTED = (  # keys of environment.json
    *("python", "platform", "packages", "accelerator", "devices", "driver", "world_size", "threads", "environment"),
    *("deepspeed", "kernels", "parameters", "trainable", "toolkit", "settings", "determinism", "ranks"),
)
IMAGE_KEYS = ("stack", "architecture", "base", "files", "lock", "fingerprint")
DATA_KEYS = ("sha256", "train_rows", "evaluation_rows", "images")
CLEAN = {"diff_sha256": "", "diff_lacks": ""}  # of a tree without changes; records of schema 1 do not have these keys
COMMIT, FILES, VARIABLES = "source.commit", "image.files.", "environment.environment."
ABSENT = "(none)"
MAX_FILES = 20  # names of inputs that differ


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that differs between two runs, each side as text. `known`: both runs recorded it."""

    key: str
    kind: ComparableKind
    left: str
    right: str
    known: bool = True
    allowed: bool = False

    @property
    def matters(self) -> bool:
        """Whether it makes the runs different."""
        return self.kind is not ComparableKind.FREE and self.known and not self.allowed


# ------------------------------------------------------------------------------------------------------------- collecting


def collect_comparables(run: RunFiles) -> dict[str, Any]:
    """Key -> value, the inputs first. Hosts, folders and times are not compared."""
    plan, record, environment = run.plan, run.record, run.environment
    commands = [command for command in plan.get("commands") or () if isinstance(command, dict)]
    reported = pick(environment, REPORTED)
    if isinstance(reported.get("devices"), list):
        reported["devices"] = [without_host(title) for title in reported["devices"]]
    if isinstance(reported.get("ranks"), list):
        reported["ranks"] = [
            rank | {"device": without_host(rank.get("device", ""))} for rank in reported["ranks"] if isinstance(rank, dict)
        ]
    changed = {f"resumed.{key}": value for key, value in run.accepted_changes.items()}
    sections = {
        "config": plan.get("config") or {},
        "data": {key: run.data.get(key, "") for key in DATA_KEYS} | {"left_out": run.data.get("left_out") or {}} if run.data else {},
        "origin": record.get("origin") or {},
        "source": comparable_source(run.source),
        "image": pick(plan.get("image") or {}, IMAGE_KEYS),
        "layout": {"nodes": len(commands), "world_size": nested(plan, "spec", "device", "world_size")},
        "batch": nested(plan, "spec", "batch") or {},
        "variables": {str(command.get("node_rank")): command.get("environment") or {} for command in commands},
        "environment": reported,
        "result": {key: record.get(key) for key in ("status", "steps")} | {"attempts": len(run.attempts) + 1} | changed,
    }
    return dict(flatten(sections, ""))


def pick(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}


def comparable_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """From schema 2 on, the diff says whether the code was changed. A tree may be dirty for a file of conf/ too, whose values are compared, and
    earlier versions called it so for any file."""
    found: dict[str, Any] = {**({} if source.get("dirty") else CLEAN), **source}
    if found.get("record_schema", 1) != 1:
        found["dirty"] = bool(found.get("diff_sha256") or found.get("diff_lacks"))
    return found


def without_host(title: Any) -> str:
    """The trainer reports a device as `HOST DEVICE`."""
    return str(title).partition(" ")[2]


def flatten(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value). Objects and lists of objects are flattened, any other list is one value."""
    inside: Mapping[str, Any] = {}
    if isinstance(data, dict):
        inside = data
    elif isinstance(data, (list, tuple)) and data and all(isinstance(item, dict) for item in data):
        inside = {str(place): item for place, item in enumerate(data)}
    if not inside and "." in prefix:  # an empty section is not a value
        yield prefix, data
    for key, value in inside.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


# -------------------------------------------------------------------------------------------------------------- comparing


def find_changed_inputs(left: RunFiles, right: RunFiles, allow: tuple[str, ...] = ()) -> tuple[Difference, ...]:
    """The input files that differ, if both records have a hash of each file. The hash of all data is a value of its own."""
    found = []
    for part in ("data", "weights"):
        one, other = (files if isinstance(files := run.inputs.get(part), dict) else {} for run in (left, right))
        for name in dict.fromkeys((*one, *other)) if one and other else ():
            if one.get(name) != other.get(name):
                key = f"inputs.{part}.{name}"
                sides, may_differ = [text_of(files.get(name, ABSENT)) for files in (one, other)], matches(key, patterns_of(allow))
                found.append(Difference(key=key, kind=ComparableKind.INPUT, left=sides[0], right=sides[1], allowed=may_differ))
    return tuple(found[:MAX_FILES])


FOLLOWING = {"config.run.steps": "result.steps"}  # a key that may differ, and the one that then does


def find_differences(left: Mapping[str, Any], right: Mapping[str, Any], allow: tuple[str, ...] = ()) -> tuple[Difference, ...]:
    """Between the values of two runs, in the order of the left ones. `allow`: names of ALLOWANCES, or patterns of keys."""
    allowed = patterns_of(allow)
    sections = {section_of(key) for key in left} & {section_of(key) for key in right}
    found = []
    for key in dict.fromkeys((*left, *right)):
        one, other = left.get(key, ABSENT), right.get(key, ABSENT)
        if (one == other and type(one) is type(other)) or has_keys_instead(key, left, right):
            continue
        kind = kind_of(key)
        known = (key in left and key in right) or (is_open(key) and section_of(key) in sections) or kind is ComparableKind.FREE
        known = known or is_emptied(key, left) or is_emptied(key, right)
        may_differ = matches(key, allowed) or (key == COMMIT and have_same_files(left, right))
        found.append(Difference(key=key, kind=kind, left=text_of(one), right=text_of(other), known=known, allowed=may_differ))
    return (*found, *unknown_diffs(left, right))


def is_open(key: str) -> bool:
    """Whether a key that only one run has is a difference."""
    return matches(key, OPEN) and not (key.startswith(VARIABLES) and was_left_out(key.removeprefix(VARIABLES)))


def patterns_of(allow: tuple[str, ...]) -> tuple[str, ...]:
    patterns = tuple(pattern for word in allow for pattern in ALLOWANCES.get(word, (word,)))
    return (*patterns, *(follows for key, follows in FOLLOWING.items() if matches(key, patterns)))


def have_same_files(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether both images, with the trainer, are made of the same files: then two commits are the same code, as for a rerun."""
    files = [{key: value for key, value in values.items() if key.startswith(FILES)} for values in (left, right)]
    return bool(files[0]) and files[0] == files[1]


def has_keys_instead(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether one run has an empty object here and the other one an object with keys, each of which is compared."""
    pairs = ((left, right), (right, left))
    return any(one.get(key) == {} and any(name.startswith(f"{key}.") for name in other) for one, other in pairs)


def is_emptied(key: str, values: Mapping[str, Any]) -> bool:
    """Whether the run has an empty object where the key would be."""
    parts = key.split(".")
    return any(values.get(".".join(parts[:depth])) == {} for depth in range(2, len(parts)))


def section_of(key: str) -> str:
    """A run that ended early lacks whole sections."""
    return key.partition(".")[0]


def unknown_diffs(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[Difference, ...]:
    """If both trees had changes that the records do not hold completely, the code of the two runs may differ."""
    if not all(
        values.get("source.dirty") and ("source.diff_sha256" not in values or values.get("source.diff_lacks")) for values in (left, right)
    ):
        return ()
    changes = "changes that the record does not hold"
    return (Difference(key="source.diff", kind=ComparableKind.INPUT, left=changes, right=changes, known=False),)


@cache
def kind_of(key: str) -> ComparableKind:
    return next(kind for kind, patterns in RULES if matches(key, patterns))


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
