"""Checks inside an image, while it is built, that the installed versions are those of images/versions.yaml and can be used.

    python selftest.py ACCELERATOR [--versions NAME=VERSION...] [--architectures NAME...] [--operators NAME...]

Ends with exit code 1 and one line for each problem.
"""

import argparse
import sys
from importlib import import_module, metadata

IMPORTS = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "PIL",
    "sklearn.metrics",
    "ninja",
    "pyarrow.parquet",
    "pyarrow.ipc",
)
BUILDERS = {"cpu_adam": "CPUAdamBuilder", "deepspeed_shm_comm": "ShareMemCommBuilder"}


def check_versions(expected: list[str]) -> list[str]:
    """2.7.1 may be installed as 2.7.1+cpu: with an NPU, the table names the release and the lock the build."""
    pairs = (pair.split("=", 1) for pair in expected)
    installed = [(name, version, metadata.version(name)) for name, version in pairs]
    return [
        f"{name} is {found}, the table says {version}" for name, version, found in installed if version not in (found, found.split("+")[0])
    ]


def check_architectures(expected: list[str]) -> list[str]:
    """What torch was compiled for, from its library: torch.cuda.get_arch_list() is empty on a machine without a GPU."""
    if not expected:
        return []
    compiled = import_module("torch")._C._cuda_getArchFlags().split()
    return [f"torch has no code for {name}; it has {' '.join(compiled)}" for name in expected if name not in compiled]


def check_operators(accelerator: str, expected: list[str]) -> list[str]:
    """Each operator is recorded as compiled for this accelerator, and its library loads."""
    if not expected:
        return []
    version = import_module("deepspeed.git_version_info")
    builders = import_module("deepspeed.ops.op_builder.cpu")
    missing = [f"DeepSpeed does not have {name} compiled in" for name in expected if not version.installed_ops.get(name)]
    if version.accelerator_name != accelerator:
        missing.append(f"DeepSpeed's operators are recorded for {version.accelerator_name}, not {accelerator}")
    if not missing:
        for name in expected:
            import_module(getattr(builders, BUILDERS[name])().absolute_name())
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("accelerator")
    for option in ("--versions", "--architectures", "--operators"):
        parser.add_argument(option, nargs="*", default=[])
    given = parser.parse_args()
    for name in IMPORTS:
        import_module(name)
    findings = [
        *check_versions(given.versions),
        *check_architectures(given.architectures),
        *check_operators(given.accelerator, given.operators),
    ]
    print("\n".join(findings) or "self test passed")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
