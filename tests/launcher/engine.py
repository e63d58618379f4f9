"""Nodes with a Docker engine that are folders of this machine: their `docker` keeps one image as a file. Streams, sockets and Python are
real, so that the tests see what is sent to whom, and what follows from a failure."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from launcher.plan.commands import NodeCommand
from launcher.run.delivery.peer_transfer import Peer
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local, Result

# `$HOME` is the engine. Files in it make it fail: `half` (its save breaks off), `mute` (its containers print nothing), `full` (no load).
# Like a real engine, a load changes nothing when the end of the stream is missing.
DOCKER = f"""#!/bin/sh
case "$1" in
  save) if [ -f "$HOME/half" ]; then head -c 300000 "$HOME/image"; exit 1; fi; cat "$HOME/image" ;;
  load) cat >"$HOME/part"; [ ! -f "$HOME/full" ] || {{ echo "no space left on device" >&2; exit 1; }}
    [ "$(tail -c 3 "$HOME/part")" = END ] || {{ echo "unexpected EOF" >&2; exit 1; }}; mv "$HOME/part" "$HOME/image" ;;
  image) [ -f "$HOME/image" ] || {{ echo "Error: No such image" >&2; exit 1; }}
    printf '{{"Id":"sha256:%s"}}\\n' "$(sha256sum <"$HOME/image" | cut -d" " -f1)" ;;
  run) echo "$@" >>"$HOME/runs"; echo $$ >>"$HOME/pids"
    [ ! -f "$HOME/mute" ] || exec sleep 60
    while [ "$1" != -c ]; do shift; done; exec {sys.executable} "$@" ;;
esac
"""


class Engine(Local):
    """A machine whose engine is `home`. `fed`: bytes that the launcher sent to it."""

    def __init__(self, host: str, home: Path, programs: Path) -> None:
        super().__init__({"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)}, host)
        self.home, self.fed = home, 0

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                self.fed += len(chunk)
                yield chunk

        return super().feed(argv, counted(), timeout_s=timeout_s)


class EngineCluster:
    """The launcher's machine with an image, and nodes without it, each on an address of its own."""

    def __init__(self, folder: Path, count: int, size: int = 1_000_000) -> None:
        programs = folder / "programs"
        programs.mkdir()
        (programs / "docker").write_text(DOCKER, encoding="utf-8")
        (programs / "docker").chmod(0o755)
        self.image = os.urandom(size) + b"END"
        self.source = self.machine("here", folder, programs)
        (self.source.home / "image").write_bytes(self.image)
        self.engines = [self.machine(f"host{rank}", folder, programs) for rank in range(count)]
        self.peers = tuple(
            Peer(node=WorkingNode(command=command(engine.host, rank), transport=engine), address=f"127.0.1.{rank + 1}")
            for rank, engine in enumerate(self.engines)
        )

    def machine(self, host: str, folder: Path, programs: Path) -> Engine:
        (folder / host).mkdir()
        return Engine(host, folder / host, programs)

    def ranks_with_image(self) -> list[int]:
        """Ranks that have the complete image."""
        return [rank for rank, engine in enumerate(self.engines) if self.has_image(engine)]

    def has_image(self, engine: Engine) -> bool:
        return (engine.home / "image").exists() and (engine.home / "image").read_bytes() == self.image

    def end(self) -> None:
        """End the containers that a test left stopped."""
        for path in (engine.home / "pids" for engine in self.engines):
            for pid in path.read_text(encoding="utf-8").split() if path.exists() else ():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def break_(self, rank: int, how: str) -> None:
        (self.engines[rank].home / how).touch()

    def sent(self) -> float:
        """What the launcher's machine sent, in images."""
        return sum(engine.fed for engine in self.engines) / len(self.image)


def command(host: str, rank: int) -> NodeCommand:
    return NodeCommand(host=host, node_rank=rank, runtime="docker", name="c", folder="/run", environment={}, prepare=(), start=())
