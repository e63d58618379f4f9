"""The house rules of docs/design.md, checked on every file."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.architecture import LAUNCHER_ORDER, TRAINER_ORDER, draw

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = sorted((ROOT / "launcher").glob("**/*.py"))
TRAINER = sorted((ROOT / "trainer").glob("**/*.py"))
PRODUCT = LAUNCHER + TRAINER
EVERY = PRODUCT + sorted((ROOT / "tests").glob("**/*.py"))
# What a person reads, but for what was recorded or is drawn from elsewhere, and this file, which names the words.
TEXTS = [
    path
    for path in [
        *EVERY,
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        *(ROOT / "conf").glob("**/*.yaml"),
        *(ROOT / "images").glob("*.*"),
        *(ROOT / "launcher").glob("**/*.[jsy][2ha]*"),
    ]
    if path.is_file() and path != Path(__file__).resolve() and path.name != "errors.md"
]
PUBLISHED_CLASSES = {"MiniCPMV", "MiniCPMVConfig"}  # two published families name theirs so, and their config.json asks for it

MOST_MODULES = 20  # in one folder, its __init__ not counted
# Our own words and turns, and what the manuals of PyTorch, Docker and OpenSSH say instead. Case is ignored.
WORDS = {
    r"\b(rank|node|device|row|file|step|value|problem|run|line|image|question|answer|check|note|path|tensor|process|restart|other|override|thread)"
    r"\((s|es)\)": "trainer.contract.wording.plural",
    r"\btold\b|\btells of\b": "reported, printed, says",
    r"\bheld against\b": "compared with, checked against",
    r"\bnobody\b": "the passive voice",
    r"(?<!--)\banew\b(?!=)": "again",  # `bench --anew` is an option that users type
    r"\bbesides\b": "also",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bsick\b": "unhealthy",
    r"\b(of|that were) before\b": "earlier, previous",
    r"\bforetold\b": "predicted",
    r"\bwhere they part\b": "where they diverge",
    r"\blook(s|ed|ing)? after\b": "supervise",
    r"\bfor granted\b": "assumption",
    r"\bgo(es)? on with\b": "next steps; continue with",
    r"\bgoes on by itself\b": "continues in the background",
    r"\bcomes? (to pass|of it)\b": "the result",
    r"\bnot answer any ?more\b": "stopped responding",
    r"\bfree room\b": "free disk space",
    r"\b(to|cannot|can|could) be had\b": "is (not) available",
    r"\bcomputed twice\b|\bmade again in the backward": "gradient checkpointing; recomputed in the backward pass",
    r"\bis no number\b|\bare no numbers\b": "a non-finite value (NaN or Inf); not a number",
    r"\bfullest\b": "the device with the highest peak",
    r"\bweights? in (8|eight) bits\b": "int8 weights",
    r"\btypes? of elements?\b|\belement types?\b": "dtype",
    r"\bto the bit\b": "bitwise identical",
    r"\bhollow\b": "on the meta device",
    r"\banything more\b": "extra arguments",
    r"\bstruck out\b": "freed",
    r"\bspoilt\b|\bspoiled\b": "non-finite",
    r"\bphantoms?\b": "fake tensor",
    r"\b(desk|crew)s?\b": "session; node processes",
    r"\bquantis": "quantiz…, one spelling",
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
# The only readers of the environment: the verbs of the launcher, and what torchrun sets for a rank.
ENVIRON_READERS = {
    "launcher/plan/local_context.py",
    "launcher/image/build.py",
    *(
        f"launcher/commands/{verb}.py"
        for verb in (
            *("plan", "launch", "chain", "doctor", "image", "licence", "model", "rerun", "bench", "bench_rerun"),
            "live/live_run",
            "live/resume",
        )
    ),
    "trainer/device/device.py",
    "trainer/programs/dispatch.py",
    "trainer/__main__.py",
    "trainer/observe/environment.py",
    "trainer/distributed/engine.py",
}
FORBIDDEN_TEXT = {
    r"shell=True": "commands are argv tuples",
    r"\bpkill\b|\bkillall\b": "a process is ended by its own id",
    r"AutoAddPolicy|StrictHostKeyChecking=no": "unknown host keys are refused",
    r"trust_remote_code=True": "native models only",
    r"\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError": "no unfinished work",
    r"torch\.load\(|pickle\.load": "no pickles",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_lists_are_not_empty() -> None:
    assert len(LAUNCHER) > 10 and len(TRAINER) > 10 and len(EVERY) > 30


@pytest.mark.parametrize("path", EVERY, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines"
    if path not in PRODUCT:
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_names_say_what_they_hold(path: Path) -> None:
    assert not FORBIDDEN_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_text_that_must_not_be(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern, rule in FORBIDDEN_TEXT.items():
        assert not re.search(pattern, text), f"{pattern}: {rule}"


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_public_modules_classes_and_dataclasses(path: Path) -> None:
    tree = tree_of(path)
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if "dataclass" in ast.unparse(decorator):
                assert "frozen=True" in ast.unparse(decorator) and "kw_only=True" in ast.unparse(decorator), (
                    f"{node.name} is frozen and keyword-only"
                )
        bases = {ast.unparse(base) for base in node.bases}
        demanded = {"torch.nn.Module", "torch.optim.Optimizer", "torch.autograd.Function", "TorchDispatchMode"}
        demanded |= {"PreTrainedModel", "GenerationMixin", "Qwen2Config", "MiniCPMV", "MiniCPMVConfig"}  # what transformers loads
        demanded |= {"urllib.request.HTTPRedirectHandler"}
        demanded |= {"Extension", "ImmutableSandboxedEnvironment", "NodeTransformer"}  # of Jinja
        demanded |= {"MistralConfig", "MistralModel", "GraniteConfig", "GradientCheckpointingLayer"}
        allowed = bases <= {"Protocol", "Enum", "IntEnum", "StrEnum", "NamedTuple", *demanded} or any(
            base.endswith(("Error", "Exception")) for base in bases
        )
        assert allowed or node.name.endswith(("Refused", "Failed", "Ended", "Unreachable")) or "Dataset" in str(bases), (
            f"{node.name} inherits from {bases}"
        )


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_environment_is_read_at_the_doors_only(path: Path) -> None:
    if relative(path) not in ENVIRON_READERS:
        assert not re.search(r"os\.environ|os\.getenv", path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", LAUNCHER, ids=relative)
def test_launcher_imports_run_one_way(path: Path) -> None:
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] in ("torch", "transformers", "deepspeed", "peft")}
    trainer = {name for name in names if name.split(".")[0] == "trainer"}
    assert all(name == "trainer" or name.split(".")[1] == "contract" for name in trainer)
    check_order("launcher", LAUNCHER_ORDER, path, names)


@pytest.mark.parametrize("path", TRAINER, ids=relative)
def test_trainer_imports_run_one_way(path: Path) -> None:
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] == "launcher"}
    check_order("trainer", TRAINER_ORDER, path, names)


def check_order(package: str, order: tuple[tuple[str, ...], ...], path: Path, names: set[str]) -> None:
    row_of = {name: row for row, group in enumerate(order) for name in group}
    own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in row_of, f"{own} has no row in the order of imports"
    for name in names:
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] != own and (ROOT / package / parts[1]).exists():
            assert row_of[parts[1]] <= row_of[own], f"{own} may not import {parts[1]}"


@pytest.mark.parametrize("package", ["launcher", "trainer"])
def test_imports_have_no_circle(package: str) -> None:
    modules = {name_of(path): path for path in (LAUNCHER if package == "launcher" else TRAINER)}
    graph = {name: {other for other in imported(path) if other in modules and other != name} for name, path in modules.items()}
    for name in graph:  # a facade may be imported by what it collects
        graph[name] -= {other for other in graph[name] if modules[other].name == "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def name_of(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("folder", sorted({path.parent for path in PRODUCT}), ids=relative)
def test_folders_are_small_and_say_what_they_hold(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{len(modules)} modules"
    text = ast.get_docstring(tree_of(folder / "__init__.py")) or ""
    assert 2 <= text.count("\n") + 1 <= 8, "the __init__ says in about five lines what the folder holds and which module to read first"
    assert any(f"`{path.stem}`" in text for path in modules) or len(modules) < 3, "names the module to read first"


def test_the_picture_of_the_house_is_drawn_from_the_code() -> None:
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == draw(), "python -m tests.architecture > docs/architecture.svg"


def test_one_class_for_a_name() -> None:
    found: dict[str, list[str]] = {}
    for path in PRODUCT:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(relative(path))
    twice = {name: where for name, where in found.items() if len(where) > 1 and name not in PUBLISHED_CLASSES}
    assert not twice


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_words(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: {better}"
        for pattern, better in WORDS.items()
        for match in re.finditer(pattern.replace(" ", r"\s+(?:#\s*)?"), text, flags=re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_no_program_is_written_in_a_string(path: Path) -> None:
    """A program in a string is seen by no linter: it belongs into a file of its own."""
    assert not programs_in(tree_of(path))


def programs_in(tree: ast.Module) -> list[str]:
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr) and node not in docstrings]
    return [f"line {node.lineno}: {text_in(node)[:60]!r}" for node in strings if is_program(text_in(node))]


def text_in(node: ast.Constant | ast.JoinedStr) -> str:
    """The text of a string. A value of an f-string counts as 0."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def is_program(text: str) -> bool:
    """Two statements or more of Python, one of which imports, assigns or defines; or a block of shell: a condition, a loop, or several lines
    that use arguments."""
    if re.search(r"\b(then|do)\b[\s\S]*\b(fi|done)\b", text) and ";" in text:
        return True
    if "\n" in text.strip() and re.search(r"""^set -[eo]|["=]\$\{?[1-9@]""", text, re.MULTILINE):
        return True
    media_type = re.fullmatch(r"[a-z]+/[a-z0-9.+-]+(; [a-z]+=[\w.-]+)+", text)  # `text/html; charset=utf-8` parses as two statements
    if media_type or ("\n" not in text.strip() and ";" not in text):
        return False
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    return len(body) > 1 and any(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef | ast.For) for node in body)


