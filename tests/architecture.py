"""Draws docs/architecture.svg: the packages of launcher/ and trainer/, and which of them import which, read from the code.

    python -m tests.architecture > docs/architecture.svg

Packages stand in the order of the tables below, which is that of imports. An arrow that follows from two others is left out: where A imports B and B imports C, the
arrow from A to C is not drawn. tests/test_house.py fails where the file and the code differ.
"""

import ast
import html
import sys
from dataclasses import dataclass
from pathlib import Path

# Who may import whom: a package sees its own row and the rows above it. `errors` and `redact` are modules beside the packages.
LAUNCHER_ORDER = (
    ("errors", "redact"),
    ("config",),
    ("weights", "media"),
    ("image",),
    ("memory",),
    ("check",),
    ("plan",),
    ("ssh",),
    ("record",),
    ("doctor",),
    ("run",),
    ("bench",),
    ("commands",),
    ("cli",),
)
TRAINER_ORDER = (
    ("contract",),
    ("device",),
    ("tensor", "optim", "kernels"),
    ("distributed",),
    ("data", "models"),
    ("stages",),
    ("generation", "memory_model"),
    ("checkpoint", "observe"),
    ("evaluation",),
    ("train",),
    ("export", "serving"),
    ("programs",),
    ("__main__",),
)
ROOT = Path(__file__).resolve().parent.parent
BOX_WIDTH, BOX_HEIGHT, GAP = 460, 46, 14
COLUMN = BOX_WIDTH + 170  # the box and the arrows to the right of it
MARGIN, HEAD = 24, 64
LANE = 16  # between two arrows that run side by side
STYLE = """
  svg { background: #ffffff } text { font: 13px system-ui, sans-serif; fill: #1f2933 }
  .title { font-size: 17px; font-weight: 600 } .name { font-weight: 600 } .text { font-size: 11.5px; fill: #52606d }
  .box { fill: #f5f7fa; stroke: #9aa5b1 } .shared { fill: #fff3d6; stroke: #c99a2e } .arrow { fill: none; stroke: #3e6fb0; stroke-width: 1.3 }
  .head { fill: #3e6fb0 }
  @media (prefers-color-scheme: dark) {
    svg { background: #11161c } text { fill: #e4e7eb } .text { fill: #9fb3c8 } .box { fill: #1d262f; stroke: #52606d }
    .shared { fill: #3a2f14; stroke: #c99a2e } .arrow { stroke: #8fb5e8 } .head { fill: #8fb5e8 }
  }
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """`text`: the first sentence of its docstring; `modules`: how many files of Python it has, its subfolders' included."""

    name: str
    text: str
    modules: int
    imports: frozenset[str]


def read_packages(root: Path, order: tuple[tuple[str, ...], ...]) -> tuple[Package, ...]:
    """The packages of a folder in the order of the table."""
    found = []
    for folder in (root / name for row in order for name in row if (root / name).is_dir()):
        files = sorted(folder.rglob("*.py"))
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        imports = frozenset().union(*(imported(path, root.name) for path in files)) - {folder.name}
        sentence = " ".join(text.split()).split(". ")[0].rstrip(".")
        found.append(Package(name=folder.name, text=sentence, modules=sum(path.name != "__init__.py" for path in files), imports=imports))
    return tuple(found)


def imported(path: Path, root: str) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        names |= {module.split(".")[1] for module in modules if module.startswith(f"{root}.")}
        if isinstance(node, ast.ImportFrom) and node.module == root:
            names |= {alias.name for alias in node.names}
    return frozenset(names)


def direct_imports(packages: tuple[Package, ...]) -> list[tuple[int, int]]:
    """(importer, imported) by place in the order, without those that follow from two others."""
    places = {package.name: place for place, package in enumerate(packages)}
    above = [{places[name] for name in package.imports & places.keys() if places[name] < place} for place, package in enumerate(packages)]
    reached: list[set[int]] = []
    for direct in above:
        reached.append(direct.union(*(reached[place] for place in direct)))
    return [
        (place, other) for place, direct in enumerate(above) for other in direct if not any(other in reached[between] for between in direct)
    ]


def draw_column(packages: tuple[Package, ...], title: str, left: int) -> list[str]:
    lines = [f'<text class="title" x="{left}" y="{MARGIN + 14}">{html.escape(title)}</text>']
    for place, package in enumerate(packages):
        top = HEAD + place * (BOX_HEIGHT + GAP)
        kind = "shared" if package.name == "contract" else "box"
        lines += [
            f'<rect class="{kind}" x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>',
            f'<text x="{left + 12}" y="{top + 19}"><tspan class="name">{package.name}</tspan> · {package.modules} modules</text>',
            f'<text class="text" x="{left + 12}" y="{top + 36}">{html.escape(shorten(package.text))}</text>',
        ]
    lanes: list[tuple[int, int, int]] = []  # number, and the two places that an arrow in it connects
    for importer, target in sorted(direct_imports(packages), key=lambda pair: (pair[0] - pair[1], pair)):
        lines += draw_arrow(importer, target, left + BOX_WIDTH, choose_lane(lanes, importer, target))
    return lines


def choose_lane(lanes: list[tuple[int, int, int]], importer: int, target: int) -> int:
    """The first lane in which no other arrow runs along the same boxes."""
    lane = 0
    while any(lane == used and target < high and importer > low for used, low, high in lanes):
        lane += 1
    lanes.append((lane, target, importer))
    return lane


def draw_arrow(importer: int, target: int, right: int, lane: int) -> list[str]:
    start = HEAD + importer * (BOX_HEIGHT + GAP) + 14
    end = HEAD + target * (BOX_HEIGHT + GAP) + BOX_HEIGHT - 12
    bend = right + 18 + lane * LANE
    return [
        f'<path class="arrow" d="M{right} {start} H{bend} V{end} H{right + 7}"/>',
        f'<path class="head" d="M{right} {end} l8 -4 v8 z"/>',
    ]


def shorten(text: str, most: int = 72) -> str:
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"


def draw() -> str:
    columns = [
        (read_packages(ROOT / "launcher", LAUNCHER_ORDER), "launcher: plans and starts, without torch"),
        (read_packages(ROOT / "trainer", TRAINER_ORDER), "trainer: runs in the image, on every rank"),
    ]
    height = HEAD + max(len(packages) for packages, _ in columns) * (BOX_HEIGHT + GAP) + MARGIN
    width = MARGIN * 2 + COLUMN * len(columns)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="packages and their imports">',
        f"<style>{STYLE}</style>",
    ]
    for number, (packages, title) in enumerate(columns):
        lines += draw_column(packages, title, MARGIN + number * COLUMN)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(draw())
