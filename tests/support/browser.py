"""Render a page in headless Chromium through the DevTools protocol, and record its requests."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_ERROR_EVENTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


@dataclass
class RenderedPage:
    """Content of a page, and its requests and errors."""

    requests: list[str] = field(default_factory=list)
    """Without the request for the page itself, and without data that are part of it."""
    errors: list[str] = field(default_factory=list)
    text: str = ""
    width: int = 0
    """Scroll width in pixels."""
    cut_off: list[str] = field(default_factory=list)
    """Texts of the tables that are wider than their frame."""
    pictures: list[list[int]] = field(default_factory=list)
    """Width and height of each picture that was decoded."""
    background: str = ""
    screenshot: bytes = b""
    """PNG."""


class Browser:
    """A browser process; each page is opened in a new tab."""

    def __init__(self, profile: Path) -> None:
        browser_in, self._out = os.pipe()
        self._in, browser_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{browser_in} 4>&{browser_out}'
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--remote-debugging-pipe"
        )
        assert CHROMIUM
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *flags.split(), f"--user-data-dir={profile}"],
            pass_fds=(browser_in, browser_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_in)
        os.close(browser_out)
        self._buffer, self._count, self._events = b"", 0, list[dict[str, Any]]()

    def render(self, page: Path, width: int, height: int, *, dark: bool = False) -> RenderedPage:
        """Open a page in a window of this size and wait until it is loaded."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def ask(method: str, **parameters: Any) -> Any:
            return self._ask(method, session, **parameters)

        for domain in ("Page", "Runtime", "Log", "Network"):
            ask(f"{domain}.enable")
        ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

        def value(expression: str) -> Any:
            return ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
                "value"
            ]

        rendered = RenderedPage(
            text=value("document.body.innerText"),
            width=value("document.documentElement.scrollWidth"),
            cut_off=value(
                "[...document.querySelectorAll('.scrolls')]"
                ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
            ),
            pictures=value(
                "[...document.images].filter(e => e.complete && e.naturalWidth)"
                ".map(e => [e.naturalWidth, e.naturalHeight])"
            ),
            background=value("getComputedStyle(document.body).backgroundColor"),
            screenshot=base64.b64decode(ask("Page.captureScreenshot", format="png")["data"]),
        )
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                rendered.requests += [] if url.startswith("data:") else [url]
            elif event["method"] in _ERROR_EVENTS:
                rendered.errors.append(json.dumps(event["params"]))
        rendered.requests.remove(page.as_uri())
        self._ask("Target.closeTarget", targetId=target)
        return rendered

    def close(self) -> None:
        """Stop the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser exited"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        return event
