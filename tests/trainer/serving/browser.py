"""A headless Chromium, driven through its debugging pipe without any package: JSON messages, each terminated by a NUL byte."""

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
# Chromium reads from descriptor 3 and writes to descriptor 4.
PIPES = 'exec "$@" 3<&"$BROWSER_INPUT" 4>&"$BROWSER_OUTPUT"'


class Browser:
    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser, self.number, self.buffer = to_browser, from_browser, 0, b""
        self.session, self.messages = "", list[dict[str, Any]]()

    def call(self, method: str, timeout_s: float = 60, **parameters: Any) -> Any:
        self.number += 1
        sent = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to_browser, json.dumps(sent).encode() + b"\0")
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.messages.append(message)
        raise AssertionError(f"{method} was not answered in {timeout_s} s")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            piece = os.read(self.from_browser, 1 << 16)
            assert piece, "Chromium has ended"
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
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
        """The URLs of all requests of the page."""
        return [m["params"]["request"]["url"] for m in self.messages if m.get("method") == "Network.requestWillBeSent"]

    def log_messages(self) -> list[str]:
        return [m["params"]["entry"]["text"] for m in self.messages if m.get("method") == "Log.entryAdded"]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}")
    process = subprocess.Popen(
        ("bash", "-c", PIPES, "bash", str(CHROMIUM), *flags),
        env={**os.environ, "BROWSER_INPUT": str(its_input), "BROWSER_OUTPUT": str(its_output)},
        pass_fds=(its_input, its_output),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(from_browser)
