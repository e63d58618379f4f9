"""Tests the connections from one node to all others. It runs on every node at the same time, and needs only the standard library.

Arguments: own address, port, limit in seconds, addresses of the other nodes. It listens on that port and on one that the kernel chooses,
connects to both on every other node, and prints {address: why it could not be reached} as JSON. It ends when it has reached all others
and they have reached it, or at the limit.
"""

import json
import socket
import sys
import threading
import time


def listen(address: str, port: int) -> socket.socket:
    server = socket.create_server((address, port), backlog=512)
    server.settimeout(0.2)
    return server


def serve(server: socket.socket, answer: bytes, done: threading.Event, heard: "set[str] | None") -> None:
    """Send `answer` to every client, and note its address in `heard`."""
    while not done.is_set():
        try:
            peer, (address, _) = server.accept()
        except TimeoutError:
            continue
        with peer:
            peer.sendall(answer)
        if heard is not None:
            heard.add(address)


def ask(own: str, address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=2, source_address=(own, 0)) as peer:
        peer.settimeout(2)
        return peer.makefile("rb").readline()


def reach(own: str, address: str, port: int, end: float, failures: "dict[str, str]") -> None:
    """Ask the other node for its second port and connect to that; try again until `end`. `failures` keeps why it is not reached."""
    second = 0
    while True:
        what = f"a port other than {port}" if second else f"port {port}"
        try:
            answer = ask(own, address, second or port)
            if second:
                failures.pop(address, None)
                return
            second = int(answer)
        except (OSError, ValueError) as error:
            failures[address] = f"{what}: {getattr(error, 'strerror', None) or error}"
            if time.monotonic() > end:
                return
            time.sleep(0.2)


def main(own: str, port: int, limit_s: float, others: "list[str]") -> None:
    end, done = time.monotonic() + limit_s, threading.Event()
    failures: dict[str, str] = {}
    heard: set[str] = set()
    first, second = listen(own, port), listen(own, 0)
    number = f"{second.getsockname()[1]}\n".encode()
    for arguments in ((first, number, done, None), (second, b"\n", done, heard)):
        threading.Thread(target=serve, args=arguments, daemon=True).start()
    reaching = [threading.Thread(target=reach, args=(own, address, port, end, failures), daemon=True) for address in others]
    for thread in reaching:
        thread.start()
    for thread in reaching:
        thread.join(max(0.1, end - time.monotonic() + 3))
    while time.monotonic() < end and not heard >= set(others):
        time.sleep(0.05)
    done.set()
    print(json.dumps(failures))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
