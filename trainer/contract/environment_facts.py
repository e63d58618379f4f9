"""The environment of a run as flat facts, key -> text, so that two environments can be compared. Standard library only.

A key is a kind, followed by a name where there are several of the kind: `python`, `driver`, `package torch`, `variable OMP_NUM_THREADS`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trainer.contract.rows import EnvReport

# Variables that differ in every run, or that select one of several equal devices.
VARYING = ("MASTER_", "TORCHELASTIC_", "OMNILAUNCH_", "ASCEND_PROCESS_LOG_PATH", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
VARYING_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")
VARIABLE = "variable"
# Earlier versions took a variable with one of these in its name for a secret, and did not record it: TOKENIZERS_PARALLELISM, NCCL_IB_PKEY.
ONCE_LEFT_OUT = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a rerun must find again, from the record of run `run_id`; empty fields are not checked. `weights`: as in Inputs. `facts`: as made
    by `facts_of`; those whose key is in `free` may differ, because the user allowed it."""

    run_id: str
    data_sha256: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    free: tuple[str, ...] = ()


def facts_of(report: EnvReport) -> dict[str, str]:
    """The facts that may change a run's numbers or its speed. Values that could not be read are left out."""
    facts = {
        "python": report.python,
        "accelerator": report.accelerator,
        "driver": report.driver,
        "world_size": str(report.world_size),
        "threads": str(report.threads),
        "firmware": ", ".join(dict.fromkeys(rank.firmware for rank in report.ranks if rank.firmware)),
    }
    for rank, title in enumerate(report.devices):
        facts[f"device {rank}"] = title.partition(": ")[2] or title
    for rank, found in enumerate(report.ranks):
        facts |= {f"driver of rank {rank}": found.driver, f"threads of rank {rank}": str(found.threads)} if rank else {}
    named = {"package": report.packages, "toolkit": report.toolkit, "setting": report.settings, "determinism": report.determinism}
    for kind, values in named.items():
        facts |= {f"{kind} {name}": value for name, value in values.items()}
    facts |= {f"{VARIABLE} {name}": value for name, value in report.environment.items() if not differs_by_run(name)}
    return {key: value for key, value in facts.items() if value}


def differs_by_run(variable: str) -> bool:
    return variable in VARYING_RANKS or variable.startswith(VARYING)


def was_left_out(variable: str) -> bool:
    """Whether a record that lacks the variable may be of a version that never recorded it."""
    return any(word in variable.upper() for word in ONCE_LEFT_OUT)


def kind_of(key: str) -> str:
    return key.partition(" ")[0]


def changed_facts(expected: Mapping[str, str], found: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Key -> (expected, found) where they differ; '' for a missing one. Facts that are only in `found` count if they are variables, and only
    if variables are expected at all: a newer version records more facts than an older one."""
    added = (
        [key for key in found if kind_of(key) == VARIABLE and key not in expected and not was_left_out(key.partition(" ")[2])]
        if any(kind_of(key) == VARIABLE for key in expected)
        else []
    )
    keys: Iterable[str] = (*expected, *added)
    return {key: (expected.get(key, ""), found.get(key, "")) for key in keys if expected.get(key, "") != found.get(key, "")}


def describe_change(key: str, change: tuple[str, str]) -> str:
    expected, found = (repr(value) if value else "not there" for value in change)
    return f"{key}: {expected} in the record, {found} here"
