"""The house rules of docs/design.md, held against every file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = sorted((ROOT / "launcher").glob("**/*.py"))
TRAINER = sorted((ROOT / "trainer").glob("**/*.py"))
PRODUCT = LAUNCHER + TRAINER
EVERY = PRODUCT + sorted((ROOT / "tests").glob("**/*.py"))

# Who may import whom inside the launcher: a module sees the rows above its own, never those below.
LAUNCHER_ORDER = (
    ("errors", "interrupt"),
    ("symptom", "log"),
    ("ascend_symptom", "cuda_symptom", "host_symptom"),
    ("meaning",),
    ("schema",),
    ("transport",),
    ("hostkey", "pump", "channel"),
    ("login",),
    ("route",),
    ("connection",),
    ("link",),
    ("ssh",),
    ("fleet",),
    ("credential", "image", "compose", "fit", "accelerator", "deepspeed", "smi"),
    ("image_token",),
    ("activation", "buffer"),
    ("memory",),
    ("problem",),
    ("capability", "cluster", "container", "deployment", "recipe", "network", "stage", "text"),
    ("choice",),
    ("remedy",),
    ("check",),
    ("chain",),
    ("cell",),
    ("start",),
    ("plan",),
    ("place",),
    ("engine", "wheelhouse", "proof"),
    ("image_table",),
    ("resolver",),
    ("build", "progress", "refresh", "member", "node"),
    ("facts",),
    ("answer",),
    ("probe", "finding"),
    ("machine",),
    ("device", "agreement", "experiment"),
    ("headroom",),
    ("gang", "relay", "doctor"),
    ("ship",),
    ("remote_build", "sync"),
    ("source",),
    ("seal",),
    ("record",),
    ("archive", "record_schema"),
    ("curve", "noise"),
    ("evidence",),
    ("fact",),
    ("comparison",),
    ("compare",),
    ("chart", "gallery", "summary", "timeline"),
    ("report",),
    ("reference",),
    ("attempt", "claim", "ending", "catalogue"),
    ("prune", "tree", "result"),
    ("rerun",),
    ("measurement",),
    ("matrix", "reproduction", "restoration"),
    ("preparation",),
    ("supervision", "desk"),
    ("launch",),
    ("series",),
    ("show",),
    ("forecast", "trace"),
    ("script",),
    ("guide",),
    ("bundle",),
    ("data_action", "image_action", "run_action", "record_action"),
    ("rerun_action",),
    ("bench_action", "chain_action"),
    ("cli",),
)
# The same for the trainer's packages and modules.
TRAINER_ORDER = (
    ("option", "report"),
    ("fact",),
    ("contract",),
    ("weight",),
    ("device", "precision", "schedule", "data", "models", "stages", "observe", "resume", "shard", "output", "watchdog"),
    ("activation", "kernel", "ledger", "loss", "manifest", "part", "phantom", "quantization", "rounding", "synthesis"),
    ("naming", "paging", "rank", "stream"),
    ("adapter", "int8", "mixture", "survival"),
    ("forced", "metric", "placement", "question", "reader", "sampling"),
    ("watch",),
    ("answer",),
    ("optimizer",),
    ("eight_bit",),
    ("effect",),
    ("engine",),
    ("sharding",),
    ("trace",),
    ("best", "state"),
    ("checkpoint", "difference", "evaluate", "finite", "journal", "loop", "origin", "start"),
    ("draft", "scatter"),
    ("build", "probe", "product"),
    ("calibration", "nf4"),
    ("writer",),
    ("boundary",),
    ("training",),
    ("serving",),
    ("run",),
    ("assess", "convert", "infer", "merge", "quantize", "serve"),
    ("__main__",),
)
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
# The only readers of the environment: the launcher's door, and what torchrun sets for a rank.
ENVIRON_READERS = {
    "launcher/cli.py",
    "launcher/plan/local_context.py",
    "launcher/image/build.py",
    "launcher/commands/image.py",
    "launcher/commands/live_run.py",
    "launcher/commands/rerun.py",
    "launcher/commands/bench.py",
    "trainer/device/device.py",
    "trainer/train/run.py",
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
    assert {name for name in trainer if not name.startswith(("trainer.contract", "trainer.contract.environment_facts", "trainer.contract.checkpoint_files", "trainer.contract.weight_files"))} <= {
        "trainer"
    }
    check_order("launcher", LAUNCHER_ORDER, path, names)


@pytest.mark.parametrize("path", TRAINER, ids=relative)
def test_trainer_imports_run_one_way(path: Path) -> None:
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] == "launcher"}
    check_order("trainer", TRAINER_ORDER, path, names)


def check_order(package: str, order: tuple[tuple[str, ...], ...], path: Path, names: set[str]) -> None:
    place = {name: row for row, group in enumerate(order) for name in group}
    own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in place, f"{own} has no place in the order of imports"
    for name in names:
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] in place and parts[1] != own:
            assert place[parts[1]] <= place[own], f"{own} may not import {parts[1]}"


def test_loop_knows_no_stage_and_a_stage_knows_no_loop() -> None:
    loop = imported(ROOT / "trainer" / "loop.py")
    assert not {name for name in loop if name.startswith(("trainer.stages", "trainer.models"))}
    for path in (ROOT / "trainer" / "stages").glob("*.py"):
        assert not {name for name in imported(path) if name.startswith(("trainer.train.loop", "trainer.distributed.engine"))}


def test_contract_is_standard_library_only() -> None:
    own = {name for name in imported(ROOT / "trainer" / "contract.py") if name.split(".")[0] == "trainer"}
    assert all(name.startswith(("trainer.contract.options", "trainer.contract.rows", "trainer.contract.environment_facts")) for name in own)
    names = imported(ROOT / "trainer" / "contract.py") | imported(ROOT / "trainer" / "report.py") | imported(ROOT / "trainer" / "fact.py")
    assert {name.split(".")[0] for name in names - own} <= set(sys.stdlib_module_names)


def test_importing_the_launcher_brings_no_torch() -> None:
    modules = [f"launcher.{path.stem}" for path in LAUNCHER if path.stem != "__init__"]
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint(sorted({{'torch', 'transformers', 'deepspeed', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_torch_npu_door_is_device() -> None:
    for path in TRAINER:
        if path.name != "device.py":
            assert "torch_npu" not in {name.split(".")[0] for name in imported(path)}


def test_top_level_is_the_users() -> None:
    tracked = subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.split("/")[0] for line in tracked if line}
    allowed = {"conf", "images", "launcher", "trainer", "tests", "pyproject.toml", "Makefile", "docs", "LICENSE"}
    assert {name for name in names if not name.startswith((".", "README"))} <= allowed


def test_a_plan_brings_nothing_that_reaches_a_node() -> None:
    """Fabric and what it brings take as long as all the rest of a plan."""
    code = "import sys; from launcher.cli import main; main(['plan']); print(sorted({'fabric', 'paramiko', 'asyncio', 'numpy'} & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
