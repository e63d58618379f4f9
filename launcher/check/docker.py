"""Rules about the container: variables and secrets, Docker's settings, the source of the image. Docker itself would refuse them only at the
start, on every node."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.errors import suggest
from launcher.image.stack import Stack
from launcher.redact import MASK, holds_credentials, is_masked, names_a_secret

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
USER = re.compile(r"\d+:\d+")
SIZE = re.compile(r"0*[1-9]\d*(\.\d+)?([kmgtp]i?)?b?|0*\.\d+[kmgtp]i?b?", re.IGNORECASE)  # as RAMInBytes of docker/go-units, without zero
LIMIT = re.compile(r"(-?\d+)(?::(-?\d+))?")
# docker/go-units, ulimit.go
LIMITS = (
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
)  # fmt: skip
UNLIMITED = -1
REGISTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?")  # host, port, path: distribution/reference

# ------------------------------------------------------------------------------------------------- variables and secrets


def environment_holds_no_secret(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A config is printed and recorded. For a secret it has only the name; the value comes from the launcher's environment."""
    for section, environment in (("cluster", config.cluster.environment), ("hardware", config.hardware.environment)):
        for name, value in environment.items():
            if names_a_secret(name) or holds_credentials(value):
                secrets = ",".join(dict.fromkeys((*config.cluster.secrets, name)))
                what = f"a secret in a config would be printed and recorded: remove it here, export {name}, and set cluster.secrets=[{secrets}]"
                yield Problem(key=f"{section}.environment.{name}", what=what)


def secrets_are_names(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    secrets = config.cluster.secrets
    wrong = sum(not VARIABLE.fullmatch(name) for name in secrets)
    if wrong:  # it may be the secret itself, so it is not printed
        kept = ",".join(name if VARIABLE.fullmatch(name) else "NAME" for name in secrets)
        what = f"holds names of environment variables, never their values; {wrong} of {len(secrets)} cannot be a name"
        yield Problem(key="cluster.secrets", what=what, changes=(f"cluster.secrets=[{kept}]",))


def urls_have_credentials(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A masked URL was copied from a printed command or from a record."""
    delivery = config.cluster.delivery
    for key, value in ((field.name, getattr(delivery, field.name)) for field in fields(delivery)):
        if isinstance(value, str) and is_masked(value):
            what = "the credentials were masked where this was printed: write them again"
            change = f"cluster.delivery.{key}={value.replace(MASK, 'USER:PASSWORD')}"
            yield Problem(key=f"cluster.delivery.{key}", what=what, changes=(change,))


# --------------------------------------------------------------------------------------------------------------- docker


def docker_accepts_the_settings(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.runtime != "docker":
        return
    if cluster.user and not USER.fullmatch(cluster.user):
        what = f"{cluster.user!r} is not UID:GID in digits; a user name can have another UID in the image than on the node"
        yield Problem(key="cluster.user", what=what, changes=("cluster.user=1000:1000",))
    if not SIZE.fullmatch(cluster.shm_size):
        what = f"{cluster.shm_size!r} is not a size that Docker accepts, as 16g"
        yield Problem(key="cluster.shm_size", what=what, changes=("cluster.shm_size=16g",))
    for name, what in (
        ("mounts", "a mount must be an absolute path on the nodes"),
        ("sync", "it must be an absolute path: files are copied to the same path on the nodes"),
    ):
        paths = getattr(cluster, name)
        if not all(path.startswith("/") for path in paths):
            relative = ", ".join(repr(path) for path in paths if not path.startswith("/"))
            kept = ",".join(path if path.startswith("/") else "/FOLDER" for path in paths)
            yield Problem(key=f"cluster.{name}", what=f"{relative}: {what}", changes=(f"cluster.{name}=[{kept}]",))


def ulimits_are_valid(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for name, value in config.cluster.ulimits.items() if config.cluster.runtime == "docker" else ():
        key, numbers = f"cluster.ulimits.{name}", LIMIT.fullmatch(value)
        if name not in LIMITS:
            yield Problem(key=key, what=f"Docker has no such limit; {suggest(name, LIMITS)}")
        elif numbers is None:
            what = f"{value!r} is neither a number nor SOFT:HARD; {UNLIMITED} means unlimited"
            yield Problem(key=key, what=what, changes=(f"{key}={UNLIMITED}",))
        else:
            soft, hard = int(numbers[1]), int(numbers[2] or numbers[1])
            if hard != UNLIMITED and (soft == UNLIMITED or soft > hard):
                yield Problem(key=key, what=f"the soft limit {soft} is above the hard limit {hard}", changes=(f"{key}={hard}:{soft}",))


def registry_is_set(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    delivery, key = config.cluster.delivery, "cluster.delivery.registry"
    if config.cluster.runtime != "docker" or delivery.kind != "pull":
        return
    if not delivery.registry:
        what = "is empty, but cluster.delivery.kind=pull pulls the image from your registry"
        yield Problem(key=key, what=what, changes=("cluster.delivery.kind=build",))
    elif not REGISTRY.fullmatch(delivery.registry):
        bare = re.sub(r"^\w+://|[^/]*@", "", delivery.registry).rstrip("/")
        changes = (f"{key}={bare}",) if REGISTRY.fullmatch(bare) else (f"{key}=HOST/path",)
        what = "is not HOST[:PORT][/path] as Docker accepts it: no scheme, no user (run docker login on the nodes), path in lower case"
        yield Problem(key=key, what=what, changes=changes)


CONTAINER_RULES: tuple[Rule, ...] = (
    environment_holds_no_secret,
    secrets_are_names,
    urls_have_credentials,
    docker_accepts_the_settings,
    ulimits_are_valid,
    registry_is_set,
)
