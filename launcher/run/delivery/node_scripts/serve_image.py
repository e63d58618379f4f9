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


def admit(peer: socket.socket, token: bytes, deadline: float, stall_s: float, receivers: "list[socket.socket]", count: int) -> None:
    """Add the connection to the receivers if it sends the token in time; close it otherwise."""
    line, limit = b"", 100
    try:
        while not line.endswith(b"\n") and len(line) < limit:
            peer.settimeout(max(0.01, min(5, deadline - time.monotonic())))
            piece = peer.recv(limit - len(line))
            if not piece:
                break
            line += piece
        accepted = hmac.compare_digest(line, token + b"\n")
    except OSError:
        accepted = False
    with LOCK:
        if accepted and len(receivers) < count and not CLOSED.is_set():
            peer.settimeout(stall_s)
            receivers.append(peer)
            return
    peer.close()


def accept_receivers(server: socket.socket, token: bytes, count: int, wait_s: float, stall_s: float) -> "list[socket.socket]":
    """Wait until all receivers have come or the time is over. Strangers are answered at the same time, and only so many of them."""
    receivers: list[socket.socket] = []
    pending: list[threading.Thread] = []
    deadline = time.monotonic() + wait_s
    server.settimeout(0.1)
    while len(receivers) < count and time.monotonic() < deadline:
        try:
            peer = server.accept()[0]
        except TimeoutError:
            continue
        pending = [thread for thread in pending if thread.is_alive()]
        if len(pending) > 4 * count + 16:
            peer.close()
            continue
        pending.append(threading.Thread(target=admit, args=(peer, token, deadline, stall_s, receivers, count), daemon=True))
        pending[-1].start()
    server.close()
    with LOCK:
        CLOSED.set()
        return list(receivers)


def send_all(receivers: "list[socket.socket]") -> bool:
    """Copy stdin to every receiver. One that fails or stalls is left out. Whether at least one received everything."""
    while receivers and (piece := os.read(0, 1 << 20)):
        for peer in list(receivers):
            try:
                peer.sendall(piece)
            except OSError:
                receivers.remove(peer)
                peer.close()
        SENT[0] += len(piece)
    for peer in receivers:
        peer.close()
    return bool(receivers)


def report(interval_s: float) -> None:
    while True:
        time.sleep(interval_s)
        print(SENT[0], flush=True)


def main(address: str, count: int, wait_s: float, interval_s: float, stall_s: float, limit_s: float) -> int:
    limit = threading.Timer(limit_s, os._exit, (3,))
    limit.daemon = True
    limit.start()
    token = secrets.token_hex(32)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family, backlog=count)
    print(server.getsockname()[1], token, flush=True)
    threading.Thread(target=report, args=(interval_s,), daemon=True).start()
    complete = send_all(accept_receivers(server, token.encode(), count, wait_s, stall_s))
    print(SENT[0], flush=True)
    if not complete:
        print("no other node came, or all of them left", file=sys.stderr)
    return 0 if complete else 1


LOCK, CLOSED, SENT = threading.Lock(), threading.Event(), [0]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:7])))
