"""The place that a plan is made at: this machine, this folder, this interpreter. The one module that looks."""

import os
import sys
from pathlib import Path

from launcher.plan.plan import LocalContext

CONTAINER_USER = "1000:1000"  # in place of root, whom no container needs to be


def local_context(project: Path) -> LocalContext:
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else CONTAINER_USER
    return LocalContext(project=project, here=Path.cwd(), interpreter=sys.executable, user=user)
