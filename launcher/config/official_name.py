"""The names that others give to the models and devices of conf/: the repository on the hub, the title, the chips. They are read from the
files, so that a new file brings its own."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.config.synonym import Synonym, Typed, write_answer
from launcher.errors import plain

# The end of a published name. `-HF` is a layout of files. Any other tells weights apart, and may be left out only where a model has just these.
LAYOUT = re.compile(r"[-_ ]+hf$", re.IGNORECASE)
TAIL = re.compile(
    r"[-_ ]+(instruct|chat|it|base|sft|dpo|mpo|rl|pretrained|preview|thinking|awq|gptq|gguf|fp8|nf4|w8a8|w4a16|int[48]|(unsloth[-_])?bnb([-_][48]bit)?)$",
    re.IGNORECASE,
)
# What nvidia-smi, npu-smi and shops write around the name of a chip.
MAKERS = {"昇腾": "ascend", "华为": "", "英伟达": "", "显卡": "", "加速卡": "", "卡": ""}
MAKER = re.compile(r"^(nvidia|tesla|geforce|quadro|huawei|ascend|atlas|gpu|npu)[-_ ]*(?=[a-z]*[-_ ]*\d|[a-z]+ )", re.IGNORECASE)
FORM = re.compile(r"[-_ ]+(sxm\d?|pcie|nvl|oam|hgx|hbm\d?e?|\d+ ?gi?b?|x\d|laptop gpu|gpu|npu|card)$", re.IGNORECASE)
VERSION = re.compile(r"(?<=[-_ ])v(?=\d)", re.IGNORECASE)  # llava-v1.5
IN_BRACKETS = re.compile(r"\s*\([^)]*\)")
# A number of cards beside the name of one: `8xH200`, `8卡 H200`; `3090*8`, `H200:8`, `h200-8`, `h200 8卡`.
COUNT_FIRST = re.compile(r"(?P<count>\d{1,4})(?P<between>\s*[x*×]\s*|\s*[卡张块个]\s*|\s+)(?P<chip>\S.*)", re.IGNORECASE)
COUNT_LAST = re.compile(r"(?P<chip>\S.*?)(?P<between>\s*[x*×:-]\s*|\s+)(?P<count>\d{1,4})(?P<unit>\s*[卡张块个])?", re.IGNORECASE)
MOST_CARDS, FEW_CARDS = 1024, 16  # of a number beside a chip; of one that a blank or '-' divides, which may be a part of its name
LIKE_A_CHIP = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).*|\d{4}")
HARDWARE, COUNT = "hardware", "cluster.devices_per_node"
OWN_FILE = "copy conf/cluster/example.yaml to conf/cluster/NAME.yaml, fill it in, and write cluster=NAME"
LEAST = 4  # letters of the beginning of a name
MOST = 4  # names that a beginning may stand for


def find_official(axis: str, text: str, conf: Path | ConfFolder) -> tuple[str, ...]:
    """The values of `axis` that `text` names: one for a whole name, several for the beginning of some, () for none or too many."""
    text = text.strip().strip("'\"")
    known = {name: set(list_names(name, data)) for name, data in read_files(axis, conf)}
    if whole := [name for name, names in known.items() if text.lower() in {each.lower() for each in names if "/" in each}]:
        return tuple(whole)
    last = text.rstrip("/").rpartition("/")[2]
    word, tails = normalize(last), find_tails(last)
    known = {name: names for name, names in known.items() if tails <= {tail for each in names for tail in find_tails(each)}}
    same = [name for name, names in known.items() if word in map(normalize, names)]
    begun = [name for name, names in known.items() if len(word) >= LEAST and any(normalize(each).startswith(word) for each in names)]
    found = dict.fromkeys((*same, *begun))  # MiniCPM-V is a whole name, and the beginning of two others
    return tuple(found) if len(found) <= MOST else tuple(same)


def find_relative(text: str, conf: Path | ConfFolder) -> tuple[str, str]:
    """(model, its repository) whose name differs from `text` in its end alone, so that it has other weights; ('', '') for none."""
    last = text.strip().strip("'\"").rstrip("/").rpartition("/")[2]
    if find_tails(last):
        for name, data in read_files("model", conf):
            source = data.get("source")
            if isinstance(source, dict) and source.get("id") and normalize(last) in map(normalize, list_names(name, data)):
                return name, str(source["id"])
    return "", ""


def read_files(axis: str, conf: Path | ConfFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    conf = as_conf_folder(conf)
    for file in (conf.find(axis, name) for name in conf.list_groups().get(axis, ())):
        if data := read_yaml(file):
            yield file.stem, data


def read_yaml(file: Path) -> dict[str, Any]:
    """{} for a file that is no mapping or cannot be read: composing reports it."""
    import yaml

    try:
        data = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def list_names(name: str, data: dict[str, Any]) -> Iterator[str]:
    source = data.get("source")
    given = [name, data.get("title"), *(data.get("chips") or ())]
    given += [value for key, value in source.items() if key not in ("kind", "revision", "path")] if isinstance(source, dict) else []
    for text in given:
        if isinstance(text, str) and text:
            yield text
            if "/" in text:
                yield text.rpartition("/")[2]
    if isinstance(data.get("title"), str):
        yield IN_BRACKETS.sub("", data["title"])
        yield from re.findall(r"\(([^)]*)\)", data["title"])


def find_tails(name: str) -> set[str]:
    """What tells the weights of a published name apart from others of the same model: {'instruct'}, {'instruct', 'awq'}, or nothing."""
    tails = set()
    while found := TAIL.search(name := LAYOUT.sub("", name)):
        tails.add(found[1].lower())
        name = name[: found.start()]
    return tails


def normalize(name: str) -> str:
    """Letters and digits of a published name without its tails."""
    while TAIL.search(name := LAYOUT.sub("", name)):
        name = TAIL.sub("", name)
    return plain(VERSION.sub("", name))


def split_cards(text: str) -> Iterator[tuple[str, int, str]]:
    """(chip, number of cards, what is between them) of `8xH200` and the like, in each way that it can be read."""
    text = text.strip().strip("'\"")
    for pattern in (COUNT_FIRST, COUNT_LAST):
        if found := pattern.fullmatch(text):
            count, between = int(found["count"]), found["between"].strip()
            most = FEW_CARDS if between in ("", "-") and not found.groupdict().get("unit") else MOST_CARDS
            if 0 <= count <= most:
                yield found["chip"], count, between


def explain_cards(text: str, typed: Typed, explain: Callable[[str], str], conf: ConfFolder, *, alone: bool) -> str:
    """What to write for a number of cards of a kind, such as `8xH200`; '' for anything else. `explain`: what is written for one card.
    `alone`: as the value of hardware, where `h200:1` may be the number of a device."""
    readings = []
    for chip, count, between in split_cards(text):
        if not count and not (alone and between == ":"):
            continue
        explained = explain(chip)
        readings.append((not explained.startswith(f"write {HARDWARE}="), chip, count, between, explained))
    for unknown, chip, count, between, explained in sorted(readings):
        if alone and between == ":" and chip.lower() in ("cuda", "npu"):
            return ""  # as torch names one device
        if not unknown:
            return write_cards(count, explained, typed, conf, may_be_one=alone and between == ":")
        if between not in ("", "-") and LIKE_A_CHIP.fullmatch(chip) and explained.startswith(("no file", "not available")):
            return f"the number of devices is {COUNT}={count}; {chip}: {explained}"
    return ""


def write_cards(count: int, explained: str, typed: Typed, conf: ConfFolder, *, may_be_one: bool) -> str:
    """`explained`: what is written for one card. `may_be_one`: whether the number may be the id of a device."""
    head, _, says = explained.removeprefix("write ").partition("; ")
    names = re.findall(rf"{HARDWARE}=(\w+)", head)
    if f"{COUNT}=" in head:  # 2x8xH200
        return f"{explained}; {count} nodes are a file: {OWN_FILE}"
    files = [read_yaml(conf.find(HARDWARE, name)) for name in names]
    held = max((int(file.get("devices_per_node") or 0) for file in files), default=0)
    if may_be_one and count < held:
        both = f"; cluster.nodes.0.devices=[{count}] chooses the device {count}"
        return f"{explained}{both}{f', {COUNT}={count} takes {count} devices' if count else ''}"
    if len(names) > 1:
        return f"{explained}; {COUNT}={count} is the number of devices of a node"
    more = f"{COUNT}={count}"
    if count > held and files[0].get("accelerator") != "cpu":
        if not any(str(note).startswith("devices_per_node") for note in files[0].get("notes") or ()):
            return f"{write_answer((head,), Synonym(words=()), typed)}; {count} devices are {-(-count // held)} nodes of {held}: {OWN_FILE}"
        more = f"{more} {HARDWARE}.devices_per_node={count}"  # that of the file is assumed
    return "; ".join(part for part in (write_answer((f"{head} {more}",), Synonym(words=()), typed), says) if part)


def shorten_chip(text: str) -> str:
    """`a100` for `NVIDIA A100-SXM4-80GB`, `910b3` for a Chinese name of the Ascend 910B3: without maker, form factor and memory."""
    name = text.strip().strip("'\"").lower()
    for word, instead in MAKERS.items():
        name = name.replace(word, instead)
    while FORM.search(name):
        name = FORM.sub("", name)
    while MAKER.match(name):
        name = MAKER.sub("", name, count=1)
    return name.strip(" -_")
