"""What the launcher does with a run's containers on one node: their environment files and secrets before the start, their removal after it."""

import time
from collections.abc import Mapping

from launcher.errors import NodeFailed
from launcher.image.docker import is_absent
from launcher.plan.commands import NodeCommand, data_env_file, data_name, env_file, env_lines
from launcher.ssh.transport import Transport

NO_CONTAINER = "no container"
POLL_S = 0.5
REMOVAL_S = 5.0  # for a container to disappear after `docker rm`; another client may be removing it at the same time
SECRETS_VARIABLE = "OMNILAUNCH_SECRETS"  # both are read by images/entrypoint.sh
SECRETS_PIPE = "/dev/shm/omnilaunch-secrets"


def write_env_file(command: NodeCommand, transport: Transport, path: str, *, waits_for: tuple[str, ...] = ()) -> None:
    """Write `KEY=value` lines as `docker run --env-file` reads them: no quotes, the rest of the line is the value. Mode 0600; the file exists only
    while a docker client reads it. It has the names of the secrets (`waits_for`) but not their values: the container waits for those."""
    waiting = {SECRETS_VARIABLE: " ".join(waits_for)} if waits_for else {}
    transport.put(env_lines({**command.environment, **waiting}).encode(), path, mode=0o600)


def remove_env_file(transport: Transport, path: str) -> None:
    transport.run(("rm", "-f", "--", path))


def send_secrets(command: NodeCommand, transport: Transport, secrets: Mapping[str, str]) -> None:
    """Write the secrets to a pipe in the container's memory, where entrypoint.sh reads them in this order. So they are in no file, no argv and
    not in `docker inspect`."""
    inside, what = ("docker", "exec", "--interactive", command.name), f"{command.host}: sending the secrets to container {command.name}"
    transport.run((*inside, "mkfifo", "-m", "600", SECRETS_PIPE))  # fails when the container has made the pipe already
    values = "".join(f"{value}\0" for value in secrets.values()).encode()
    transport.feed((*inside, "dd", f"of={SECRETS_PIPE}", "conv=nocreat,notrunc", "status=none"), (values,), timeout_s=60).expect(what)


def clear_node(command: NodeCommand, transport: Transport) -> None:
    """Remove the containers of the ranks and of the data check, and their environment files. Raises NodeFailed when a container stays."""
    for path in (env_file, data_env_file):
        remove_env_file(transport, path(command.folder, command.node_rank))
    remove_containers(command, transport, command.name, data_name(command.name), verify=True)


def remove_containers(command: NodeCommand, transport: Transport, *names: str, verify: bool = False) -> None:
    """End and remove these containers of a node; a container that does not exist is no error. Raises NodeFailed with docker's own words when one
    still exists REMOVAL_S after `docker rm` failed. `verify`: look also when it succeeded."""
    removed = transport.run(("docker", "rm", "--force", *names))
    if removed.code == 0 and not verify:
        return
    deadline = time.monotonic() + REMOVAL_S
    while existing := existing_containers(command, transport, *names):
        if time.monotonic() > deadline:
            silent = "docker rm succeeded, but it is still there" if removed.code == 0 else f"docker rm exited with code {removed.code}"
            said = "; ".join(line for line in removed.errors.splitlines() if line.strip()) or silent
            raise NodeFailed(
                f"{command.host}: container {', '.join(existing)} could not be removed: {said}\n"
                f"  Next: ssh {command.host} docker rm --force {' '.join(existing)}"
            )
        time.sleep(min(POLL_S, REMOVAL_S))


def existing_containers(command: NodeCommand, transport: Transport, *names: str) -> list[str]:
    """Which of these names the node's engine has. Raises NodeFailed when the engine does not respond."""
    listed = transport.run(("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^({'|'.join(names)})$"))
    found = listed.expect(f"{command.host}: listing the containers of the run").output.split()
    return [name for name in names if name in found]


def container_state(command: NodeCommand, transport: Transport) -> str:
    """`<status> <exit code>` of the ranks' container, or NO_CONTAINER. Raises NodeFailed when the engine does not respond."""
    found = transport.run(command.probe)
    if found.code == 0:
        return found.output.strip()
    if is_absent(found.errors):
        return NO_CONTAINER
    raise NodeFailed(f"{command.host}: its Docker engine does not respond: {found.errors.strip()}")
