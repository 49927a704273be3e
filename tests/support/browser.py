"""A headless Chromium, driven over its debugging pipe: what a page looks like and what it asks for.

Knows the DevTools protocol; nothing of gradrun.
"""

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
_COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


@dataclass
class Seen:
    """What a page did and showed."""

    requests: list[str] = field(default_factory=list)
    """All but the page itself."""
    complaints: list[str] = field(default_factory=list)
    text: str = ""
    width: int = 0
    """Of what there is to scroll to."""
    background: str = ""
    picture: bytes = b""
    """PNG."""


class Browser:
    """A browser until `close`; each look is at a page of its own."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # It reads from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--remote-debugging-pipe"
        )
        assert CHROMIUM
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *flags.split(), f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count, self._events = b"", 0, list[dict[str, Any]]()

    def look(self, page: Path, width: int, height: int, *, dark: bool = False) -> Seen:
        """Open a page in a window of this size."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def ask(method: str, **asked: Any) -> Any:
            return self._ask(method, session, **asked)

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
            return ask("Runtime.evaluate", expression=expression)["result"]["value"]

        seen = Seen(
            text=value("document.body.innerText"),
            width=value("document.documentElement.scrollWidth"),
            background=value("getComputedStyle(document.body).backgroundColor"),
            picture=base64.b64decode(ask("Page.captureScreenshot", format="png")["data"]),
        )
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                seen.requests.append(event["params"]["request"]["url"])
            elif event["method"] in _COMPLAINTS:
                seen.complaints.append(json.dumps(event["params"]))
        seen.requests.remove(page.as_uri())
        self._ask("Target.closeTarget", targetId=target)
        return seen

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def _ask(self, method: str, session: str | None = None, **asked: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": asked}
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
            assert piece, "the browser is gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told
