"""cluster.sync copies files to nodes that are folders of this machine, with the real find, tar and mv; names that a shell would misread."""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigRefused, NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.run.delivery import sync as module
from launcher.run.delivery.sync import INCOMING, batches, sync
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local, Result
from tests.launcher.fake_nodes import DATA, HOSTS, PlanFor, Said, examined, found, healthy_nodes
from tests.launcher.hostile import hostile

ENVIRON = {"PATH": os.environ["PATH"]}
TOKEN = "run-1"
NAMES = (
    b"plain.json",
    b"with space.txt",
    b"new\nline",
    b"-rf",
    b"--files-from=x",
    b"\xff\xfe not utf-8",
    b"'$(touch C)`touch C`\"*",
    b".hidden",
    b"..two",
    b"deep/er/-C",
    b"tab\there",
)


class Rooted(Local):
    """A node that is a folder of this machine: /FOLDER on it is `root`/FOLDER here. `fed`: bytes that were sent to it; `cut`: after so many
    bytes the connection breaks; `listed`: how often its names were fetched."""

    def __init__(self, host: str, shared: Path, root: Path) -> None:
        super().__init__(ENVIRON, host)
        self.shared, self.root, self.fed, self.cut, self.listed = shared, root, 0, 0, 0

    def here(self, argv: Iterable[str]) -> tuple[str, ...]:
        return tuple(str(self.root) + word if word.startswith(str(self.shared)) else word for word in argv)

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        return super().run(self.here(argv), **options)

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                self.fed += len(chunk)
                yield chunk
                if self.cut and self.fed > self.cut:
                    raise NodeFailed(f"{self.host}: lost the connection")

        return super().feed(self.here(argv), counted(), timeout_s=timeout_s)

    @contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        self.listed += 1
        with super().stream(self.here(argv), silence_s=silence_s) as chunks:
            yield chunks


