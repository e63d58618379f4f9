"""The options of a container, and the one function that renders them as `docker run`. Everything that needs an option reads it here:
an argv is never parsed. Pure."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A bind mount. `path`: inside the container; `source`: on the host, '' = the same path."""

    path: str
    read_only: bool = True
    source: str = ""

    def __str__(self) -> str:
        """As `--mount` takes it."""
        return f"type=bind,source={self.source or self.path},target={self.path}{',readonly' if self.read_only else ''}"


@dataclass(frozen=True, kw_only=True)
class ContainerOptions:
    """What `docker run` is asked for. `stop_timeout_s`: until `docker stop` kills, 0 = the engine's ten seconds.
    `user`: uid:gid, '' = the image's; `groups`: further gids of that user. `devices`: device files of the host. `gpus`: numbers for `--gpus`.
    `runtime`: name of an OCI runtime, '' = the engine's default. `entrypoint` replaces the image's own."""

    image: str
    name: str = ""
    env_file: str = ""
    network: str = "host"
    user: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    shm_size: str = ""
    ulimits: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    devices: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    runtime: str = ""
    entrypoint: str = ""
    stop_timeout_s: int = 0
    groups: tuple[int, ...] = ()


def docker_run(options: ContainerOptions, command: tuple[str, ...], *, detach: bool = False) -> tuple[str, ...]:
    """The argv that starts `command` in a container. Unless it is detached, the container is removed when it ends."""
    # docker reads the value of --gpus as CSV: without the inner quotes, a second number is read as a count of devices.
    gpus = f'"device={",".join(map(str, options.gpus))}"' if options.gpus else ""
    values = (
        ("--name", options.name),
        ("--env-file", options.env_file),
        ("--network", options.network),
        ("--user", options.user),
        *(("--group-add", str(group)) for group in options.groups),
        *(("--label", f"{key}={value}") for key, value in options.labels.items()),
        ("--shm-size", options.shm_size),
        *(("--ulimit", f"{key}={value}") for key, value in options.ulimits.items()),
        *(("--mount", str(mount)) for mount in options.mounts),
        *(("--device", path) for path in options.devices),
        ("--gpus", gpus),
        ("--runtime", options.runtime),
        ("--entrypoint", options.entrypoint),
        ("--stop-timeout", str(options.stop_timeout_s or "")),
    )
    given = (word for option, value in values if value for word in (option, value))
    return ("docker", "run", "--detach" if detach else "--rm", *given, options.image, *command)
