"""A headless Chromium for tests, driven by the DevTools protocol over two pipes: clicks, hovers, keys, media."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser reads commands from descriptor 3 and answers on 4."""


def axe() -> str:
    """Script of axe-core, which finds what hinders people with disabilities. Without it the test is skipped."""
    package = find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        (pytest.fail if os.environ.get("RANKSCOPE_REQUIRE_BROWSER") else pytest.skip)("no axe-playwright-python")
    return Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8")


def need_browser() -> str:
    """Return the path of a browser. Without one the test is skipped, or fails if RANKSCOPE_REQUIRE_BROWSER is set."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        reason = f"no browser to open a page in: none of {', '.join(BROWSERS)} is on PATH"
        (pytest.fail if os.environ.get("RANKSCOPE_REQUIRE_BROWSER") else pytest.skip)(reason)
    return program


class Browser:
    """Shows one page at a time, and records its console and log (`messages`) and its requests (`requests`).

    Expressions run in the page, past its Content-Security-Policy; no value from the page is executed in this process.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []  # addresses other than the page's own
        self._page, self._target, self._session, self._number, self._rest = "", "", "", 0, b""
        self._shown: tuple[Any, ...] = ()  # the page that is open, and how
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        high = [os.dup(end) for end in (read_commands, write_answers)]  # so that neither is 3 or 4 itself
        for end in (read_commands, write_answers):
            os.close(end)
        for end in high:
            os.set_inheritable(end, True)
        command = [sys.executable, "-c", _START, *map(str, high), program, "--headless", "--no-sandbox"]
        command += ["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}"], pass_fds=high, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        for end in high:
            os.close(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)  # the browser ends with its pipe
        self._process.wait(timeout=30)
        os.close(self._read)

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": values}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._rest += chunk
        answer, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(answer))

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("sessionId") != self._session:
            return  # of a page before this one
        method, values = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(values["args"]))
        elif method == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent" and values["request"]["url"] != self._page:
            self.requests.append(values["request"]["url"])

    def show(
        self, page: Path | str, *, width: int = 1280, height: int = 800, dark: bool = False, scripts: bool = True
    ) -> None:
        """`open`, unless the page is open in this way: then as it is, with its details, and its theme the system's."""
        if self._shown != (page, width, height, dark, scripts):
            self.open(page, width=width, height=height, dark=dark, scripts=scripts)
        self.media(dark=dark)
        self.click("#theme-auto")
        self.ask("document.querySelectorAll('.level').forEach(level => { level.open = true; })")

    def open(
        self, page: Path | str, *, width: int = 1280, height: int = 800, dark: bool = False, scripts: bool = True
    ) -> None:
        """Open a page with its details and wait until its charts are drawn; the page before it is closed. Without
        `scripts`, open it as it lies there."""
        before, self._session, self._shown = self._target, "", (page, width, height, dark, scripts)
        self._page = page if isinstance(page, str) else page.as_uri()
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.call("Target.closeTarget", targetId=before)
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        self.media(dark=dark)
        self.messages.clear()
        self.requests.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=self._page)
        self.until("document.readyState === 'complete'")
        if scripts:
            self.ask("document.querySelectorAll('.level').forEach(level => { level.open = true; })")
            drawn = "chart.classList.contains('vega-embed') && chart.querySelector('svg[aria-hidden]')"
            self.until(f"[...document.querySelectorAll('.chart')].every(chart => {drawn})")

    def size(self, width: int, height: int = 800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, *, dark: bool = False, paper: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page, or that of its promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer over an element, to a point given as shares of its width and height."""
        self.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.ask(
            f"(({{x, y, width, height}}) => [x, y, width, height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        x, y = box[0] + across * box[2], box[1] + down * box[3]
        for step in (-3, 0):  # two moves: the second is within the chart
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)

    def click(self, selector: str) -> None:
        self.ask(f"document.querySelector({selector!r}).click()")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key; `text` is what it types, which some keys need to act."""
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)
