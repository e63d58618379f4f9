"""What a plan takes from this machine: folder, interpreter, user; and whether its Docker engine has the plan's image.

Of this package, only this module and `weights_folder` read the machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from launcher.plan.plan import LocalContext, Plan

ENGINE_TIMEOUT_S = 5
CONTAINER_USER = "1000:1000"  # where the launcher runs as root: a container does not need root


def local_context(project: Path) -> LocalContext:
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else CONTAINER_USER
    return LocalContext(project=project, here=Path.cwd(), interpreter=sys.executable, user=user)


def find_built(plan: Plan) -> bool | None:
    """Whether this machine's engine has the plan's image, whose tag holds the hash of its content. None = not asked, since the plan
    needs none, or not known, since no engine answers."""
    docker = shutil.which("docker")
    if plan.config.cluster.runtime != "docker" or docker is None:
        return None
    argv = (docker, "image", "inspect", "--format", "{{.Id}}", plan.image.tag)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=ENGINE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return True if done.returncode == 0 else False if "no such image" in done.stderr.lower() else None
