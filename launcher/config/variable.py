"""Environment variables of the caller: which of them are used, and what to write in place of the others. `variables.yaml` has the table.

Ranks never inherit a variable that could change a result. Of those that other tools read, `plan` and `launch` name each that is set here. The
devices that CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES leaves are used for a run on this machine: as overrides, which are recorded.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.defaults import keys_of
from launcher.config.schema import Config
from launcher.config.synonym import fill, read_row
from launcher.config.written import quote
from launcher.redact import holds_credentials, names_a_secret

FILE = Path(__file__).with_name("variables.yaml")
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
DEVICES, COUNT, SECRETS = "cluster.nodes.0.devices", "cluster.devices_per_node", "cluster.secrets"
NUMBERS = re.compile(r"\d+(,\d+)*")
LONGEST = 40  # characters of a value that are printed


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A row of the table. `write`: an override with {} for the value and {name} for the variable; '' = there is none, for the reason `says`."""

    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    excepted: tuple[str, ...]
    tools: tuple[str, ...]
    write: str
    says: str
    only: tuple[str, ...]
    kept: bool

    def matches(self, name: str) -> bool:
        return name in self.names or (name.startswith(self.prefixes) and name not in self.excepted)


CONDITIONS: dict[str, Callable[[Config], bool]] = {
    "scales_images": lambda config: config.model.image_tokens.rule == "grid",
    "cuts_images": lambda config: config.model.image_tokens.rule in ("tiles", "slices"),
    "several_nodes": lambda config: len(config.cluster.working) > 1,
    "from_hub": lambda config: config.model.source.kind not in ("random", "path"),
    "not_modelscope": lambda config: config.model.source.kind != "modelscope",
    "not_kept": lambda config: config.cluster.runtime != "process",
    "not_used": lambda config: not any(node.devices for node in config.cluster.nodes),
    "on_this_machine": lambda config: config.cluster.is_local,
    "elsewhere": lambda config: not config.cluster.is_local and config.hardware.accelerator != "cpu",
    "cuda": lambda config: config.hardware.accelerator == "cuda",
    "npu": lambda config: config.hardware.accelerator == "npu",
    "wandb": lambda config: "wandb" in config.run.trackers,
    "swanlab": lambda config: "swanlab" in config.run.trackers,
    "mlflow": lambda config: "mlflow" in config.run.trackers,
}


