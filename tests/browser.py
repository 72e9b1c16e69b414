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
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

VARIABLE = "FAIRREF_BROWSER"  # "required": a missing browser is a failure
SECONDS = 120  # of silence, after which a test fails
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
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

    def open(
        self, file: Path, width: int, dark: bool = False, media: str = "screen", height: int = 1000
    ) -> Page:
        """The page of a file in a window of that width, without scripts."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def ask(method, **parameters):
            return self.ask(method, session, **parameters)

        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        for method, parameters in (
            *((f"{domain}.enable", {}) for domain in ("Page", "Network", "Log", "Runtime")),
            ("Emulation.setScriptExecutionDisabled", {"value": True}),
            ("Emulation.setEmulatedMedia", {"media": media, "features": scheme}),
            (
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
            ),
        ):
            ask(method, **parameters)
        self.events.clear()
        ask("Page.navigate", url=file.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        size = ask("Page.getLayoutMetrics")["cssContentSize"]
        image = base64.b64decode(ask("Page.captureScreenshot", format="png")["data"])
        mine = [event for event in self.events if event.get("sessionId") == session]
        requests = [e["params"]["request"]["url"] for e in mine if e["method"] == "Network.requestWillBeSent"]
        logged = [e["params"]["entry"]["text"] for e in mine if e["method"] == "Log.entryAdded"]
        thrown = [
            str(e["params"])
            for e in mine
            if e["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ]
        self.ask("Target.closeTarget", targetId=target)
        return Page(
            requests,
            logged + thrown,
            size["width"],
            size["height"],
            Image.open(io.BytesIO(image)).convert("RGB"),
        )

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