class Lab:
    """`data`: a folder of the launcher's machine. `there(rank)`: the same folder on a node."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.data, self.folder = folder / "data", folder
        self.data.mkdir()
        self.source = Local(ENVIRON)
        self.nodes = [Rooted(f"host{rank}", folder, self.root(rank)) for rank in range(count)]
        self.sites = tuple(WorkingNode(command=command(node.host, rank), transport=node) for rank, node in enumerate(self.nodes))
        self.said: list[str] = []

    def root(self, rank: int) -> Path:
        root = self.folder / f"n{rank}"
        root.mkdir(exist_ok=True)
        return root

    def there(self, rank: int) -> Path:
        return Path(str(self.root(rank)) + str(self.data))

    def write(self, name: bytes, size: int = 1000) -> Path:
        path = Path(os.fsdecode(os.fsencode(self.data) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((name + bytes(range(256))) * (size // 200) + name)
        return path

    def sync(self, *paths: Path | str) -> None:
        for node in self.nodes:
            node.fed = node.listed = 0
        self.said.clear()
        sync([str(path) for path in paths or (self.data,)], self.sites, self.source, self.said.append, token=TOKEN)

    def same(self, rank: int) -> bool:
        return contents(self.there(rank)) == contents(self.data)


def command(host: str, rank: int) -> NodeCommand:
    return NodeCommand(host=host, node_rank=rank, runtime="docker", name="c", folder="/run", environment={}, prepare=(), start=())


def contents(folder: Path) -> dict[bytes, bytes]:
    """Content of every file, links followed, by its name as bytes."""
    top = os.fsencode(folder)
    return {
        os.path.join(root, name).removeprefix(top): Path(os.fsdecode(os.path.join(root, name))).read_bytes()  # noqa: PTH118  # bytes
        for root, _, names in os.walk(top, followlinks=True)
        for name in names
    }


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_names_arrive_byte_equal_and_nothing_is_sent_twice(lab: Lab) -> None:
    words = {word.replace("/", "|").encode()[:200] for word in hostile(120)} - {b"", b".", b".."}
    for name in (*NAMES, *words):
        lab.write(name)
    lab.sync()
    assert len(contents(lab.data)) > 60
    assert [lab.same(rank) for rank in range(3)] == [True] * 3
    assert f"of {lab.data} to host0, host1, host2" in lab.said[0]
    assert not list(lab.folder.rglob("C")), "nothing of a name was executed"
    lab.sync()
    assert not lab.said and not any(node.fed or node.listed for node in lab.nodes)


def test_only_what_a_node_lacks_is_sent_and_nothing_is_removed(lab: Lab) -> None:
    for name in (b"a", b"b/c", b"b/d"):
        lab.write(name, 50_000)
    lab.sync()
    (lab.there(1) / "b" / "c").unlink()
    (lab.there(1) / "own").write_text("the node's", encoding="utf-8")
    lab.write(b"b/new")
    lab.sync()
    assert "copying 2 files" in lab.said[0]
    assert (lab.there(1) / "own").read_text(encoding="utf-8") == "the node's"
    (lab.there(1) / "own").unlink()
    assert [lab.same(rank) for rank in range(3)] == [True] * 3
    assert max(node.fed for node in lab.nodes) < 90_000, "a was not sent again"


def test_another_file_with_the_same_name_is_refused_before_anything_is_sent(lab: Lab) -> None:
    for number in range(5):
        lab.write(b"file%d" % number)
        other = lab.there(1) / f"file{number}"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"mine")
    with pytest.raises(NodeFailed, match="host1 has other files with these names; nothing was copied") as caught:
        lab.sync()
    assert f"{lab.data}/file0: 4 bytes there" in str(caught.value) and "and 2 more" in str(caught.value)
    assert (lab.there(1) / "file0").read_bytes() == b"mine"
    assert not any(node.fed for node in lab.nodes) and not contents(lab.there(0))


def make_old(path: Path) -> None:
    two_days_ago = time.time() - 2 * 86400
    os.utime(path, (two_days_ago, two_days_ago))


def test_a_cut_connection_leaves_no_half_file_and_the_next_launch_completes_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1_000_000)
    for number in range(6):
        lab.write(b"part%d" % number, 900_000)
    lab.nodes[2].cut = 2_200_000  # in the middle of the third
    with pytest.raises(NodeFailed, match="host2: lost the connection"):
        lab.sync()
    arrived = {name: content for name, content in contents(lab.there(2)).items() if INCOMING.encode() not in name}
    assert {name: content for name, content in contents(lab.data).items() if name in arrived} == arrived and 1 <= len(arrived) < 6
    lab.nodes[2].cut = 0
    for left in lab.there(2).glob(f"{INCOMING}.*"):
        make_old(left)
    lab.sync()
    assert [lab.same(rank) for rank in range(3)] == [True] * 3
    assert 0 < lab.nodes[2].fed < 6_500_000, "what had arrived whole was not sent again"


def test_remains_of_an_interrupted_copy_are_never_used(lab: Lab) -> None:
    lab.write(b"a")
    old, new = (lab.there(0) / f"{INCOMING}.{name}" for name in ("abc123", "def456"))
    for left in (old, new):
        left.mkdir(parents=True)
        (left / "a").write_bytes(b"half")
        (left / "stranger").write_bytes(b"x")
    make_old(old)
    lab.sync()
    assert not old.exists()
    assert (new / "a").read_bytes() == b"half", "another launcher may be at it"
    shutil.rmtree(new)
    assert lab.same(0)


def test_a_single_file_and_links_arrive_as_their_content(lab: Lab) -> None:
    blob = lab.write(b"blobs/0123")
    (lab.data / "snapshot").mkdir()
    (lab.data / "snapshot" / "model.safetensors").symlink_to(blob)
    single = lab.write(b"one/train.json")
    lab.write(b"one/other.json")
    lab.sync(lab.data / "snapshot", single)
    assert (lab.there(0) / "snapshot" / "model.safetensors").read_bytes() == blob.read_bytes()
    assert not (lab.there(0) / "snapshot" / "model.safetensors").is_symlink()
    assert os.listdir(lab.there(0) / "one") == ["train.json"]  # noqa: PTH208
    lab.sync(lab.data / "snapshot", single)
    assert not lab.said


def test_a_folder_that_nodes_share_is_copied_to_once(lab: Lab) -> None:
    lab.write(b"a", 50_000)
    lab.nodes[2].root = lab.nodes[1].root
    lab.sync()
    assert [bool(node.fed) for node in lab.nodes] == [True, True, False]
    assert lab.same(0) and lab.same(1)
    assert not list(lab.folder.rglob(f".omnilaunch-{TOKEN}-*")), "no mark stays"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data", "'data' is not an absolute path"),
        ("~/data", "is not an absolute path"),
        ("//", "is not an absolute path"),
        ("/nowhere/data", "/nowhere/data cannot be read on this machine.*No such file"),
    ],
)
def test_a_path_that_cannot_be_copied_is_refused(lab: Lab, path: str, words: str) -> None:
    with pytest.raises(ConfigRefused, match=words):
        lab.sync(path)


def test_an_empty_folder_and_a_dangling_link_are_refused(lab: Lab) -> None:
    with pytest.raises(ConfigRefused, match="there is no file below"):
        lab.sync()
    (lab.data / "link").symlink_to("/nowhere/at/all")
    with pytest.raises(ConfigRefused, match=r"the target of the link .*/data/link does not exist"):
        lab.sync()


def test_a_node_without_room_or_with_a_file_in_the_way_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.write(b"a")
    lab.there(1).parent.mkdir(parents=True)
    lab.there(1).write_text("a file in the way", encoding="utf-8")
    with pytest.raises(NodeFailed, match=r"host1: cluster\.sync cannot write to .*(.|\n)*sudo install -d -o USER"):
        lab.sync()
    lab.there(1).unlink()
    monkeypatch.setattr(module, "GIB", 1e-6)
    with pytest.raises(NodeFailed, match="are free there"):
        lab.sync()
    assert not any(node.fed for node in lab.nodes)


def test_the_doctor_accepts_missing_files_that_cluster_sync_names(plan_for: PlanFor) -> None:
    missing: dict[str, str | Said] = {"content2": (1, "", "ls: cannot access /d/images")}
    for words, level in (((), "error"), (("cluster.sync=[/d]",), "ok"), (("cluster.sync=[/d/image]",), "error")):
        plan = plan_for(*DATA, *words)
        finding = found(examined(plan, healthy_nodes(plan, second=missing)), "contents", HOSTS[1])
        assert finding.level == level
        assert "/d/images" in finding.evidence and ("cluster.sync" in finding.fix or "cluster.sync" in finding.evidence)


def test_batches_hold_every_name_once() -> None:
    sizes = {b"%03d" % number: 2**28 for number in range(9)} | {b"big": 2**33}
    made = list(batches(sorted(sizes), sizes))
    assert [name for batch in made for name in batch] == sorted(sizes)
    assert [len(batch) for batch in made] == [4, 4, 1, 1]
