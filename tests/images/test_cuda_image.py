"""The lock of cuda126, installed on a stand-in base without a GPU: versions, architectures, and the trainer's own tests with its torch
2.7.1. Nothing that needs a GPU is run."""

import shutil
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from launcher.image.proof import lock_digest, read_proofs
from launcher.image.stack import load_stacks
from tests.images.conftest import ROOT, Built, in_container, inspect

pytestmark = pytest.mark.docker

TEST_TOOLS = ("pytest", "iniconfig", "packaging", "pluggy", "pygments", "hypothesis", "sortedcontainers")
TEST_TOOLS += (
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
)  # the cells of tests/trainer/programs/test_cells.py are planned as a launch is
# Only the driver's library is missing: the tests of a machine without a GPU, with the torch of this image.
ON_THE_CPU = ("env", "DS_ACCELERATOR=cpu", "PYTHONPATH=/tools:/project", "OMP_NUM_THREADS=1", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/examples")


@pytest.fixture(scope="session")
def cuda(make: Callable[..., Built], project: Path, request: pytest.FixtureRequest) -> Built:
    """6 GB take 15 minutes: without --prove it is built only if its lock has no proof yet."""
    proof = read_proofs(ROOT).get("cuda126-x86_64")
    proven = proof is not None and proof.lock == lock_digest(load_stacks(ROOT / "images")["cuda126"], "x86_64", ROOT)
    if proof is not None and proven and not request.config.getoption("--prove"):
        pytest.skip(f"shown on {proof.date} with this very lock (images/proven.json); again with: make image-check ARGS=--prove")
    return make(project, "cuda126")


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the packages that are installed here. They are pure Python, so they run in any image with the same Python."""
    folder, site = tmp_path_factory.mktemp("tools"), Path(sysconfig.get_paths()["purelib"])
    folder.chmod(0o755)  # another user reads it
    for name in TEST_TOOLS:
        for file in metadata.files(name) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(site / file, folder / file)
    return folder


def test_size_and_labels(cuda: Built) -> None:
    facts = inspect(cuda.image.tag)
    print(f"\ncuda126 image: {facts['Size'] / 1e9:.2f} GB")
    assert facts["Size"] <= 9e9
    assert facts["Config"]["Labels"]["io.omnilaunch.torch"] == "2.7.1"
    assert facts["Config"]["User"] == "1000:1000"


def test_packages_agree(cuda: Built) -> None:
    assert in_container(cuda.image.tag, "python", "-m", "pip", "check") == "No broken requirements found."


def test_torch_holds_code_for_every_card(cuda: Built) -> None:
    """torch.cuda.get_arch_list() is empty without a GPU, so the flags of its library are read."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch._C._cuda_getArchFlags())"
    version, toolkit, *architectures = in_container(cuda.image.tag, "python", "-c", code).split()
    assert version.startswith("2.7.1") and toolkit == "12.6"
    assert {"sm_60", "sm_86", "sm_90"} <= set(architectures)


def test_the_trainers_tests_pass_inside(cuda: Built, tools: Path, tmp_path: Path, prove: Callable[..., None]) -> None:
    """On this torch, as a user who is not root."""
    project = tmp_path / "project"
    for name in ("conf", "trainer", "tests", "launcher", "images"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", project / "pyproject.toml")
    said = in_container(
        cuda.image.tag, *ON_THE_CPU, "python", "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", "/project", "/project/tests/trainer",
        network="bridge",
        mounts=(f"type=bind,source={project},target=/project,readonly", f"type=bind,source={tools},target=/tools,readonly"),
    )  # fmt: skip
    result = said.splitlines()[-1]
    print(f"\n{result}")
    assert " passed" in result and "failed" not in result and "error" not in result, said
    passed = result.split(" passed")[0].split()[-1]
    prove(
        "cuda126",
        "x86_64",
        base="stand-in base",
        size_bytes=inspect(cuda.image.tag)["Size"],
        shown=("pip check", "torch holds sm_60, sm_86 and sm_90", f"{passed} tests of the trainer on the CPU with torch 2.7.1"),
        missing="a GPU",
    )
