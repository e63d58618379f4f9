"""An image from node to node, in rounds: every node that has it serves it to a few others, straight from its engine into theirs.

Nodes cannot log in to each other, and have nothing but sshd and Docker. So the one that has the image runs RELAY in a container of it,
which listens on the node's own address and says port and a token of one use to the launcher alone; the takers are told both over
SSH. What arrives is checked by its id afterwards, as if it had come from here.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import NodeFailed
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each

RELAY_LABEL = "omnilaunch.relay"
BEAT_S = 5  # between two signs of life of a relay
SILENCE_S = 45.0  # of a relay: its node is gone. As long as a node may be silent while it trains (cluster.node_timeout_s)
ADMISSION_S, CONNECT_S = 30, 15  # for all takers to come, and for one to connect: a firewall that drops packets says nothing
STALL_S = 120  # a taker that takes nothing for so long is left behind: the others wait meanwhile
LIMIT_S = 7200

# Arguments: address, number of takers. Stdin: what all of them are to get. Says `PORT TOKEN`, then the bytes so far, again and again.
RELAY = f"""
import hmac, os, secrets, socket, sys, threading, time
address, count = sys.argv[1], int(sys.argv[2])
ends, token, line = threading.Timer({LIMIT_S}, os._exit, (3,)), secrets.token_hex(32), 100
ends.daemon = True
ends.start()
server = socket.create_server((address, 0), family=socket.AF_INET6 if ':' in address else socket.AF_INET, backlog=count)
deadline, takers, lock, sent = time.monotonic() + {ADMISSION_S}, [], threading.Lock(), 0
def admit(peer):
    told = b''
    try:
        while not told.endswith(b'\\n') and len(told) < line:
            peer.settimeout(max(0.01, min(5, deadline - time.monotonic())))
            piece = peer.recv(line - len(told))
            if not piece:
                break
            told += piece
        good = hmac.compare_digest(told, token.encode() + b'\\n')
    except OSError:
        good = False
    with lock:
        if good and len(takers) < count:
            peer.settimeout({STALL_S})
            takers.append(peer)
            return
    peer.close()
def beat():
    while True:
        time.sleep({BEAT_S})
        print(sent, flush=True)
print(server.getsockname()[1], token, flush=True)
threading.Thread(target=beat, daemon=True).start()
server.settimeout(0.1)
pending = []
while len(takers) < count and time.monotonic() < deadline:
    try:
        peer = server.accept()[0]
    except TimeoutError:
        continue
    pending = [thread for thread in pending if thread.is_alive()]
    if len(pending) > 4 * count + 16:
        peer.close()
        continue
    pending.append(threading.Thread(target=admit, args=(peer,), daemon=True))
    pending[-1].start()
server.close()
with lock:
    served, count = list(takers), 0
while served and (piece := sys.stdin.buffer.read1(1 << 20)):
    for peer in list(served):
        try:
            peer.sendall(piece)
        except OSError:
            served.remove(peer)
            peer.close()
    sent += len(piece)
for peer in served:
    peer.close()
print(sent, flush=True)
sys.exit(0 if served else 'no other node came, or all of them left')
"""
# Arguments: tag, RELAY, label, then what RELAY takes.
SERVE = """set -o pipefail
docker save "$1" | docker run -i --rm --log-driver none --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
  --label "$3" --entrypoint python "$1" -c "$2" "${@:4}"
"""
# Arguments: address, port, seconds to connect in, which bash itself has no limit for. Stdin: the token.
TAKE = """set -o pipefail
read -r token
timeout "$3" bash -c 'exec 3<>"/dev/tcp/$1/$2"' take "$1" "$2" || { echo "cannot connect to $1 port $2" >&2; exit 1; }
exec 3<>"/dev/tcp/$1/$2" || exit 1
printf '%s\\n' "$token" >&3
cat <&3 | docker load
"""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A node, and the address at which the others reach it."""

    site: WorkingNode
    address: str

    @property
    def host(self) -> str:
        return self.site.command.host


