"""Builds DeepSpeed with the operators that a run needs compiled in, so that no node needs a compiler or waits for one.

    python operators.py LOCK OUT ACCELERATOR OPERATOR...

Downloads the source of DeepSpeed that LOCK names, with its hash checked, compiles OPERATOR... (cpu_adam, deepspeed_shm_comm) and writes
a wheel to OUT whose `installed_ops` lists them for ACCELERATOR. Runs while an image is built, after torch is installed.

DeepSpeed compiles for the CPU that it is built on (-march=native). An image also runs on older CPUs, so the flags of a level of the
architecture are used instead.
"""

import os
import platform
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

VECTOR_FLAGS = {
    "x86_64": ("-march=x86-64-v3", "-D__AVX256__"),  # AVX2 and FMA: Haswell (2013), Zen (2017) and newer
    "aarch64": ("-march=armv8-a", "-D__NEON__"),
}


def locked_row(lock: str, package: str) -> str:
    """The row of one package in the lock, with its hashes."""
    row = re.search(rf"^{package}==.*?[0-9a-f]$(?!\n {{4}})", lock, flags=re.MULTILINE | re.DOTALL)
    if row is None:
        raise SystemExit(f"the lock has no row for {package}; write it again with: omnilaunch image refresh")
    return row.group() + "\n"


def fetch_source(lock: Path, folder: Path) -> Path:
    """Download DeepSpeed's source distribution, whose hash pip checks, and unpack it; return its folder."""
    row = folder / "row.txt"
    row.write_text(locked_row(lock.read_text(encoding="utf-8"), "deepspeed"), encoding="utf-8")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--require-hashes",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        "deepspeed",
    )
    subprocess.run((*pip, "-d", str(folder), "-r", str(row)), check=True)
    (archive,) = folder.glob("deepspeed-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # no filter: Python 3.11.2 of Debian 12 has none, and the hash identifies the archive
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(source: Path, out: Path, accelerator: str, operators: list[str]) -> None:
    """Run DeepSpeed's setup.py with portable flags. The optimizer of the host is the same code for every accelerator, so it is compiled
    as for the CPU and recorded for the accelerator that will load it."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_ENABLE_NINJA": "1", "LDFLAGS": "-Wl,-s"}
    os.chdir(source)
    sys.path.insert(0, str(source))
    from op_builder import all_ops
    from op_builder.builder import OpBuilder

    march, vectors = VECTOR_FLAGS[platform.machine()]
    OpBuilder.cpu_arch = lambda self: march
    OpBuilder.simd_width = lambda self: vectors
    os.environ |= {all_ops.ALL_OPS[name].BUILD_VAR: "1" for name in operators}
    all_ops.accelerator_name = accelerator
    sys.argv = ["setup.py", "-q", "bdist_wheel", "-d", str(out)]
    runpy.run_path("setup.py", run_name="__main__")


def main(lock: str, out: str, accelerator: str, *operators: str) -> None:
    # A fixed path: it is part of the compiled code, and two builds must be equal.
    folder = Path("source").resolve()
    folder.mkdir()
    build_wheel(fetch_source(Path(lock).resolve(), folder), Path(out).resolve(), accelerator, list(operators))


if __name__ == "__main__":
    main(*sys.argv[1:])
