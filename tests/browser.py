"""Pages in a real browser: Chromium, headless, driven by its DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PATIENCE_SECONDS = 30
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
KEY_CODES = {"Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "Tab": 9}
KEY_CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


@pytest.fixture(scope="session")
def browser():
    """A `Browser`; tests of it are skipped where there is none."""
    if (program := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started = Browser(program, Path(folder))
        try:
            yield started
        finally:
            started.close()


class Browser:
    def __init__(self, program: str, folder: Path):
        self.loop = asyncio.new_event_loop()
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        told, deadline = folder / "DevToolsActivePort", time.monotonic() + PATIENCE_SECONDS
        while not (told.exists() and (lines := told.read_text(encoding="utf-8").split())):
            assert self.process.poll() is None, "Chromium does not start"
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.05)
        self.address = f"http://127.0.0.1:{lines[0]}"

    def open(self, url: str, width: int = 1200, height: int = 800, dark: bool = False) -> "Tab":
        """The page at `url`, in a tab of that size in pixels, once it was loaded."""
        tab = Tab(self)
        tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.go(url)
        return tab

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # asked to end, it takes its time
        self.process.wait(PATIENCE_SECONDS)
        self.loop.close()


class Tab:
    """One page. `errors` are what its console tells of: exceptions, refused or missing files, alerts."""

    def __init__(self, browser: Browser):
        self.errors: list[str] = []
        self._loop, self._number, self._loaded = browser.loop, 0, False
        self._loop.run_until_complete(self._connect(browser.address))
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.put(f"{address}/json/new?about:blank") as answer:
            target = await answer.json()
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)

    def send(self, method: str, **parameters: Any) -> dict:
        """A command of the protocol, and its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), PATIENCE_SECONDS))

    async def _send(self, method: str, parameters: dict) -> dict:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (answer := json.loads((await self._socket.receive()).data)).get("id") != self._number:
            await self._hear(answer.get("method"), answer.get("params", {}))
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    async def _hear(self, event: str, about: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {about['message']}")
            await self._socket.send_json(
                {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            )

    def go(self, url: str) -> None:
        problem = self.send("Page.navigate", url=url).get("errorText")
        assert not problem, f"{url}: {problem}"
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or what its promise brings."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.run(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}; console: {self.errors}"
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key by its name in events (`ArrowLeft`, `a`); modifiers: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        about = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": KEY_CODES.get(key, ord(key[0].upper()))}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def texts(self, selector: str) -> list[str]:
        """What the elements show."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.innerText)")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Raises AssertionError where the console told of something."""
        self.run("0")  # what happened before is heard
        self.send("Page.close")
        self._loop.run_until_complete(self._session.close())
        assert not self.errors, self.errors
