"""A real browser for tests: Debian's chromium without a window, driven by its own protocol over two pipes.

It can't reach any host, runs no script of a page, and remembers what a page asks for and complains of.
"""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

VARIABLE = "FAIRREF_BROWSER"  # "required": a missing browser is a failure
SECONDS = 120  # of silence, after which a test fails
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Page(NamedTuple):
    """What a browser made of a page."""

    requests: list[str]  # URLs that it asked for
    complaints: list[str]  # errors and warnings in its log
    width: float  # pixels that the content takes
    height: float
    image: Image.Image  # of its top, as wide as the window


def need_browser() -> str:
    """The browser's program; without one the test is skipped, or fails where a browser is required."""
    found = shutil.which("chromium")
    if found is None:
        said = "no chromium here; Debian's package of this name brings it"
        if os.environ.get(VARIABLE) == "required":
            pytest.fail(said)
        pytest.skip(said)
    return found


class Browser:
    """`with Browser() as browser: browser.open(file, width=390, dark=True)`."""

    def __enter__(self) -> "Browser":
        program, self.number, self.events = need_browser(), 0, []
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to_it = os.pipe()
        self.from_it, to_write = os.pipe()
        command = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        options = (*OPTIONS, f"--user-data-dir={self.folder.name}", "about:blank")
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *options],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.rest = b""
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.from_it)
        os.close(self.to_it)
        self.folder.cleanup()

    def tab(self, width: int, dark: bool = False, scripts: bool = True, media: str = "screen") -> "Tab":
        """A window of that width, on an empty page."""
        return Tab(self, width, dark, scripts, media)

    def open(
        self, file: Path, width: int, dark: bool = False, media: str = "screen", height: int = 1000
    ) -> Page:
        """The page of a file in a window of that width, without scripts."""
        tab = self.tab(width, dark, False, media)
        tab.resize(width, height)
        tab.go(file.resolve().as_uri())
        size = tab.ask("Page.getLayoutMetrics")["cssContentSize"]
        page = Page(tab.requests(), tab.complaints(), size["width"], size["height"], tab.image())
        tab.close()
        return page

    def ask(self, method: str, session: str | None = None, **parameters: object) -> dict:
        """The answer to a command of the protocol; events on the way are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.to_it, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def read(self) -> dict:
        """The next message."""
        while b"\0" not in self.rest:
            assert select.select([self.from_it], [], [], SECONDS)[0], (
                f"the browser has said nothing for {SECONDS} s"
            )
            data = os.read(self.from_it, 1 << 16)
            assert data, "the browser has gone"
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)


KEYS = {"Enter": ("\r", 13), "Tab": ("", 9), " ": (" ", 32), "Backspace": ("", 8), "ArrowRight": ("", 39)}


class Tab:
    """One page in a browser, which a test uses as somebody does who sits before it."""

    def __init__(self, browser: Browser, width: int, dark: bool, scripts: bool, media: str) -> None:
        self.browser = browser
        self.target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.ask("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.resize(width, 1000)

    def ask(self, method: str, **parameters: object) -> dict:
        """What the browser answers for this page."""
        return self.browser.ask(method, self.session, **parameters)

    def resize(self, width: int, height: int) -> None:
        """Makes the window so large."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def go(self, url: str) -> None:
        """Opens an address, and waits until it is loaded."""
        self.browser.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self._mine()):
            self.browser.events.append(self.browser.read())

    def js(self, expression: str) -> object:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> object:
        """Its value as soon as it is true."""
        ends = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < ends, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.ask("Input.insertText", text=text)

    def key(self, name: str, shift: bool = False) -> None:
        """Presses a key of KEYS."""
        text, code = KEYS[name]
        about = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def image(self) -> Image.Image:
        """What the window shows."""
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        return Image.open(io.BytesIO(data)).convert("RGB")

    def requests(self) -> list[str]:
        """URLs that the page asked for since it was opened."""
        return [
            e["params"]["request"]["url"] for e in self._mine() if e["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Errors and warnings in its log."""
        logged = [e["params"]["entry"]["text"] for e in self._mine() if e["method"] == "Log.entryAdded"]
        thrown = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return logged + [str(e["params"]) for e in self._mine() if e["method"] in thrown]

    def _mine(self):
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def close(self) -> None:
        """Closes the page."""
        self.browser.ask("Target.closeTarget", targetId=self.target)