@pytest.mark.parametrize(
    "source",
    [
        'X = f"""\nimport time\nlimit = {LIMIT_S}\ntime.sleep(limit)\n"""',
        'X = """set -o pipefail\ndocker save "$1" | docker load\n"""',
        'X = """read -r token\ncat <&3 | docker load -- "$1"\n"""',
        "X = 'if [ -d \"$1\" ]; then ls; fi'",
    ],
)
def test_a_program_in_a_string_is_found(source: str) -> None:
    assert programs_in(ast.parse(source))
    assert not programs_in(ast.parse('X = "two lines\\nof text; it costs $5"\nY = f"{a}\\n{b}"'))


def test_loop_knows_no_stage_and_a_stage_knows_no_loop() -> None:
    loop = imported(ROOT / "trainer" / "train" / "loop.py")
    assert not {name for name in loop if name.startswith(("trainer.stages", "trainer.models"))}
    for path in (ROOT / "trainer" / "stages").glob("*.py"):
        assert not {name for name in imported(path) if name.startswith(("trainer.train.loop", "trainer.distributed.engine"))}


@pytest.mark.parametrize("path", sorted((ROOT / "trainer" / "contract").glob("*.py")), ids=relative)
def test_contract_is_standard_library_only(path: Path) -> None:
    names = imported(path)
    own = {name for name in names if name.split(".")[0] == "trainer"}
    assert all(name.startswith("trainer.contract") for name in own)
    assert {name.split(".")[0] for name in names - own} <= set(sys.stdlib_module_names)


def test_importing_the_launcher_brings_no_torch() -> None:
    modules = [name_of(path) for path in LAUNCHER]
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint(sorted({{'torch', 'transformers', 'deepspeed', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_torch_npu_door_is_device() -> None:
    for path in TRAINER:
        if relative(path) != "trainer/device/device.py":
            assert "torch_npu" not in {name.split(".")[0] for name in imported(path)}


def test_top_level_is_the_users() -> None:
    tracked = subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.split("/")[0] for line in tracked if line}
    allowed = {"conf", "images", "launcher", "trainer", "tests", "pyproject.toml", "Makefile", "docs", "LICENSE", "CONTRIBUTING.md"}
    assert {name for name in names if not name.startswith((".", "README"))} <= allowed


def test_a_plan_brings_nothing_that_reaches_a_node() -> None:
    """Fabric and what it brings take as long as all the rest of a plan."""
    code = "import sys; from launcher.cli import main; main(['plan']); print(sorted({'fabric', 'paramiko', 'asyncio', 'numpy'} & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
