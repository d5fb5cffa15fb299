"""A headless Chromium to look at our pages with, told what to do over a pipe by the DevTools protocol.

Nothing but the standard library: messages are JSON with a zero byte behind each, on file descriptors 3 and 4
(https://chromedevtools.github.io/devtools-protocol).
"""

import base64
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
_FLAGS += ("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")
PHONE, DESKTOP = (390, 844), (1280, 900)


def found() -> str:
    """The program, "" if there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), "")


class Tab:
    """A page at one size of the window.

    Attributes:
      said: what went wrong: exceptions, errors and warnings of the console, violations of its policy.
      requests: addresses that it asked for.
    """

    def __init__(self, browser: "Browser", session: str):
        self._browser, self._session = browser, session
        self.said: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def call(self, method: str, **parameters) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def evaluate(self, expression: str):
        """The value of an expression in the page, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as somebody would press it."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def theme(self, name: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path, *, whole: bool = False) -> Path:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **({} if not whole else self._whole()))
        Path(path).write_bytes(base64.b64decode(shot["data"]))
        return Path(path)

    def _whole(self):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def hear(self, method: str, of: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(of["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.said.append(f"{of['type']}: {[value.get('value') for value in of['args']]}")
        elif method == "Log.entryAdded":
            self.said.append(f"{of['entry']['level']}: {of['entry']['text']}")


class Browser:
    """A process with tabs. Use it in a `with`.

    Args:
      profile: an empty folder.
      seconds: that an answer may take.
    """

    def __init__(self, profile, seconds: float = 30.0):
        ours, theirs = os.pipe(), os.pipe()  # (read by it, written by us), (read by us, written by it)
        command = shlex.join([found(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"])
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command} 3<&{ours[0]} 4>&{theirs[1]}"],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from, self._seconds = ours[1], theirs[0], seconds
        self._number, self._rest, self._answers, self._tabs = 0, b"", {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, path, size: tuple[int, int], theme: str = "light") -> Tab:
        """A file, loaded in a window of a size."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        width, height = size
        scale = {"deviceScaleFactor": 1, "mobile": width < 600}
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)
        tab.theme(theme)
        tab.requests.clear()
        tab.loaded = False
        tab.call("Page.navigate", url=Path(path).resolve().as_uri())
        self._until(lambda: tab.loaded, "the page to load")
        return tab

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        self._until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _until(self, true, what: str) -> None:
        end = time.monotonic() + self._seconds
        while not true():
            left = end - time.monotonic()
            assert left > 0, f"{found()} has not answered for {self._seconds:g} s: {what}"
            if select.select([self._from], [], [], left)[0]:
                self._read()

    def _read(self) -> None:
        data = os.read(self._from, 1 << 20)
        assert data, f"{found()} has ended with code {self._process.wait()}"
        *whole, self._rest = (self._rest + data).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif tab := self._tabs.get(message.get("sessionId")):
                tab.hear(message["method"], message["params"])
