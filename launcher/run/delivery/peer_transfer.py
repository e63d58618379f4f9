"""An image from node to node: a node that has it sends it from its engine straight into the engines of a few others.

Nodes cannot log in to each other, and have nothing but sshd and Docker. So the sender runs node_scripts/serve_image.py in a container of
the image. It listens on the node's own address and prints its port and a token for this one transfer; the launcher passes both to the
receivers over SSH. The received image is checked by its id afterwards, like one that was sent from here.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from launcher.errors import NodeFailed
from launcher.run.delivery.broadcast import LIMIT_S
from launcher.run.delivery.script import read_script
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each

SERVER_LABEL = "omnilaunch.relay"  # of the container that sends
PROGRESS_S = 5  # between two lines of a sender
SILENCE_S = 45.0  # without a line of a sender: its node is lost. As long as a node may be silent while it trains (cluster.node_timeout_s)
ADMISSION_S = 30  # for all receivers to connect
CONNECT_S = 15  # for one receiver to connect: a firewall may drop packets without an answer
STALL_S = 120  # a receiver that takes nothing for so long is left out, since the others wait for it


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A node, and the address at which the other nodes reach it."""

    node: WorkingNode
    address: str

    @property
    def host(self) -> str:
        return self.node.command.host


def assign_receivers(holders: Sequence[Peer], waiting: Sequence[Peer], fan_out: int) -> tuple[tuple[Peer, tuple[Peer, ...]], ...]:
    """Sender and receivers of one round: at most `fan_out` receivers for each node that has the image, spread evenly."""
    receivers = waiting[: len(holders) * fan_out]
    return tuple((holder, tuple(receivers[index :: len(holders)])) for index, holder in enumerate(holders[: len(receivers)]))


def transfer_round(tag: str, assigned: Sequence[tuple[Peer, Sequence[Peer]]]) -> tuple[tuple[NodeFailed | None, ...], ...]:
    """One round, all senders at the same time. For each sender, and in it for each of its receivers, None or the error. A sender that
    fails or stops responding fails its own receivers and no others."""
    answers = attempt_each(lambda pair: send_from(tag, *pair), assigned)
    return tuple(
        (answer,) * len(receivers) if isinstance(answer, NodeFailed) else answer
        for answer, (_, receivers) in zip(answers, assigned, strict=True)
    )


def send_from(tag: str, sender: Peer, receivers: Sequence[Peer]) -> tuple[NodeFailed | None, ...]:
    """Raises NodeFailed when the sender's container does not start to listen."""
    limits = map(str, (len(receivers), ADMISSION_S, PROGRESS_S, STALL_S, LIMIT_S))
    names = ("bash", tag, read_script("serve_image.py"), f"{SERVER_LABEL}={tag}", sender.address)
    argv = ("bash", "-c", read_script("serve_image.sh"), *names, *limits)
    endpoint: Future[tuple[str, str]] = Future()
    ended: Future[None] = Future()

    def follow() -> None:
        """Port and token are the first line; the other lines only show that the sender is alive."""
        head = b""
        failure: NodeFailed | None = NodeFailed(f"{sender.host}: the output of its sending container was not read to its end")
        try:
            with sender.node.transport.stream(argv, silence_s=SILENCE_S) as chunks:
                for chunk in chunks:
                    head += b"" if b"\n" in head else chunk
                    if b"\n" in head and not endpoint.done():
                        endpoint.set_result(read_endpoint(head.partition(b"\n")[0].decode(errors="replace")))
            failure = None
        except NodeFailed as error:
            failure = NodeFailed(f"{sender.host} could not serve {tag}: {without_scripts(argv, error, 'docker save | docker run')}")
        finally:
            if not endpoint.done():
                endpoint.set_exception(failure or NodeFailed(f"{sender.host}: its sending container ended before it printed its port"))
            ended.set_exception(failure) if failure else ended.set_result(None)

    threading.Thread(target=follow, name="omnilaunch-peer-transfer", daemon=True).start()
    port, token = endpoint.result()
    return attempt_each(lambda receiver: receive(receiver, sender, port, token, ended), receivers)


def read_endpoint(line: str) -> tuple[str, str]:
    port, _, token = line.partition(" ")
    if not (port.isdigit() and token.isalnum()):
        raise NodeFailed(f"its container printed {line[:80]!r} in place of its port")
    return port, token


def receive(receiver: Peer, sender: Peer, port: str, token: str, ended: Future[None]) -> None:
    """`ended`: is done when the sender has sent everything, or has failed."""
    argv = ("bash", "-c", read_script("receive_image.sh"), "bash", sender.address, port, str(CONNECT_S))
    what = f"{receiver.host} could not receive the image from {sender.host} at {sender.address}"

    def stdin() -> Iterator[bytes]:
        """The token. The end follows when the sender has ended; if that failed, this raises, and the receiver is killed."""
        yield token.encode() + b"\n"
        ended.result()

    try:
        done = receiver.node.transport.feed(argv, stdin(), timeout_s=LIMIT_S)
    except NodeFailed as error:
        raise NodeFailed(f"{what}: {without_scripts(argv, error, 'docker load')}") from error
    if done.code:
        said = "\n".join(done.errors.strip().splitlines()[-3:])
        raise NodeFailed(f"{what}: {said or f'exit code {done.code}'}")


def without_scripts(argv: tuple[str, ...], error: NodeFailed, short: str) -> str:
    """The text of an error with a short name in place of its command, which holds a script of many lines."""
    return str(error).replace(" ".join(argv), short).strip()