def share(holders: Sequence[Peer], waiting: Sequence[Peer], fan_out: int) -> tuple[tuple[Peer, tuple[Peer, ...]], ...]:
    """Who serves whom in one round: at most `fan_out` takers a holder, as evenly as can be."""
    taking = waiting[: len(holders) * fan_out]
    return tuple((holder, tuple(taking[place :: len(holders)])) for place, holder in enumerate(holders[: len(taking)]))


def pass_on(tag: str, shares: Sequence[tuple[Peer, Sequence[Peer]]]) -> tuple[tuple[NodeFailed | None, ...], ...]:
    """One round, all holders side by side: for each of them, and in it for each of its takers, None or what went wrong. A holder that
    fails or falls silent fails its own takers and no others."""
    answers = attempt_each(lambda pair: serve(tag, *pair), shares)
    return tuple(
        (answer,) * len(takers) if isinstance(answer, NodeFailed) else answer for answer, (_, takers) in zip(answers, shares, strict=True)
    )


def serve(tag: str, holder: Peer, takers: Sequence[Peer]) -> tuple[NodeFailed | None, ...]:
    """Raises NodeFailed when the holder's relay does not come up."""
    argv = ("bash", "-c", SERVE, "bash", tag, RELAY, f"{RELAY_LABEL}={tag}", holder.address, str(len(takers)))
    call = Call()

    def listen() -> None:
        failure: NodeFailed | None = NodeFailed(f"{holder.host}: its relay was not followed to its end")
        try:
            with holder.site.transport.stream(argv, silence_s=SILENCE_S) as chunks:
                for chunk in chunks:
                    call.hear(chunk)
            failure = None
        except NodeFailed as error:
            failure = NodeFailed(f"{holder.host} could not serve {tag}: {without(argv, error)}")
        finally:
            call.end(failure)

    threading.Thread(target=listen, name="omnilaunch-relay", daemon=True).start()
    port, token = call.place()
    return attempt_each(lambda taker: take(taker, holder, port, token, call), takers)


def take(taker: Peer, holder: Peer, port: str, token: str, call: "Call") -> None:
    argv = ("bash", "-c", TAKE, "bash", holder.address, port, str(CONNECT_S))
    whence = f"{taker.host} could not take the image from {holder.host} at {holder.address}"

    def stdin() -> Iterator[bytes]:
        """The token, and no end before the relay's: when that has failed, the taker is killed and does not wait for ever."""
        yield token.encode() + b"\n"
        call.wait()

    try:
        done = taker.site.transport.feed(argv, stdin(), timeout_s=LIMIT_S)
    except NodeFailed as error:
        raise NodeFailed(f"{whence}: {without(argv, error)}") from error
    if done.code:
        said = "\n".join(done.errors.strip().splitlines()[-3:])
        raise NodeFailed(f"{whence}: {said or f'exit code {done.code}'}")


def without(argv: tuple[str, ...], error: NodeFailed) -> str:
    """What an error says, without a script of eighty lines in it."""
    return str(error).replace(" ".join(argv), "docker save | docker run" if argv[2] == SERVE else "docker load").strip()


class Call:
    """What the launcher hears of one relay, and who waits for it."""

    def __init__(self) -> None:
        self.first: queue.Queue[str | NodeFailed] = queue.Queue()
        self.over = threading.Event()
        self.failure: NodeFailed | None = None
        self.heard = b""

    def hear(self, chunk: bytes) -> None:
        """Its first line is for `place`; the others only say that it lives."""
        if b"\n" not in self.heard:
            self.heard += chunk
            if b"\n" in self.heard:
                self.first.put(self.heard.partition(b"\n")[0].decode(errors="replace"))

    def end(self, failure: NodeFailed | None) -> None:
        self.failure = failure
        self.first.put(failure or NodeFailed("its relay ended before it began"))
        self.over.set()

    def place(self) -> tuple[str, str]:
        """Port and token. Raises NodeFailed when the relay ends, or falls silent, without them."""
        told = self.first.get()
        if isinstance(told, NodeFailed):
            raise told
        port, _, token = told.partition(" ")
        if not (port.isdigit() and token.isalnum()):
            raise NodeFailed(f"a relay said {told[:80]!r} in place of its port")
        return port, token

    def wait(self) -> None:
        """Until the relay has ended. Raises NodeFailed when it failed."""
        self.over.wait()
        if self.failure:
            raise self.failure
