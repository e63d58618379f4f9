"""The image on every node, by its id: nothing for a node that has it, one `docker save` here streamed to all that lack it."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from launcher.errors import ImageFailed, NodeFailed
from launcher.fleet import attempt_each, each, together
from launcher.node import Site
from launcher.transport import Transport

PIECES_AHEAD = 8  # of 256 KiB, for each node: the slowest node sets the pace, memory stays small
REPORT_BYTES = 256 * 2**20
SAVE_TIMEOUT_S = 7200.0


def ship(tag: str, image_id: str, sites: Sequence[Site], source: Transport, say: Callable[[str], None]) -> None:
    """Have `tag` with `image_id` on every node. Raises NodeFailed, naming nodes, when one does not end up with that very id."""
    lacking = [site for site, found in zip(sites, each(lambda site: id_on(site, tag), sites), strict=True) if found != image_id]
    if not lacking:
        return
    names = ", ".join(site.command.host for site in lacking)
    say(f"sending {tag} to {names}")
    sent = send(("docker", "save", tag), ("docker", "load"), lacking, source, say)
    failures = [answer for answer in sent if isinstance(answer, NodeFailed)]
    if failures:
        raise together(failures, len(lacking))
    require(tag, image_id, lacking)


def pull(tag: str, registry: str, sites: Sequence[Site], say: Callable[[str], None]) -> None:
    """Each node that lacks `tag` takes it from `registry`, and knows it by its own name afterwards."""
    lacking = [site for site, found in zip(sites, each(lambda site: id_on(site, tag), sites), strict=True) if not found]
    reference = f"{registry.rstrip('/')}/{tag}"

    def take(site: Site) -> None:
        site.transport.run(("docker", "pull", "--quiet", reference), timeout_s=SAVE_TIMEOUT_S).expect(
            f"{site.command.host}: pulling {reference}"
        )
        site.transport.run(("docker", "tag", reference, tag)).expect(f"{site.command.host}: naming {reference}")

    if lacking:
        say(f"pulling {reference} on {', '.join(site.command.host for site in lacking)}")
        each(take, lacking)


def id_on(site: Site, tag: str) -> str:
    """The id of the node's image with this tag; '' when there is none."""
    found = site.transport.run(("docker", "image", "inspect", "--format", "{{.Id}}", tag))
    if found.code == 0:
        return found.output.strip()
    if "No such image" in found.errors:
        return ""
    found.expect(f"{site.command.host}: asking its Docker engine for {tag}")
    return ""


def require(tag: str, image_id: str, sites: Sequence[Site]) -> None:
    wrong = [site.command.host for site in sites if id_on(site, tag) != image_id]
    if wrong:
        raise NodeFailed(
            f"after sending, {', '.join(wrong)} does not have {tag} with id {image_id[:19]}: send it again with the same command"
        )


def send(
    save: tuple[str, ...], load: tuple[str, ...], sites: Sequence[Site], source: Transport, say: Callable[[str], None]
) -> tuple[NodeFailed | None, ...]:
    """The output of `save` here as the input of `load` on every node, all at once; per node None or what went wrong there. A node that
    fails holds up no other. Raises ImageFailed when `save` itself fails, with no node having seen a whole image."""
    pipes = [Pipe() for _ in sites]
    broken: list[NodeFailed] = []

    def read() -> None:
        try:
            with source.stream(save) as chunks:
                for count, chunk in counted(chunks):
                    for pipe in pipes:
                        pipe.put(chunk)
                    if count:
                        say(f"  {count / 1e9:.1f} GB")
            for pipe in pipes:
                pipe.put(b"")
        except NodeFailed as error:
            broken.append(error)
            for pipe in pipes:
                pipe.fail(error)

    def feed(pair: tuple[Site, "Pipe"]) -> None:
        site, pipe = pair
        try:
            site.transport.feed(load, pipe, timeout_s=SAVE_TIMEOUT_S).expect(f"{site.command.host}: loading the image")
        finally:
            pipe.close()

    reader = threading.Thread(target=read, name="omnilaunch-save", daemon=True)
    reader.start()
    answers = attempt_each(feed, list(zip(sites, pipes, strict=True)))
    reader.join()
    if broken:
        raise ImageFailed(f"the image could not be read from the engine here: {broken[0]}")
    return answers


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
