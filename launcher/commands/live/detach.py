"""`--detach`: which runs can continue without their launcher, and what is printed of one that does."""

from launcher.errors import ConfigRefused


def refuse_detach(detach: bool, runtime: str) -> None:
    if detach and runtime != "docker":
        raise ConfigRefused(
            "--detach needs containers, which continue in the background, and cluster.runtime=process has none. Use cluster.runtime=docker"
        )


def describe_detached(run_id: str) -> str:
    return f"the run continues in the background. To supervise it again: omnilaunch attach {run_id}"
