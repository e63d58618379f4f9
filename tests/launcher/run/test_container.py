"""The environment file of a container on its node."""

from pathlib import Path

from launcher.plan.commands import NodeCommand
from launcher.run.container import write_env_file
from launcher.ssh.transport import Local


def test_env_file_is_private_and_literal(tmp_path: Path) -> None:
    path = tmp_path / "node0.env"
    hostile = "a'b\"c $(id) `id` \\ #x = y"
    command = NodeCommand(
        host="a", node_rank=0, runtime="docker", name="c", folder=str(tmp_path), environment={"KEY": hostile}, prepare=(), start=()
    )
    write_env_file(command, Local({"PATH": "/usr/bin:/bin"}), str(path), waits_for=("HF_TOKEN", "B"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"KEY={hostile}\nOMNILAUNCH_SECRETS=HF_TOKEN B\n"
