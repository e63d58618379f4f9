"""The image on every node, by its id: nothing for a node that has it, one `docker save` here streamed to all that lack it. Where they are
many, it goes to the first few alone, and from those on.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from launcher.errors import ImageFailed, NodeFailed
from launcher.image.stack import LABEL
from launcher.plan.commands import is_absent
from launcher.run.delivery.peer_transfer import Peer, pass_on, share
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each, each, together
from launcher.ssh.transport import Result, Transport

# Served at once by one node, and by this machine when there are many. An engine takes in 70 MB/s (1.43 GB in 21 s), so that a link of 10
# Gbit/s feeds six with room to spare; and 6, 42, 294 nodes have it after one, two, three rounds.
FAN_OUT = 6
# Below, a second round takes longer than it saves: twelve times 1.43 GB through 1 Gbit/s take 140 s; six times take 70 s, a round 50 s.
MANY = 13
PIECES_AHEAD = 8  # of 256 KiB, for each node: the slowest node sets the pace, memory stays small
REPORT_BYTES = 256 * 2**20
LAST_LINES = 20  # of a command that failed
SAVE_TIMEOUT_S = 7200.0
LAYERS = "{{json .RootFS.Layers}}"
# Lines: the id, the fingerprint of the files it was built from, and each registry's digest of it.
PULLED = f'{{{{.Id}}}}{{{{println}}}}{{{{index .Config.Labels "{LABEL}fingerprint"}}}}{{{{range .RepoDigests}}}}{{{{println}}}}{{{{.}}}}{{{{end}}}}'


def ship(tag: str, image_id: str, peers: Sequence[Peer], source: Transport, say: Callable[[str], None]) -> None:
    """Have `tag` with `image_id` on every node. Raises NodeFailed, naming nodes, when one does not end up with that very id."""
    sent = Sent(id=image_id, layers=layers_on(source, tag))
    found = each(lambda peer: has(peer.site, tag, sent), peers)
    lacking = [peer for peer, there in zip(peers, found, strict=True) if not there]
    if not lacking:
        return
    first = lacking if len(lacking) < MANY else lacking[:FAN_OUT]
    waiting = lacking[len(first) :]
    say(f"sending {tag} to {hosts(first)}" + (f"; {len(waiting)} others get it from node to node" if waiting else ""))
    send_image(tag, first, source, say)
    unserved = spread(tag, sent, first, waiting, say) if waiting else ()
    if unserved:
        say(f"sending {tag} from here to {hosts(unserved)}, which no other node could serve")
        send_image(tag, unserved, source, say)
    require(tag, sent, [peer.site for peer in lacking])


def spread(tag: str, sent: "Sent", holders: Sequence[Peer], waiting: Sequence[Peer], say: Callable[[str], None]) -> tuple[Peer, ...]:
    """From those that have it to all others, in rounds; the nodes that did not get it. Who could serve nobody is asked no more: where a
    firewall stands between the nodes, the first round is the last."""
    unserved: list[Peer] = []
    while holders and waiting:
        shares = share(holders, waiting, FAN_OUT)
        taking = tuple(taker for _, takers in shares for taker in takers)
        say(f"  {len(shares)} node(s) serve {len(taking)} other(s), {len(waiting) - len(taking)} wait")
        failures = [failure for of_one in pass_on(tag, shares) for failure in of_one]
        arrived = attempt_each(lambda peer: has(peer.site, tag, sent), taking)
        served = {id(peer) for peer, there in zip(taking, arrived, strict=True) if there is True}
        useless = {id(holder) for holder, takers in shares if not any(id(taker) in served for taker in takers)}
        holders = (*(peer for peer in holders if id(peer) not in useless), *(peer for peer in taking if id(peer) in served))
        for peer, failure in zip(taking, failures, strict=True):
            if id(peer) not in served:
                say(f"  {failure or f'{peer.host} did not get the very image'}")
                unserved.append(peer)
        waiting = waiting[len(taking) :]
    return (*unserved, *waiting)


def send_image(tag: str, peers: Sequence[Peer], source: Transport, say: Callable[[str], None]) -> None:
    sent = send(("docker", "save", tag), ("docker", "load"), [peer.site for peer in peers], source, say)
    failures = [answer for answer in sent if isinstance(answer, NodeFailed)]
    if failures:
        raise together(failures, len(peers))


def hosts(peers: Sequence[Peer]) -> str:
    return ", ".join(peer.host for peer in peers)


def pull(tag: str, registry: str, sites: Sequence[WorkingNode], say: Callable[[str], None], *, fingerprint: str) -> None:
    """Each node that lacks `tag` takes it from `registry`, and knows it by its own name afterwards. Raises NodeFailed, naming the nodes
    whose image is not built from the plan's files, or is another one than the others have."""
    lacking = [site for site, found in zip(sites, each(lambda site: id_on(site, tag), sites), strict=True) if not found]
    reference = f"{registry.rstrip('/')}/{tag}"

    def take(site: WorkingNode) -> None:
        site.transport.run(("docker", "pull", "--quiet", reference), timeout_s=SAVE_TIMEOUT_S).expect(
            f"{site.command.host}: pulling {reference}"
        )
        site.transport.run(("docker", "tag", reference, tag)).expect(f"{site.command.host}: naming {reference}")

    if lacking:
        say(f"pulling {reference} on {', '.join(site.command.host for site in lacking)}")
        each(take, lacking)
    require_same(tag, reference, fingerprint, sites)


