"""The facts of a run by key, and which of them must be the same in a run that repeats it. The table is the promise."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from launcher.record.reader import nested
from launcher.record.run_files import RunFiles


class FactKind(Enum):
    """experiment: runs that differ in it are of two things, and are not compared unless asked to. input, environment: must match. free: may
    differ."""

    EXPERIMENT = "experiment"
    INPUT = "input"
    ENVIRONMENT = "environment"
    FREE = "free"


# The first pattern that fits a key counts. What no pattern knows is of the environment: it must match, so that a new fact is never passed over.
RULES: tuple[tuple[FactKind, tuple[str, ...]], ...] = (
    (
        FactKind.FREE,
        (
            *("config.*.title", "config.*.notes", "config.*.notes.*", "config.*.pending", "config.model.licence.*", "config.model.ready"),
            *("config.hardware.peaks", "config.hardware.peaks.*", "config.hardware.driver.*", "config.*.parameters.source"),
            *("config.model.source.path", "config.stage.checkpoint", "config.stage.needs"),
            *("config.data.train", "config.data.evaluation", "config.data.images", "config.data.workers"),
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
            *("source.untracked",),
        ),
    ),
    (
        FactKind.EXPERIMENT,
        (
            *("config.model.name", "config.model.family", "config.model.architecture.*"),
            *("config.stage.name", "config.stage.kind", "config.data.name", "config.data.builtin"),
        ),
    ),
    (
        FactKind.INPUT,
        (
            *("data.*", "source.*", "origin.*", "result.*", "image.files.*", "image.lock*"),
            *("config.model.*", "config.stage.*", "config.precision.*", "config.strategy.*", "config.data.*", "config.run.*"),
        ),
    ),
    (FactKind.ENVIRONMENT, ("*",)),
)
# Sets of keys by name, for --allow: what differs by design when a run is made again there.
ALLOWANCES: dict[str, tuple[str, ...]] = {
    "hardware": (
        *("config.hardware.*", "config.cluster.*", "environment.*", "variables.*", "image.*", "batch.*", "layout.*"),
        *("config.strategy.*",),
    ),
    "image": ("config.cluster.runtime", "environment.*", "variables.*", "image.*"),
    "data": ("data.*", "inputs.data.*"),
    "code": ("source.*", "image.files.trainer/*", "image.fingerprint"),
}
# Of these a key that only one side has is a difference; of all others it was not recorded there, and nothing is known.
OPEN = (
    "variables.*",
    "environment.environment.*",
    "environment.packages.*",
    "environment.kernels.*",
    "image.files.*",
    "config.*.environment.*",
)
TRAINER_FACTS = (
    *("python", "platform", "packages", "accelerator", "devices", "driver", "world_size", "threads", "environment"),
    *("deepspeed", "kernels", "parameters", "trainable", "toolkit", "settings", "determinism", "ranks"),
)
CLEAN = {"diff_sha256": "", "diff_lacks": ""}  # of a tree without changes, where a record of the first schema does not say so
COMMIT, FILES = "source.commit", "image.files."
ABSENT = "(none)"
MOST_FILES = 20  # that are named of the inputs that differ


@dataclass(frozen=True, kw_only=True)
class FactDifference:
    """One fact that two runs do not have in common, each side as text. `known` false: one of the two did not record it."""

    key: str
    kind: FactKind
    left: str
    right: str
    known: bool = True
    allowed: bool = False

    @property
    def weighs(self) -> bool:
        """Whether the runs are different for it."""
        return self.kind is not FactKind.FREE and self.known and not self.allowed


def collect_facts(run: RunFiles) -> dict[str, Any]:
    """Key -> value, the inputs first. Hosts, folders and times are no facts."""
    plan, record, environment = run.plan, run.record, run.environment
    commands = [command for command in plan.get("commands") or () if isinstance(command, dict)]
    image = {
        key: value
        for key, value in (plan.get("image") or {}).items()
        if key in ("stack", "architecture", "base", "files", "lock", "fingerprint")
    }
    trainer = {key: environment[key] for key in TRAINER_FACTS if key in environment}
    if isinstance(trainer.get("devices"), (list, tuple)):
        trainer["devices"] = [without_host(title) for title in trainer["devices"]]
    if isinstance(trainer.get("ranks"), (list, tuple)):
        trainer["ranks"] = [rank | {"device": without_host(rank.get("device", ""))} for rank in trainer["ranks"] if isinstance(rank, dict)]
    sections = {
        "config": plan.get("config") or {},
        "data": {key: run.data.get(key, "") for key in ("sha256", "train_rows", "evaluation_rows", "images")} if run.data else {},
        "origin": record.get("origin") or {},
        "source": source_facts(run.source),
        "image": image,
        "layout": {"nodes": len(commands), "world_size": nested(plan, "spec", "device", "world_size")},
        "batch": nested(plan, "spec", "batch") or {},
        "variables": {str(command.get("node_rank")): command.get("environment") or {} for command in commands},
        "environment": trainer,
        "result": {key: record.get(key) for key in ("status", "steps")} | {"attempts": len(run.attempts) + 1},
    }
    return dict(flatten(sections, ""))


def source_facts(source: Mapping[str, Any]) -> dict[str, Any]:
    """From schema 2 on, the diff says whether the code was changed. Changes elsewhere, which git calls dirty too, do not change the code."""
    facts: dict[str, Any] = {**({} if source.get("dirty") else CLEAN), **source}
    if facts.get("record_schema", 1) != 1:
        facts["dirty"] = bool(facts.get("diff_sha256") or facts.get("diff_lacks"))
    return facts


def without_host(title: Any) -> str:
    """Of a device, as the trainer names it: the host, a space, the rest."""
    return str(title).partition(" ")[2]


def find_changed_inputs(left: RunFiles, right: RunFiles, allow: tuple[str, ...] = ()) -> tuple[FactDifference, ...]:
    """The files that are others, where both records have the hash of each; the hash of all is a fact of its own."""
    found = []
    for part in ("data", "weights"):
        one, other = (part_of if isinstance(part_of := run.inputs.get(part), dict) else {} for run in (left, right))
        names = (name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)) if one and other else ()
        for name in names:
            sides = (text_of(one.get(name, ABSENT)), text_of(other.get(name, ABSENT)))
            key = f"inputs.{part}.{name}"
            found.append(FactDifference(key=key, kind=FactKind.INPUT, left=sides[0], right=sides[1], allowed=fits(key, patterns_of(allow))))
    return tuple(found[:MOST_FILES])


def flatten(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key. A list of objects is gone into, any other one is a leaf."""
    inside: Mapping[str, Any] = {}
    if isinstance(data, dict):
        inside = data
    elif isinstance(data, (list, tuple)) and data and all(isinstance(item, dict) for item in data):
        inside = {str(place): item for place, item in enumerate(data)}
    if not inside and "." in prefix:  # a section without anything in it is no fact
        yield prefix, data
    for key, value in inside.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def find_differences(left: Mapping[str, Any], right: Mapping[str, Any], allow: tuple[str, ...] = ()) -> tuple[FactDifference, ...]:
    """Of two runs' facts, in the order of the left ones. `allow`: names of ALLOWANCES, or patterns of keys."""
    allowed = patterns_of(allow)
    sections = {section_of(key) for key in left} & {section_of(key) for key in right}
    found = []
    for key in dict.fromkeys((*left, *right)):
        one, other = left.get(key, ABSENT), right.get(key, ABSENT)
        if (one == other and type(one) is type(other)) or has_keys_instead(key, left, right):
            continue
        kind = kind_of(key)
        known = (key in left and key in right) or (fits(key, OPEN) and section_of(key) in sections) or kind is FactKind.FREE
        known = known or is_emptied(key, left) or is_emptied(key, right)
        free = fits(key, allowed) or (key == COMMIT and have_same_files(left, right))
        found.append(FactDifference(key=key, kind=kind, left=text_of(one), right=text_of(other), known=known, allowed=free))
    return (*found, *unknown_diffs(left, right))


