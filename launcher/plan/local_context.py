"""What a plan takes from the machine it is made on: the current folder, the interpreter, the user. Only this module reads them."""

import os
import sys
from pathlib import Path

from launcher.plan.plan import LocalContext

CONTAINER_USER = "1000:1000"  # where the launcher runs as root: a container does not need root


def local_context(project: Path) -> LocalContext:
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else CONTAINER_USER
    return LocalContext(project=project, here=Path.cwd(), interpreter=sys.executable, user=user)
