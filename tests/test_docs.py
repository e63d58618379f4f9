"""What the documents name exists: files, functions, links, verbs."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from launcher.cli import VERBS
from tests.architecture import LAUNCHER_ORDER, TRAINER_ORDER

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md")
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FOLDERS = ("conf", "docs", "images", "launcher", "tests", "trainer")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
PLACE = re.compile(r"([\w./-]+\.(?:py|yaml)): ([\w.]+)")
PATH = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/[\w./-]*\w|[\w.-]+\.md)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"(?<![A-Z])(NAME|FAMILY|FILE)(?![A-Z])")  # conf/hardware/NAME.yaml
OF_THE_USER = {"conf/cluster/lab.yaml"}  # a file that a reader writes
LINK = re.compile(r"\]\(([^)\s]+)\)")
VERB = re.compile(r"\bomnilaunch ([a-z][a-z-]*)(?![\w:])")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def names_in(path: Path) -> frozenset[str]:
    """The functions, classes, methods (Class.method), fields and constants of a module."""
    return frozenset(found for node in ast.parse(path.read_text(encoding="utf-8")).body for found in names_of(node))


def names_of(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    if isinstance(node, ast.ClassDef):
        yield from (f"{node.name}.{name}" for inner in node.body for name in names_of(inner))
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def spans(text: str) -> list[str]:
    """The texts in backticks, outside blocks of code; a span may continue on the next line."""
    paragraphs = re.split(r"\n\s*\n", FENCE.sub("", text))
    return [code for paragraph in paragraphs for _, code in CODE.findall(re.sub(r"\n\s*", " ", paragraph))]


def wrong_places(text: str) -> list[str]:
    """What `text` names in backticks and does not exist: paths, and functions written as `file: function`."""
    wrong = []
    for code in spans(text):
        if place := PLACE.fullmatch(code):
            path = ROOT / place[1]
            if not path.is_file() or place[2] not in names_in(path):
                wrong.append(code)
        elif PATH.fullmatch(code) and not PLACEHOLDER.search(code) and not (ROOT / code).exists():
            wrong.append(code)
    return wrong


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors_of(path: Path) -> frozenset[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return frozenset(map(slug, re.findall(r"^#+ (.+)$", text, re.MULTILINE)))


def broken_links(text: str, document: Path) -> list[str]:
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


def unknown_verbs(text: str) -> list[str]:
    """In code only: blocks and spans. `omnilaunch:` begins an error."""
    return [verb for code in (*FENCE.findall(text), *spans(text)) for verb in VERB.findall(code) if verb not in VERBS]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_places_that_a_document_names_exist(path: Path) -> None:
    assert [place for place in wrong_places(path.read_text(encoding="utf-8")) if place not in OF_THE_USER] == []


@pytest.mark.parametrize("path", GUIDES, ids=relative)
def test_a_guide_names_functions_so_that_they_are_checked(path: Path) -> None:
    assert sum(PLACE.fullmatch(code) is not None for code in spans(path.read_text(encoding="utf-8"))) > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken_links(path.read_text(encoding="utf-8"), path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_verbs_are_those_of_the_program(path: Path) -> None:
    assert not unknown_verbs(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("program", "order"), [("launcher", LAUNCHER_ORDER), ("trainer", TRAINER_ORDER)])
def test_every_package_has_a_paragraph_with_the_module_that_its_docstring_names(program: str, order: tuple[tuple[str, ...], ...]) -> None:
    paragraphs = {
        found[1]: text
        for text in section(GUIDES[0].read_text(encoding="utf-8"), f"## The packages of the {program}").split("\n\n")
        if (found := re.match(r"\*\*(\w+)\*\*", text))
    }
    packages = [name for row in order for name in row if (ROOT / program / name).is_dir()]
    assert list(paragraphs) == packages
    for name in packages:
        words = ast.get_docstring(ast.parse((ROOT / program / name / "__init__.py").read_text(encoding="utf-8"))) or ""
        read_first = re.search(r"[Rr]ead `(\w+)`|`(\w+)`[^`.]* is the module to read first", words)
        assert read_first, f"{program}/{name}/__init__.py"
        assert f"`{program}/{name}/{read_first[1] or read_first[2]}.py`" in paragraphs[name], name


def section(text: str, heading: str) -> str:
    return text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]


def test_what_does_not_exist_is_found() -> None:
    text = "```console\n$ make\n```\n`launcher/cli.py: main`, `launcher/cli.py: Terminal.say`, `launcher/cli.py: mein`, `launcher/gone.py`, `conf/NAME.yaml`"
    assert wrong_places(text) == ["launcher/cli.py: mein", "launcher/gone.py"]
    links = "[a](docs/data.md#what-is-checked) [b](docs/data.md#gone) [c](gone.md) [d](https://example.org/x) [e](#your-own-data)"
    assert broken_links(links, ROOT / "README.md") == ["docs/data.md#gone", "gone.md"]
    assert unknown_verbs("`omnilaunch plan` omnilaunch runs well\n```console\n$ omnilaunch start x\nomnilaunch: no\n```\n") == ["start"]
