"""A docker client that starts nothing: it records its arguments, and answers like an engine that has no image."""

from pathlib import Path

INFO = '{"ServerVersion":"27.5.1","Driver":"overlay2","Runtimes":{"runc":{}},"DockerRootDir":"/"}'
SCRIPT = """#!/bin/sh
{{ printf '%s\\0' "$#" "$@"; }} >>'{calls}'
word=
for next; do
  if [ "$word" = --env-file ]; then cp -- "$next" '{folder}/env'; fi
  word=$next
done
case "$1" in
  info) echo '{info}' ;;
  --version) echo "Docker version 27.5.1, build 9f9e405" ;;
  ps) ;;
  image) exit 1 ;;
esac
"""


class FakeDocker:
    """`folder`: for PATH."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.calls = folder, folder / "calls"
        program = folder / "docker"
        program.write_text(SCRIPT.format(calls=self.calls, folder=folder, info=INFO))
        program.chmod(0o755)

    def commands(self) -> list[tuple[str, ...]]:
        """The arguments of each call, in their order."""
        words = self.calls.read_bytes().decode().split("\0")[:-1] if self.calls.exists() else []
        calls = []
        while words:
            count = int(words[0])
            calls.append(tuple(words[1 : count + 1]))
            words = words[count + 1 :]
        return calls

    @property
    def environment(self) -> str:
        """The text of the environment file of the last call."""
        return (self.folder / "env").read_bytes().decode()