@cache
def load_variables() -> tuple[Variable, ...]:
    import yaml

    given = yaml.load(FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(map(read_variable, given["variables"]))


def read_variable(row: Mapping[str, Any]) -> Variable:
    return Variable(
        names=tuple(row.get("names", ())),
        prefixes=tuple(row.get("prefixes", ())),
        excepted=tuple(row.get("except", ())),
        tools=tuple(row.get("tools", ())),
        write=row.get("write", ""),
        says=row.get("says", ""),
        only=tuple(row.get("only", ())),
        kept=row.get("kept", False),
    )


def answer_variable(name: str, value: str) -> str:
    """The answer to a variable that was written as a key, `MAX_PIXELS=802816`; '' where the table does not have it."""
    row = next((row for row in load_variables() if name == name.upper() and row.matches(name) and not row.kept), None)
    if row is None:
        return ""
    return f"write {write(row, name, value)}" if row.write else row.says


def write(row: Variable, name: str, value: str) -> str:
    is_list = row.write.endswith("[{}]")
    return quote(fill(row.write.replace("{name}", name), read_row({"words": [], "list": is_list}), value))


def use_visible_devices(environ: Mapping[str, str], config: Config, *, most: int, overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides by which a run on this machine takes the devices that the caller's variable leaves it, at most `most`; () where it is not
    set or is no list of numbers, where the run is elsewhere, or where devices are named already."""
    value = environ.get(VISIBLE.get(config.hardware.accelerator, ""), "").replace(" ", "")
    cluster = config.cluster
    if not NUMBERS.fullmatch(value) or not cluster.nodes or not cluster.is_local or any(node.devices for node in cluster.nodes):
        return ()
    counted = COUNT in keys_of(overrides) or cluster.devices_per_node is not None
    numbers = value.split(",")[:most]
    devices = (f"{DEVICES}=[{','.join(numbers)}]",)
    return devices if counted else (*devices, f"{COUNT}={len(numbers)}")


def describe_variables(environ: Mapping[str, str], config: Config, overrides: Sequence[str]) -> tuple[str, ...]:
    """One line for each variable of the caller that another tool would read: used, or ignored and what to write instead. Values of secrets
    are not shown."""
    return tuple(dict.fromkeys((*describe_used(environ, config, overrides), *describe_ignored(environ, config, overrides))))


def describe_devices(environ: Mapping[str, str], overrides: Sequence[str]) -> str:
    """Which overrides a variable of the caller has added, as use_visible_devices does; '' for none."""
    added = [override for override in overrides if override.startswith((f"{DEVICES}=", f"{COUNT}="))]
    devices = next((override.partition("=")[2].strip("[]") for override in added if override.startswith(DEVICES)), "")
    name = next((name for name in VISIBLE.values() if devices and environ.get(name, "").replace(" ", "").startswith(devices)), "")
    return f"{name}={environ[name]} in your environment is used: {' '.join(added)}" if name else ""


def describe_used(environ: Mapping[str, str], config: Config, overrides: Sequence[str]) -> Iterator[str]:
    name = VISIBLE.get(config.hardware.accelerator, "")
    used = next((override for override in overrides if override.startswith(f"{DEVICES}=")), "")
    if used and environ.get(name, "").replace(" ", "").startswith(used.partition("=")[2].strip("[]")):
        yield f"{name}={environ[name]} in your environment is used: {used}"


def describe_ignored(environ: Mapping[str, str], config: Config, overrides: Sequence[str]) -> Iterator[str]:
    typed = {override.partition("=")[0]: override for override in overrides}
    without: dict[str, list[str]] = {}  # what is said -> the variables that have no override
    secrets: list[str] = []
    for name in sorted(environ):
        row = next((row for row in load_variables() if row.matches(name) and not row.kept and holds(row, config)), None)
        if row is None or not (environ[name].strip() or name in VISIBLE.values()):
            continue
        if row.write.startswith(f"{DEVICES}=") and not NUMBERS.fullmatch(environ[name].replace(" ", "")):
            without.setdefault(f"it has no numbers of devices; write {DEVICES}=[0], with those that are to be used", []).append(name)
        elif not row.write:
            without.setdefault(row.says, []).append(name)
        elif row.write.startswith(f"{SECRETS}="):
            secrets += [name] if name not in config.cluster.secrets else []
        elif not is_set(config, row.write.partition("=")[0].replace("{name}", name), environ[name].strip()):
            yield describe_one(row, name, environ[name], typed)
    for says, names in without.items():
        yield f"{', '.join(names)} in your environment {'is' if len(names) == 1 else 'are'} ignored: {says}"
    if secrets:
        passed = ",".join((*config.cluster.secrets, *secrets))
        yield f"{', '.join(secrets)} in your environment {'is' if len(secrets) == 1 else 'are'} not passed on: write {SECRETS}=[{passed}]"


def describe_one(row: Variable, name: str, value: str, typed: Mapping[str, str]) -> str:
    """What to write in place of a variable. `typed`: key -> override. Secrets are not shown."""
    secret = names_a_secret(name) or holds_credentials(value)
    override = write(row, name, "" if secret else value)
    held = typed.get(override.strip("'").partition("=")[0])
    value = value.strip()
    value = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
    shown = name if secret else f"{name}={value}"
    return f"{shown} in your environment is ignored: {f'{held} holds' if held else f'write {override}'}"


def is_set(config: Config, key: str, text: str) -> bool:
    """Whether the config has this value already."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    by_hardware = config.hardware.environment.get(key.removeprefix("cluster.environment."))
    return text in (str(value), str(by_hardware))


def holds(row: Variable, config: Config) -> bool:
    return all(CONDITIONS[condition](config) for condition in row.only)
