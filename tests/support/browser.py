"""A headless Chromium, if one is installed, controlled through its DevTools pipe."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = (
    *("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome"),
    *("google-chrome-stable", "chrome", "microsoft-edge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
ERRORS = (
    *("Log.entryAdded", "Runtime.consoleAPICalled"),
    *("Runtime.exceptionThrown", "Network.loadingFailed"),
)


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One tab, with its errors and requests since `open`."""

    browser: "Browser"
    session: str
    errors: list[Any] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path, *, width: int = 1200, scheme: str = "light") -> None:
        """Show a file in a window of this width and colour scheme."""
        self.errors.clear()
        self.requests.clear()
        window = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **window, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=path.as_uri())
        self.browser.wait_for("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        response = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in response, response
        return response["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """Write a PDF."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, params, self.session)


class Browser:
    def __init__(self, path: str, profile: Path) -> None:
        our_input, its_output = _pipe()
        its_input, our_output = _pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = os.posix_spawn(
            path,
            [path, *flags],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, its_input, 3),  # Chromium reads from 3
                (os.POSIX_SPAWN_DUP2, its_output, 4),  # and writes to 4
            ],
            setpgroup=0,
        )
        os.close(its_input)
        os.close(its_output)
        self._from, self._to = os.fdopen(our_input, "rb"), os.fdopen(our_output, "wb")
        self._count, self._rest = 0, b""
        self._events: list[str] = []
        self.pages: dict[str, Page] = {}

    def new_page(self) -> Page:
        target = self.call("Target.createTarget", {"url": "about:blank"})
        attach = {"targetId": target["targetId"], "flatten": True}
        session = self.call("Target.attachToTarget", attach)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        return page

    def call(
        self, method: str, params: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        self._count += 1
        command: dict[str, Any] = {"id": self._count, "method": method}
        command |= {"params": params} | ({"sessionId": session} if session else {})
        self._events.clear()
        self._to.write(json.dumps(command).encode() + b"\0")
        self._to.flush()
        while True:
            message = self._receive()
            if message.get("id") == self._count:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def wait_for(self, event: str) -> None:
        """Wait for an event since the last call."""
        while event not in self._events:
            self._receive()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self._from.close()
        with contextlib.suppress(OSError):
            self._to.close()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._from.read1(1 << 20)
            if not more:
                raise EOFError("the browser process has exited")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        page = self.pages.get(message.get("sessionId", ""))
        if page is not None:
            if method in ERRORS:
                page.errors.append(params)
            elif method == "Network.requestWillBeSent":
                page.requests.append(params["request"]["url"])
        return message


@contextlib.contextmanager
def started(path: str, profile: Path) -> Iterator[Browser]:
    browser = Browser(path, profile)
    try:
        yield browser
    finally:
        browser.close()


def _pipe() -> tuple[int, int]:
    """Make a pipe whose descriptors do not collide with those of a child."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
