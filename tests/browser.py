"""Drives headless Chromium through chromedriver's own HTTP interface (W3C WebDriver)."""

import base64
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, ESCAPE, SHIFT, TAB = "\ue007", "\ue00c", "\ue008", "\ue004"


class Browser:
    """One window."""

    def __init__(self, driver: httpx.Client) -> None:
        self._driver = driver

    def _call(self, path: str, **body: Any) -> Any:
        reply = self._driver.post(path, json=body).json()["value"]
        assert not (isinstance(reply, dict) and "error" in reply), reply
        return reply

    def open(self, url: str) -> None:
        """Go to `url`."""
        self._call("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what `script` returns in the page."""
        return self._call("/execute/sync", script=script, args=list(arguments))

    def _find(self, css: str) -> str:
        return str(self._call("/element", using="css selector", value=css)[ELEMENT])

    def click(self, css: str) -> None:
        """Click the first element that `css` selects."""
        self._call(f"/element/{self._find(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Send keys to the first element that `css` selects."""
        self._call(f"/element/{self._find(css)}/value", text=text)

    def texts(self, css: str) -> list[str]:
        """Return the text of all elements that `css` selects."""
        found = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)
        return [str(text) for text in found]

    def resize(self, width: int, height: int) -> None:
        """Emulate a screen of this size, which may be smaller than a window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def scheme(self, name: str) -> None:
        """Prefer a dark or a light page."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def devtools(self, command: str, **params: Any) -> Any:
        """Send one DevTools command."""
        return self._call("/goog/cdp/execute", cmd=command, params=params)

    def complaints(self) -> list[str]:
        """Return the console's warnings and errors since the last call."""
        return [entry["message"] for entry in self._call("/se/log", type="browser")]

    def picture(self, path: Path) -> None:
        """Write a screenshot of the page as it is drawn after the next frame: a scroll takes one."""
        self.run("return new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        path.write_bytes(base64.b64decode(self._driver.get("/screenshot").json()["value"]))


@contextmanager
def browser(*flags: str) -> Iterator[Browser]:
    """Open a browser with a profile of its own and these flags, and close it."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(
            found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        with tempfile.TemporaryDirectory() as profile, driver.stdout:
            options = {"args": [*FLAGS.split(), *flags, f"--user-data-dir={profile}"]}
            logs = {"browser": "WARNING"}
            wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
            base = f"http://127.0.0.1:{port}/session"
            session = httpx.post(base, json={"capabilities": wanted}, timeout=60).json()["value"]
            url = f"{base}/{session['sessionId']}"
            with httpx.Client(base_url=url, timeout=60) as client:
                try:
                    yield Browser(client)
                finally:
                    client.delete(url)
    finally:
        driver.terminate()
        driver.wait()
