"""`omnilaunch model ACTION`: download the weights of a model, check a folder of weights, and list the models."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.plan import PROJECT
from launcher.errors import ConfigRefused, suggest
from launcher.plan.text import command_line
from launcher.redact import printable
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.weights.fetch import FetchProgress
    from launcher.weights.folder import FolderReport
    from launcher.weights.manifest import HubKind

HUBS = ("hub", "modelscope")
REDRAW_S = 0.2
STEP = 10  # percent, between two lines where the output is no terminal
CHECKED_STAGES = ("infer", "lora", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, (action, text) in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "fetch":
            sub.add_argument(
                "model", metavar="MODEL", help="a model of `omnilaunch model ls`, or the id of a repository: ORGANISATION/NAME"
            )
            sub.add_argument("--to", default="", metavar="FOLDER", help="where to write; below OMNILAUNCH_MODELS or ~/.cache when omitted")
            sub.add_argument("--from", dest="hub", default="hub", metavar="HUB", help="hub (Hugging Face, the default) or modelscope")
            sub.add_argument("--revision", default="", help="a branch, tag or commit; the newest commit when omitted")
            sub.add_argument(
                "--endpoint", default="", metavar="URL", help="address of a mirror; HF_ENDPOINT or MODELSCOPE_DOMAIN when omitted"
            )
        if name == "check":
            sub.add_argument("folder", metavar="FOLDER", help="a folder with config.json and weights, or a checkpoint of a run")
            sub.add_argument("--hashes", action="store_true", help="read every file and compare its hash with the manifest of the fetch")
            sub.add_argument("--json", action="store_true", help="print the report as JSON")
        if name == "ls":
            sub.add_argument("--json", action="store_true", help="print the list as JSON")
        sub.set_defaults(action=action, parser=sub)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.action(arguments))


# ------------------------------------------------------------------------------------------------------------------ fetch


def fetch_model(arguments: argparse.Namespace) -> int:
    from launcher.weights.fetch import fetch, open_client, refuse_offline
    from launcher.weights.source import fetched_folder

    if arguments.hub not in HUBS:
        raise ConfigRefused(f"--from {arguments.hub}: no such hub; {suggest(arguments.hub, HUBS)}")
    hub: HubKind = arguments.hub
    own, name = find_repository(arguments.model, hub)
    refuse_offline(hub, os.environ)
    client = open_client(hub, os.environ, arguments.endpoint)
    folder = Path(arguments.to).absolute() if arguments.to else fetched_folder(hub, name, os.environ)
    ended = False
    meter = Meter(say=arguments.say)
    try:
        manifest = fetch(client, name, folder, arguments.revision, meter.progress, lambda: datetime.now(UTC))
        ended = True
    finally:
        meter.close()
        if not ended and (folder / ".fetch").is_dir():
            arguments.say(f"what arrived is kept in {folder}: the same command continues")
    size = sum(file.size for file in manifest.files)
    arguments.say(f"{folder}: {len(manifest.files)} files, {describe_bytes(size)}, every hash is right; {name} at {manifest.revision}")
    return describe_next(arguments.say, own, folder, hub, cached=not arguments.to)


def describe_next(say: Callable[[str], None], own: str, folder: Path, hub: "HubKind", *, cached: bool) -> int:
    """The next command, and the exit code. A folder that is whole on the hub may still lack what the trainer needs."""
    from launcher.weights.endpoint import TITLE
    from launcher.weights.folder import check_folder
    from launcher.weights.identity import load_models

    report = check_folder(folder, load_models(PROJECT / "conf"))
    for problem in report.problems:
        say(f"problem: {problem}")
    model = report.identity.model if report.identity else ""
    if report.problems:
        say(f"the folder holds what {TITLE[hub]} lists, but it cannot be used as it is. See: {command_line('model', 'check', str(folder))}")
    elif model:
        where = "model.source=modelscope" if hub == "modelscope" and cached else f"model.source.path={folder}"
        say(f"next: {command_line('plan', f'model={model}', where)}")
    else:
        say(f"this is none of our models{f' (asked for {own})' if own else ''}. See: {command_line('model', 'check', str(folder))}")
    return int(Exit.USAGE if report.problems else Exit.OK)


def find_repository(word: str, hub: "HubKind") -> tuple[str, str]:
    """(name in conf/model or '', id of the repository). Raises ConfigRefused."""
    from launcher.weights.fetch import refuse_id
    from launcher.weights.identity import load_models

    models = load_models(PROJECT / "conf")
    key = "id" if hub == "hub" else "modelscope"
    if word in models:
        source = models[word]["source"]
        if source["kind"] == "random":
            raise ConfigRefused(f"{word} starts from random weights: there is nothing to download. omnilaunch plan model={word}")
        if not source.get(key):
            raise ConfigRefused(
                f"no repository of {word} on ModelScope is known to this project. Give its id: ORGANISATION/NAME, or --from hub"
            )
        return word, source[key]
    official = [
        source[key] for source in (model["source"] for model in models.values()) if source.get(key, "").lower().endswith(f"/{word.lower()}")
    ]
    word = official[0] if official else word
    if "/" not in word:
        published = [name for name, model in models.items() if model["source"]["kind"] != "random"]
        raise ConfigRefused(f"unknown model {word!r}; {suggest(word, published)}; or the id of a repository: ORGANISATION/NAME")
    refuse_id(word)
    same = (
        name
        for name, model in models.items()
        if word.lower() in (str(model["source"].get(each, "")).lower() for each in ("id", "modelscope"))
    )
    return next(same, ""), word


class Meter:
    """FetchProgress: one line that is drawn again on a terminal; elsewhere a line for each tenth of a large file."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.terminal = say, sys.stderr.isatty()
        self.name, self.size, self.have, self.shown, self.drawn_s, self.began_s, self.arrived = "", 0, 0, 0, 0.0, 0.0, 0

    @property
    def progress(self) -> "FetchProgress":
        from launcher.weights.fetch import FetchProgress

        return FetchProgress(say=self.line, begin=self.begin, report=self.report)

    def line(self, text: str) -> None:
        self.close()
        self.say(text)

    def begin(self, name: str, size: int, have: int) -> None:
        self.close()
        self.name, self.size, self.have, self.shown, self.began_s, self.arrived = name, size, have, 0, time.monotonic(), 0
        if self.terminal:
            self.draw()
        else:
            self.say(f"  {name}, {size / 1e6:,.1f} MB{f', from {have / 1e6:,.1f} MB' if have else ''}")

    def report(self, count: int) -> None:
        self.have, self.arrived = self.have + count, self.arrived + max(0, count)
        now_s = time.monotonic()
        if self.terminal and now_s - self.drawn_s > REDRAW_S:
            self.drawn_s = now_s
            self.draw()
        elif not self.terminal and self.size > 10**9 and (done := 100 * self.have // self.size) >= self.shown + STEP:
            self.shown = done - done % STEP
            self.say(f"  {self.name}, {self.shown} %")

    def draw(self) -> None:
        speed = self.arrived / 1e6 / max(time.monotonic() - self.began_s, 1e-3)
        text = f"  {self.name[-40:]}  {self.have / 1e6:,.0f} of {self.size / 1e6:,.0f} MB, {speed:,.0f} MB/s"
        print(f"\r\033[K{printable(text)[:79]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal and self.name:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.say(
                f"  {self.name}, {self.size / 1e6:,.1f} MB"
                if self.have >= self.size
                else f"  {self.name}: {self.have:,} of {self.size:,} bytes"
            )
        self.name = ""


# ------------------------------------------------------------------------------------------------------------------ check


def check_model(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from launcher.weights.folder import check_folder
    from launcher.weights.identity import load_models

    report = check_folder(Path(arguments.folder).absolute(), load_models(PROJECT / "conf"), hashes=arguments.hashes)
    arguments.say(
        json.dumps(asdict(report), indent=2, ensure_ascii=False) if arguments.json else describe_folder(report, hashes=arguments.hashes)
    )
    return int(Exit.USAGE if report.problems else Exit.OK)


def describe_folder(report: "FolderReport", *, hashes: bool) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in report.dtypes.items())
    lines = [
        ("folder", f"{report.folder}: {report.files} files, {describe_bytes(report.size_bytes)}"),
        ("model", describe_identity(report)),
        (
            "weights",
            f"{report.tensors:,} tensors, {report.parameters:,} elements ({dtypes})" if report.tensors else "no tensor could be read",
        ),
        *((("source", report.source),) if report.source else ()),
        *(("note", note) for note in report.notes),
        *(("problem", problem) for problem in report.problems),
    ]
    if not report.problems:
        lines.append(
            ("whole", "every hash is that of the manifest" if hashes else "by names, sizes and headers; --hashes reads the contents, too")
        )
        lines += describe_use(report)
    return "\n".join(f"{name:9} {text}" for name, text in lines)


def describe_identity(report: "FolderReport") -> str:
    found = report.identity
    if found is None:
        return "not known"
    kind = "an adapter of " if report.adapter else ""
    if found.model:
        return f"{kind}{found.model} (family {found.family})"
    if not found.family:
        return f"{kind}none of ours: the trainer has no family for model_type {found.model_type or '(none)'}"
    listed = "".join(f"\n{'':10}{line}" for line in found.differences)
    return f"{kind}none of ours: family {found.family}; nearest: {found.nearest}, which differs:{listed}"


def describe_use(report: "FolderReport") -> list[tuple[str, str]]:
    """What the folder can be used for: the hardware on which a plan of each stage fits, and the next command."""
    found = report.identity
    if found is None or not found.model:
        return []
    if report.adapter:
        return [("next", command_line("plan", f"model={found.model}", "stage=merge", f"stage.checkpoint={report.folder}"))]
    fits = [
        (f"{stage} on", ", ".join(hardware_for(found.model, report.folder, stage)) or "none of conf/hardware") for stage in CHECKED_STAGES
    ]
    key = "stage.checkpoint" if report.ours else "model.source.path"
    return [*fits, ("next", command_line("plan", f"model={found.model}", f"{key}={report.folder}"))]


def hardware_for(model: str, folder: str, stage: str) -> list[str]:
    """The hardware of conf/ on which one node can carry out the stage by its plan."""
    from launcher.check.rules import check
    from launcher.config.compose import compose, options
    from launcher.image.stack import load_stacks

    conf, stacks = PROJECT / "conf", load_stacks(PROJECT / "images")
    question = ("stage.inference.prompt=what",) if stage == "infer" else ()

    def fits(hardware: str) -> bool:
        try:
            config = compose((f"hardware={hardware}", f"model={model}", f"stage={stage}", f"model.source.path={folder}", *question), conf)
        except ConfigRefused:
            return False
        return check(config, stacks).ok

    return [hardware for hardware in options(conf)["hardware"] if fits(hardware)]


# --------------------------------------------------------------------------------------------------------------------- ls


def list_models(arguments: argparse.Namespace) -> int:
    import json

    from launcher.weights.identity import load_models
    from launcher.weights.source import find_cached

    rows: list[dict[str, Any]] = []
    for name, model in load_models(PROJECT / "conf").items():
        source = model["source"]
        ids = {hub: str(source.get(key, "")) for hub, key in (("hub", "id"), ("modelscope", "modelscope"))}
        found = {hub: find_cached(hub, ids[hub], os.environ) for hub in ids if ids[hub]}  # type: ignore[arg-type]  # the two names of HubKind
        folders = [folder for folder in found.values() if folder]
        rows.append(
            {"name": name, "parameters": model["parameters"]["total"], "licence": model["licence"]["name"], **ids, "folders": folders}
        )
    arguments.say(json.dumps(rows, indent=2, ensure_ascii=False) if arguments.json else describe_models(rows))
    return int(Exit.OK)


def describe_models(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'name':20} {'size':>6}  {'licence':27} repository"]
    for row in rows:
        same = row["hub"].lower() == row["modelscope"].lower()
        other = "" if same or not row["modelscope"] else f" (ModelScope: {row['modelscope']})"
        where = f"{row['hub']}{other}" if row["hub"] else "random weights"
        lines.append(f"{row['name']:20} {describe_number(row['parameters']):>6}  {row['licence'][:27]:27} {where}")
        lines += [f"{'':20} here: {folder}" for folder in row["folders"]]
    return "\n".join((*lines, "", "Download one: omnilaunch model fetch NAME; from ModelScope: --from modelscope"))


def describe_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"


def describe_number(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 10**8 else f"{count / 1e6:.1f} M"


ACTIONS = {
    "fetch": (fetch_model, "download the weights of a model, pinned to a commit and checked by hashes; continues where it was stopped"),
    "check": (check_model, "check that a folder of weights is whole, and say which model it holds"),
    "ls": (list_models, "list the models with size, licence and repositories, and those that are on this machine"),
}