def is_everywhere(tag: str, fingerprint: str, sites: Sequence[WorkingNode]) -> bool:
    """Whether every node has one and the same image under the tag, built from the plan's files: then there is nothing to build, ask this
    machine's engine for, or send. Raises NodeFailed."""
    found = each(lambda site: image_on(site, tag), sites)
    return all(image is not None and image.fingerprint == fingerprint and image.id == (found[0] or image).id for image in found)


def require_same(tag: str, reference: str, fingerprint: str, sites: Sequence[WorkingNode]) -> None:
    """A tag can be pushed anew between two pulls. An engine with containerd's store has another id for the same image: there the digest in
    the registry says so."""
    pulled = each(lambda site: pulled_on(site, tag, reference), sites)
    mend = f"docker image rm {tag} {reference} there, and launch again"
    strange = [site.command.host for site, image in zip(sites, pulled, strict=True) if image.fingerprint != fingerprint]
    if strange:
        raise NodeFailed(f"{', '.join(strange)}: {tag} is not the plan's image (fingerprint {fingerprint[:12]}): push that one; {mend}")
    usual = max(pulled, key=lambda image: sum(image.is_same(other) for other in pulled))
    other = [f"{site.command.host} ({image.id[:19]})" for site, image in zip(sites, pulled, strict=True) if not image.is_same(usual)]
    if other:
        raise NodeFailed(f"{', '.join(other)} pulled another {reference} than the other node(s), which have {usual.id[:19]}: {mend}")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """`digest`: of the image in its registry, '' where the engine does not know it (any more)."""

    id: str
    fingerprint: str
    digest: str

    def is_same(self, other: "Pulled") -> bool:
        return self.id == other.id or bool(self.digest and self.digest == other.digest)


def pulled_on(site: WorkingNode, tag: str, reference: str) -> Pulled:
    image = image_on(site, tag, reference)
    if image is None:
        raise NodeFailed(f"{site.command.host}: {tag} is not there any more; launch again")
    return image


def image_on(site: WorkingNode, tag: str, reference: str = "") -> Pulled | None:
    """None where there is none. Raises NodeFailed where the engine does not answer."""
    told = site.transport.run(("docker", "image", "inspect", "--format", PULLED, tag))
    if is_absent(told.errors):
        return None
    told.expect(f"{site.command.host}: asking its Docker engine for {tag}")
    image_id, fingerprint, *digests = told.output.splitlines()
    name = reference.rpartition(":")[0]
    found = (digest.removeprefix(f"{name}@") for digest in digests if digest.startswith(f"{name}@"))
    return Pulled(id=image_id, fingerprint=fingerprint, digest=next(found, ""))


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The image here. `layers`: the digests of its unpacked layers as the engine lists them, '' where it does not."""

    id: str
    layers: str


def layers_on(transport: Transport, tag: str) -> str:
    return transport.run(("docker", "image", "inspect", "--format", LAYERS, tag)).output.strip()


def has(site: WorkingNode, tag: str, sent: Sent) -> bool:
    """By its id; or, where that differs, by what is in it: containerd's store, which new engines have since 29, calls an image by its manifest
    and the older one by its config (moby, daemon/containerd and daemon/images, image_inspect.go)."""
    there = id_on(site, tag)
    return there == sent.id or bool(there and sent.layers.startswith("[") and layers_on(site.transport, tag) == sent.layers)


def id_on(site: WorkingNode, tag: str) -> str:
    """The id of the node's image with this tag; '' when there is none."""
    found = site.transport.run(("docker", "image", "inspect", "--format", "{{.Id}}", tag))
    if found.code == 0:
        return found.output.strip()
    if is_absent(found.errors):
        return ""
    found.expect(f"{site.command.host}: asking its Docker engine for {tag}")
    return ""


