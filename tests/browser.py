"""A headless Chromium, driven over its DevTools protocol: as much of it as the tests of the site take."""
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--remote-allow-origins=*"]


def installed() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    "One page of the browser: commands go out, answers come back, and events are kept."

    def __init__(self, address: str, timeout: float):
        self.socket = websocket.create_connection(address, timeout=timeout, suppress_origin=True)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Network", "Log"): self.send(f"{domain}.enable")

    def receive(self) -> dict:
        message = json.loads(self.socket.recv())
        if "method" in message: self.events.append(message)
        return message

    def send(self, method: str, **params) -> dict:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (message := self.receive()).get("id") != self.count: pass
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events): self.receive()

    def open(self, address: str) -> None:
        "Load a page, and return once everything that it names has loaded."
        self.events.clear()
        self.send("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def run(self, expression: str):
        "The value of an expression of JavaScript; of a promise, what it comes to."
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def width(self, pixels: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 600)

    def complaints(self) -> list[str]:
        "Requests that failed, exceptions, and errors on the console since the page was opened."
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Network.loadingFailed" and not params.get("canceled"): found.append(f"request: {params['errorText']}")
            if event["method"] == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:", "blob:")):
                found.append(f"request: {params['request']['url']}")
            if event["method"] == "Runtime.exceptionThrown": found.append(f"exception: {json.dumps(params['exceptionDetails'])[:300]}")
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(f"console: {[each.get('value') for each in params['args']]}")
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error": found.append(f"log: {params['entry']['text']}")
        return found


class Browser:
    "A process of Chromium with a profile of its own; `with Browser() as browser: tab = browser.tab()`."

    def __init__(self, timeout: float = 120):
        self.timeout = timeout

    def __enter__(self):
        self.home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen([installed(), *QUIET, f"--user-data-dir={self.home.name}", "--remote-debugging-port=0", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, end = Path(self.home.name) / "DevToolsActivePort", time.time() + self.timeout
        while not (port.exists() and port.read_text().count("\n") == 1):
            assert time.time() < end and self.process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        self.port, path = port.read_text().split("\n")
        self.root = Tab.__new__(Tab)
        self.root.socket, self.root.count, self.root.events = self._connect(path), 0, []
        return self

    def _connect(self, path: str):
        return websocket.create_connection(f"ws://127.0.0.1:{self.port}{path}", timeout=self.timeout, suppress_origin=True)

    def tab(self) -> Tab:
        target = self.root.send("Target.createTarget", url="about:blank")["targetId"]
        return Tab(f"ws://127.0.0.1:{self.port}/devtools/page/{target}", self.timeout)

    def __exit__(self, *_):
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        self.home.cleanup()
