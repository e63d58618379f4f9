"""A headless Chromium over its debugging pipe, which needs no package: messages as JSON, each ended by a NUL."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
REASON = "no Chromium on PATH; on Debian: apt-get install chromium"
# Chromium reads its descriptor 3 and writes to 4.
PIPES = 'exec "$@" 3<&"$SAYS" 4>&"$HEARS"'


class Browser:
    def __init__(self, says: int, hears: int) -> None:
        self.says, self.hears, self.number, self.held = says, hears, 0, b""
        self.session, self.messages = "", list[dict[str, Any]]()

    def call(self, method: str, timeout_s: float = 60, **parameters: Any) -> Any:
        self.number += 1
        sent = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.says, json.dumps(sent).encode() + b"\0")
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            message = self.hear()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.messages.append(message)
        raise AssertionError(f"{method} was not answered in {timeout_s} s")

    def hear(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            piece = os.read(self.hears, 1 << 16)
            assert piece, "Chromium has ended"
            self.held += piece
        text, _, self.held = self.held.partition(b"\0")
        return json.loads(text)  # type: ignore[no-any-return]

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"{expression} did not come true; the page says: {self.evaluate('document.body.innerText')}"
            time.sleep(0.05)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def addresses(self) -> list[str]:
        """Of all that the page has asked for."""
        return [m["params"]["request"]["url"] for m in self.messages if m.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Of the browser about the page."""
        return [m["params"]["entry"]["text"] for m in self.messages if m.get("method") == "Log.entryAdded"]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    its_input, says = os.pipe()
    hears, its_output = os.pipe()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}")
    process = subprocess.Popen(
        ("bash", "-c", PIPES, "bash", str(CHROMIUM), *flags),
        env={**os.environ, "SAYS": str(its_input), "HEARS": str(its_output)},
        pass_fds=(its_input, its_output),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(says, hears)
    finally:
        os.close(says)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(hears)