def require(tag: str, sent: Sent, sites: Sequence[WorkingNode]) -> None:
    found = each(lambda site: has(site, tag, sent), sites)
    wrong = [site.command.host for site, there in zip(sites, found, strict=True) if not there]
    if wrong:
        raise NodeFailed(
            f"after sending, {', '.join(wrong)} does not have {tag} with id {sent.id[:19]}: send it again with the same command"
        )


def send(
    save: tuple[str, ...],
    load: tuple[str, ...],
    sites: Sequence[WorkingNode],
    source: Transport,
    say: Callable[[str], None],
    *,
    what: str = "the image",
    before_bytes: int = 0,
    total_bytes: int = 0,
) -> tuple[NodeFailed | None, ...]:
    """The output of `save` here as the input of `load` on every node, all at once; per node None or what went wrong there. A node that
    fails holds up no other. `before_bytes` and `total_bytes` (0: not known) are of a larger whole, for what is said. Raises ImageFailed
    when `save` itself fails, with no node having seen the end of its output."""
    whole = f" of {total_bytes / 1e9:.1f}" if total_bytes else ""
    pipes = [Pipe() for _ in sites]
    broken: list[NodeFailed] = []

    def read() -> None:
        try:
            read_into(pipes, save, source, lambda count: say(f"  {(before_bytes + count) / 1e9:.1f}{whole} GB"))
        except NodeFailed as error:
            broken.append(error)
            for pipe in pipes:
                pipe.fail(error)

    reader = threading.Thread(target=read, name="omnilaunch-save", daemon=True)
    reader.start()
    answers = attempt_each(lambda pair: feed(*pair, load, what), list(zip(sites, pipes, strict=True)))
    reader.join()
    if broken:
        raise ImageFailed(f"{what} could not be read on this machine: {broken[0]}")
    return answers


def read_into(pipes: Sequence["Pipe"], save: tuple[str, ...], source: Transport, report: Callable[[int], None]) -> None:
    with source.stream(save) as chunks:
        for count, chunk in counted(chunks):
            for pipe in pipes:
                pipe.put(chunk)
            if count:
                report(count)
    for pipe in pipes:
        pipe.put(b"")


def feed(site: WorkingNode, pipe: "Pipe", load: tuple[str, ...], what: str) -> None:
    try:
        done = site.transport.feed(load, pipe, timeout_s=SAVE_TIMEOUT_S)
        if done.code:
            raise NodeFailed(f"{site.command.host}: taking in {what} failed with exit code {done.code}:\n{tail_of(done)}")
    finally:
        pipe.close()


def tail_of(done: Result) -> str:
    """What a command said last."""
    return "\n".join((done.errors or done.output).strip().splitlines()[-LAST_LINES:])


def counted(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each chunk, and the bytes so far each time another REPORT_BYTES have gone by, else 0."""
    count, reported = 0, 0
    for chunk in chunks:
        count += len(chunk)
        due = count - reported >= REPORT_BYTES
        reported = count if due else reported
        yield (count if due else 0), chunk


class Pipe:
    """Bytes from the reader to one node. An empty piece is the end; closed by a node that has failed, it swallows the rest."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[bytes | NodeFailed] = queue.Queue(maxsize=PIECES_AHEAD)
        self.closed = threading.Event()

    def put(self, piece: bytes | NodeFailed) -> None:
        while not self.closed.is_set():
            with suppress(queue.Full):
                self.pieces.put(piece, timeout=0.2)
                return

    fail = put

    def close(self) -> None:
        self.closed.set()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            piece = self.pieces.get()
            if isinstance(piece, NodeFailed):
                raise piece
            if not piece:
                return
            yield piece
