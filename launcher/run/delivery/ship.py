"""The image on every node, by its id: nothing for a node that has it, one `docker save` here streamed to all that lack it. To many nodes it
is sent in rounds: from here to a few, and from each node that has it to a few others."""

from collections.abc import Callable, Sequence

from launcher.errors import ImageFailed, NodeFailed
from launcher.image.docker import BuiltImage
from launcher.run.delivery.broadcast import send
from launcher.run.delivery.node_image import image_on, images_on, is_same
from launcher.run.delivery.peer_transfer import Peer, assign_receivers, transfer_round
from launcher.ssh.parallel import attempt_each, together
from launcher.ssh.transport import Transport
from trainer.contract.wording import plural

# Receivers of one node at the same time, and of this machine when there are many nodes. An engine loads 70 MB/s (1.43 GB in 21 s), so that a
# link of 10 Gbit/s is enough for more than six; and 6, 42, 294 nodes have the image after one, two, three rounds.
FAN_OUT = 6
# With fewer nodes a second round takes longer than it saves: twelve times 1.43 GB through 1 Gbit/s take 140 s; six times take 70 s, a round 50 s.
MANY = 13


def ship(tag: str, image_id: str, peers: Sequence[Peer], source: Transport, say: Callable[[str], None]) -> None:
    """Bring `tag` with `image_id` to every node. Raises NodeFailed, naming the nodes that do not end up with that very image."""
    sent = image_on(source, tag)
    if sent is None or sent.id != image_id:
        raise ImageFailed(f"{tag} was replaced or removed on this machine after the launch had found it; launch again")
    lacking = nodes_without(tag, sent, peers)
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
    require(tag, sent, lacking)


def nodes_without(tag: str, sent: BuiltImage, peers: Sequence[Peer]) -> list[Peer]:
    found = images_on([peer.node for peer in peers], tag)
    return [peer for peer, image in zip(peers, found, strict=True) if not is_same(image, sent)]


def require(tag: str, sent: BuiltImage, peers: Sequence[Peer]) -> None:
    if wrong := nodes_without(tag, sent, peers):
        raise NodeFailed(f"after sending, {hosts(wrong)} does not have {tag} with id {sent.id[:19]}: send it again with the same command")


def spread(tag: str, sent: BuiltImage, holders: Sequence[Peer], waiting: Sequence[Peer], say: Callable[[str], None]) -> tuple[Peer, ...]:
    """From the nodes that have the image to all others, in rounds; the nodes that did not get it. A node that could not serve anyone is not
    used again: if a firewall blocks traffic between the nodes, the first round is the last."""
    unserved: list[Peer] = []
    while holders and waiting:
        assigned = assign_receivers(holders, waiting, FAN_OUT)
        receivers = tuple(receiver for _, of_one in assigned for receiver in of_one)
        say(f"  from {plural(len(assigned), 'node')} to {plural(len(receivers), 'other')}, {len(waiting) - len(receivers)} waiting")
        failures = [failure for of_one in transfer_round(tag, assigned) for failure in of_one]
        arrived = attempt_each(lambda peer: is_same(image_on(peer.node.transport, tag), sent), receivers)
        served = {id(receiver) for receiver, answer in zip(receivers, arrived, strict=True) if answer is True}
        useless = {id(holder) for holder, of_one in assigned if not any(id(receiver) in served for receiver in of_one)}
        holders = (*(peer for peer in holders if id(peer) not in useless), *(peer for peer in receivers if id(peer) in served))
        for peer, failure in zip(receivers, failures, strict=True):
            if id(peer) not in served:
                say(f"  {failure or f'{peer.host} received another image'}")
                unserved.append(peer)
        waiting = waiting[len(receivers) :]
    return (*unserved, *waiting)


def send_image(tag: str, peers: Sequence[Peer], source: Transport, say: Callable[[str], None]) -> None:
    answers = send(("docker", "save", tag), ("docker", "load"), [peer.node for peer in peers], source, say)
    if failures := [answer for answer in answers if answer]:
        raise together(failures, len(peers))


def hosts(peers: Sequence[Peer]) -> str:
    return ", ".join(peer.host for peer in peers)
