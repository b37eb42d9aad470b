"""A headless Chromium without a network, spoken to through a pipe: what the tests of the report ask a real browser.

Only the standard library: the browser's own protocol, one JSON message after another, ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

__all__ = ["Browser", "found"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ),
)


def found() -> str | None:
    """The path of a Chromium or a Chrome on this machine."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab, offline. Messages of the console, exceptions and requests are kept as they come."""

    def __init__(self, program: str, profile: Path) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()

        def arrange() -> None:  # the browser reads from 3 and writes to 4
            kept_in, kept_out = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(kept_in, 3)
            os.dup2(kept_out, 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], close_fds=False, preexec_fn=arrange, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._session = ""
        target = next(one for one in self._send("Target.getTargets")["targetInfos"] if one["type"] == "page")  # type: ignore[union-attr,index]
        self._session = str(self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self._send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(AssertionError, OSError):  # it may be gone already
            self._send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(self, path: Path) -> None:
        """Loads a file and waits until it is there."""
        self._send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + 20
        while self.ask("document.readyState") != "complete":
            assert time.monotonic() < until, "the page did not load"
            time.sleep(0.05)

    def ask(self, expression: str) -> object:
        """The value of a JavaScript expression in the page."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")  # type: ignore[attr-defined]

    @contextmanager
    def looking(self, width: int, height: int = 900, *, scheme: str = "light", media: str = "screen") -> Iterator[None]:
        """As a screen of this size, or a sheet of paper, with a colour scheme."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self._send("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        yield
        self._send("Emulation.clearDeviceMetricsOverride")
        self._send("Emulation.setEmulatedMedia", media="", features=[])

    def tab(self) -> None:
        """Presses the tabulator key."""
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def picture(self, path: Path, *, whole: bool = False, top: int = 0, height: int = 0) -> None:
        """A PNG of what is seen, of the whole page, or of a part of it."""
        width = int(str(self.ask("innerWidth")))
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1} if height else None
        answer = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole or bool(height), **({"clip": clip} if clip else {}))
        path.write_bytes(base64.b64decode(str(answer["data"])))

    def printed(self, path: Path) -> None:
        """A PDF of the page on paper."""
        path.write_bytes(base64.b64decode(str(self._send("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)["data"])))

    def _send(self, method: str, **params: object) -> dict[str, object]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                result = answer["result"]
                assert isinstance(result, dict)
                return result
            self._note(str(answer.get("method")), answer.get("params"))

    def _next(self) -> dict[str, object]:
        while b"\0" not in self._buffer:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser is gone"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        assert isinstance(answer, dict)
        return answer

    def _note(self, method: str, params: object) -> None:
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(params))
        elif method == "Network.requestWillBeSent" and isinstance(params, dict):
            self.requests.append(str(params["request"]["url"]))
