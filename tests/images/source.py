"""The names that a Python package defines, read from the sources inside its wheel without importing anything."""

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Sources by path inside the wheel, such as torch_npu/npu/__init__.py."""

    sources: dict[str, str]
    modules: dict[str, dict[str, ast.AST | None]] = field(default_factory=dict)

    def names(self, module: str) -> dict[str, ast.AST | None]:
        """Name -> the syntax tree of its function, None for anything else; `*` and re-exports are followed. As with Python's own import,
        a module is read once, and in a circle of imports a module sees the names that the other has so far."""
        if module in self.modules:
            return self.modules[module]
        found = self.modules[module] = {}
        for node in statements(parse(self.sources[self.path(module)])):
            if isinstance(node, ast.ImportFrom):
                found |= self.imported(node, module)
            elif isinstance(node, ast.FunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.ClassDef):
                found[node.name] = None
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id: None for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Import):
                found |= {(alias.asname or alias.name).split(".")[0]: None for alias in node.names}
        return found

    def imported(self, node: ast.ImportFrom, module: str) -> dict[str, ast.AST | None]:
        package = module.split(".") if self.path(module).endswith("/__init__.py") else module.split(".")[:-1]
        start = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join((*start, *(node.module.split(".") if node.module else ())))
        known = self.names(source) if self.has(source) else {}
        if node.names[0].name == "*":
            return {name: tree for name, tree in known.items() if not name.startswith("_")}
        return {alias.asname or alias.name: known.get(alias.name) for alias in node.names}

    def has(self, module: str) -> bool:
        return bool(module) and any(path in self.sources for path in self.places(module))

    def path(self, module: str) -> str:
        return next(path for path in self.places(module) if path in self.sources)

    @staticmethod
    def places(module: str) -> tuple[str, str]:
        return (f"{module.replace('.', '/')}/__init__.py", f"{module.replace('.', '/')}.py")


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run on import, also those in `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from statements(node)


def parse(source: str) -> ast.Module:
    """Without the warnings about escape sequences in the sources of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(source)


def read_wheel(path: Path) -> Wheel:
    with ZipFile(path) as archive:
        return Wheel(sources={name: archive.read(name).decode("utf-8") for name in archive.namelist() if name.endswith(".py")})


def accepts(function: ast.AST | None, arguments: int) -> bool:
    """Whether a function can be called with so many positional arguments; True for anything that is not a plain function."""
    if not isinstance(function, ast.FunctionDef):
        return True
    given = function.args
    places = len(given.posonlyargs) + len(given.args)
    return places - len(given.defaults) <= arguments <= (places if given.vararg is None else arguments)
