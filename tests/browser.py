"""A headless Chromium, driven over the DevTools protocol: what the tests of the page need and no more."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One tab, with profile and ``downloads`` in a folder.

    Attributes:
        problems: Errors of scripts, refusals of the content policy and failed requests, as they came.
        asked: Hosts that pages sent requests to; what the browser itself asks for is not among them.
    """

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)
        profile = folder / "profile"
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.problems: list[str] = []
        self.asked: set[str] = set()
        self._count = 0
        try:
            port = self._port(profile / "DevToolsActivePort")
            with httpx.Client(trust_env=False) as client:  # a proxy of the machine has no business here
                targets = client.get(f"http://127.0.0.1:{port}/json/list").json()
            page = next(target for target in targets if target["type"] == "page")
            self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None, ping_interval=None)
        except BaseException:
            self._process.kill()
            raise
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser in order."""
        try:
            self.send("Browser.close")
            self._process.wait(20)
        except Exception:  # whatever the state it is in, it must not stay
            self._process.kill()
            self._process.wait(20)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; raises RuntimeError when it is refused."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._heard(message)

    def open(self, url: str) -> None:
        """Load an address afresh, also where only its fragment is new."""
        for address in ("about:blank", url):
            self.send("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, which may be a promise; RuntimeError when it throws."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 20) -> Any:
        """The value of an expression as soon as it is true; raises TimeoutError with what the page shows."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = self.evaluate(expression)
            if value or value == {}:  # an element comes as an empty object
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression} after {timeout} s; {self.problems[-3:]}; the page: {self.text()[:1500]}")

    def text(self) -> str:
        return self.evaluate("document.body?.innerText ?? ''")

    def click(self, selector: str) -> None:
        """A real click in the middle of an element; scrolls to it first."""
        place = self.wait_for(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)

    def key(self, name: str) -> None:
        """Press and release a key: a letter, or a name of the DOM such as ``Tab``."""
        about: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": _KEYS.get(name, ord(name[0].upper()))}
        text = {"text": "\r" if name == "Enter" else name} if name == "Enter" or len(name) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def set_files(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files in a file input, as the dialog would."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Size of the window and colour scheme of the system."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        return path

    def _heard(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent" and (host := urlsplit(about["request"]["url"]).hostname):
            self.asked.add(host)
        if message["method"] == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        if message["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def _port(self, file: Path) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            if file.exists() and (text := file.read_text()).count("\n"):
                return int(text.split("\n")[0])
            time.sleep(0.1)
        raise RuntimeError("Chromium did not start")