def patterns_of(allow: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern for word in allow for pattern in ALLOWANCES.get(word, (word,)))


def have_same_files(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether the images, trainer and all, are of the same files: then two commits are one code, as a rerun sees it too."""
    files = [{key: value for key, value in facts.items() if key.startswith(FILES)} for facts in (left, right)]
    return bool(files[0]) and files[0] == files[1]


def has_keys_instead(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether one side has an empty object there and the other one that is not, whose keys are told one by one."""
    pairs = ((left, right), (right, left))
    return any(one.get(key) == {} and any(name.startswith(f"{key}.") for name in other) for one, other in pairs)


def is_emptied(key: str, facts: Mapping[str, Any]) -> bool:
    """Whether these facts say that there is nothing where the key is."""
    parts = key.split(".")
    return any(facts.get(".".join(parts[:depth])) == {} for depth in range(2, len(parts)))


def section_of(key: str) -> str:
    """A run that ended early has no facts of some sections at all."""
    return key.partition(".")[0]


def unknown_diffs(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[FactDifference, ...]:
    """Two dirty trees whose changes were not recorded, or not whole, may be two programs."""
    if not all(
        facts.get("source.dirty") and ("source.diff_sha256" not in facts or facts.get("source.diff_lacks")) for facts in (left, right)
    ):
        return ()
    changes = "changes that the record does not hold"
    return (FactDifference(key="source.diff", kind=FactKind.INPUT, left=changes, right=changes, known=False),)


@cache
def kind_of(key: str) -> FactKind:
    return next(kind for kind, patterns in RULES if fits(key, patterns))


def fits(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
