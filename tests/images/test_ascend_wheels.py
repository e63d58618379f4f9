"""Ascend without an NPU: its packages are fetched, and every name of torch_npu that we use is looked up in its sources."""

import ast
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from launcher.image.lock import locked_packages
from launcher.image.refresh import TORCH_INDEX, torch_of
from launcher.image.stack import load_stacks
from launcher.image.wheelhouse import fetch_wheels
from tests.images.conftest import ROOT, pip_delivery
from tests.images.source import Wheel, accepts, read_wheel

pytestmark = pytest.mark.network

STACKS = load_stacks(ROOT / "images")
# (stack, architecture), one for every Ascend lock that another stack does not share.
LOCKS = {
    (lock, architecture): name
    for name, stack in STACKS.items()
    if stack.family == "ascend"
    for architecture, lock in stack.locks.items()
    if lock
}
CASES = [(name, architecture) for (_, architecture), name in LOCKS.items()]
# Used by DeepSpeed's accelerator: tensor types that the compiled part of torch_npu registers, and names that only old plugins had.
NOT_IN_SOURCES = {"npurt", "BFloat16Tensor", "ByteTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor", "LongTensor"}


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder with a stack's files, fetched once."""
    made: dict[tuple[str, str], Path] = {}

    def wheelhouse(stack: str, architecture: str) -> Path:
        if (stack, architecture) not in made:
            folder = tmp_path_factory.mktemp(f"{stack}-{architecture}")
            row = STACKS[stack]
            if "+" in torch_of(row, architecture) and not reachable(TORCH_INDEX):
                pytest.skip(f"{TORCH_INDEX} cannot be reached from here, and only it has torch {torch_of(row, architecture)}")
            fetch_wheels(row, architecture=architecture, root=ROOT, folder=folder, environ=os.environ, delivery=pip_delivery(), say=print)
            made[stack, architecture] = folder
        return made[stack, architecture]

    return wheelhouse


@pytest.mark.parametrize(("stack", "architecture"), CASES)
def test_the_lock_is_fetched_completely(stack: str, architecture: str, wheelhouse: Callable[[str, str], Path]) -> None:
    folder = wheelhouse(stack, architecture)
    rows = locked_packages(ROOT / "images" / STACKS[stack].locks[architecture])
    assert len(list(folder.iterdir())) >= len(rows) > 40
    for file in folder.glob("*.whl"):
        platform = file.stem.split("-")[-1]
        assert platform.endswith(("any", architecture)), f"{file.name} is for another architecture"
    assert len(list(folder.glob(f"torch_npu-{STACKS[stack].plugin.split()[1]}-*_{architecture}.whl"))) == 1


def reachable(index: str) -> bool:
    try:
        with urlopen(index, timeout=10):
            return True
    except URLError:
        return False


def plugin(folder: Path) -> Wheel:
    (path,) = folder.glob("torch_npu-*.whl")
    return read_wheel(path)


def calls_of_the_trainer() -> dict[str, int]:
    """Name under torch.npu -> the number of arguments that trainer/device/device.py calls it with."""
    tree = ast.parse((ROOT / "trainer" / "device" / "device.py").read_text(encoding="utf-8"))
    (adapter,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "accelerator_device")
    return {
        node.func.attr: len(node.args)
        for node in ast.walk(adapter)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "api()"
    }


@pytest.mark.parametrize(("stack", "architecture"), CASES)
def test_every_name_that_the_trainer_calls_is_in_the_plugin(
    stack: str, architecture: str, wheelhouse: Callable[[str, str], Path], prove: Callable[..., None]
) -> None:
    names = plugin(wheelhouse(stack, architecture)).names("torch_npu.npu")
    calls = calls_of_the_trainer()
    assert {"device_count", "set_device", "synchronize", "max_memory_allocated", "mem_get_info", "get_device_name"} <= set(calls)
    for name, arguments in calls.items():
        assert name in names, f"torch.npu.{name} is gone"
        assert accepts(names[name], arguments), f"torch.npu.{name} takes other arguments than the {arguments} that it is given"
    files = tuple(wheelhouse(stack, architecture).iterdir())
    prove(
        stack,
        architecture,
        base="",
        size_bytes=sum(file.stat().st_size for file in files),
        shown=(f"{len(files)} files fetched, every hash as locked", f"the {len(calls)} functions of torch.npu that the trainer calls"),
        missing="the image on its base, an NPU",
    )


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda path: path.name)
def test_the_adapter_is_the_only_user_of_the_plugin(path: Path) -> None:
    """Otherwise the tests above would not see all names."""
    used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith(("torch.npu.", "torch_npu."))} <= {"torch_npu.profiler"}


@pytest.mark.parametrize(("stack", "architecture"), CASES)
def test_every_name_of_the_profiler_is_in_the_plugin(stack: str, architecture: str, wheelhouse: Callable[[str, str], Path]) -> None:
    names = plugin(wheelhouse(stack, architecture)).names("torch_npu.profiler")
    tree = ast.parse((ROOT / "trainer" / "observe" / "profile.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "api"}
    assert {"profile", "ProfilerActivity", "tensorboard_trace_handler"} <= used <= set(names)


@pytest.mark.parametrize(("stack", "architecture"), CASES)
def test_every_fused_operator_is_in_the_plugin(stack: str, architecture: str, wheelhouse: Callable[[str, str], Path]) -> None:
    """Only that they exist; they were not run."""
    tree = ast.parse((ROOT / "trainer" / "kernels" / "fused.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu"}
    sources = plugin(wheelhouse(stack, architecture)).sources.values()
    assert len(used) == 3
    assert {name for name in used if not any(f"torch.ops.npu.{name}" in text for text in sources)} == set()


@pytest.mark.parametrize(("stack", "architecture"), CASES)
def test_every_name_that_deepspeed_uses_is_in_the_plugin(stack: str, architecture: str, wheelhouse: Callable[[str, str], Path]) -> None:
    folder = wheelhouse(stack, architecture)
    names = plugin(folder).names("torch_npu.npu")
    (archive,) = folder.glob("deepspeed-*.tar.gz")
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/accelerator/npu_accelerator.py")
        assert member is not None
        tree = ast.parse(member.read())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.npu"}
    assert len(used) > 30
    assert {name for name in used if name not in names} <= NOT_IN_SOURCES
