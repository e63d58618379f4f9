"""Sends its stdin to several other nodes over TCP. Runs in a container of the image that is being sent.

Arguments: address to listen on, number of receivers, then in seconds: how long to wait for receivers, the interval of progress lines,
how long one receiver may block the others, the limit for everything. Prints `PORT TOKEN`, then the bytes sent so far again and again.
A receiver connects and sends the token and a newline; it is then sent everything that comes on stdin.
"""

import hmac
import os
import secrets
import socket
import sys
import threading
import time

LOCK, CLOSED = threading.Lock(), threading.Event()
RECEIVERS: list[socket.socket] = []
SENT = [0]


def admit(peer: socket.socket, token: bytes, count: int, stall_s: float) -> None:
    """Add the connection to the receivers if it sends the token within 5 s; close it otherwise."""
    peer.settimeout(5)
    try:
        with peer.makefile("rb") as file:
            accepted = hmac.compare_digest(file.readline(100), token + b"\n")
    except OSError:
        accepted = False
    with LOCK:
        if accepted and len(RECEIVERS) < count and not CLOSED.is_set():
            peer.settimeout(stall_s)
            RECEIVERS.append(peer)
            return
    peer.close()


def accept_receivers(server: socket.socket, token: bytes, count: int, wait_s: float, stall_s: float) -> None:
    """Wait until all receivers have come or the time is over. Other connections are answered at the same time, up to a limit."""
    pending: list[threading.Thread] = []
    deadline = time.monotonic() + wait_s
    server.settimeout(0.1)
    while len(RECEIVERS) < count and time.monotonic() < deadline:
        try:
            peer = server.accept()[0]
        except TimeoutError:
            continue
        pending = [thread for thread in pending if thread.is_alive()]
        if len(pending) > 4 * count + 16:
            peer.close()
            continue
        pending.append(threading.Thread(target=admit, args=(peer, token, count, stall_s), daemon=True))
        pending[-1].start()
    server.close()
    with LOCK:
        CLOSED.set()


def send_all() -> bool:
    """Copy stdin to every receiver. One that fails or stalls is left out. Whether at least one received everything."""
    while RECEIVERS and (piece := os.read(0, 1 << 20)):
        for peer in list(RECEIVERS):
            try:
                peer.sendall(piece)
            except OSError:
                RECEIVERS.remove(peer)
                peer.close()
        SENT[0] += len(piece)
    for peer in RECEIVERS:
        peer.close()
    return bool(RECEIVERS)


def report(interval_s: float) -> None:
    while True:
        time.sleep(interval_s)
        print(SENT[0], flush=True)


def main(address: str, count: int, wait_s: float, interval_s: float, stall_s: float, limit_s: float) -> None:
    limit = threading.Timer(limit_s, os._exit, (3,))
    limit.daemon = True
    limit.start()
    token = secrets.token_hex(32)
    server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=count)
    print(server.getsockname()[1], token, flush=True)
    threading.Thread(target=report, args=(interval_s,), daemon=True).start()
    accept_receivers(server, token.encode(), count, wait_s, stall_s)
    if not send_all():
        sys.exit("no other node came, or all of them left")
    print(SENT[0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:7]))
