"""A headless Chromium without a network, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp

PROGRAM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_START_TIMEOUT_S: Final = 60.0
_WAIT_TIMEOUT_S: Final = 60.0


class Browser:
    """One page. `async with Browser(folder) as page` starts the browser, with its profile in `folder`, and ends it.

    Names other than 127.0.0.1 are not resolved: a page that needs anything from elsewhere does not get it.
    """

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [
                PROGRAM,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--window-size=1280,1600", "--remote-debugging-port=0", f"--user-data-dir={folder}"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session_id = ""
        #: Where the page asked for something.
        self.requested_urls: list[str] = []

    async def __aenter__(self) -> Browser:
        endpoint = await asyncio.wait_for(asyncio.to_thread(self._endpoint), _START_TIMEOUT_S)
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(endpoint, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session_id = attached["sessionId"]
        for domain in ("Page", "Network"):
            await self._call(f"{domain}.enable")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._http.close()
        self._process.terminate()
        self._process.wait(_START_TIMEOUT_S)

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self._call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it is."""
        result = await self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """The value of an expression once it is true."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _WAIT_TIMEOUT_S
        while not (value := await self.evaluate(expression)):
            assert loop.time() < deadline_s, f"never true: {expression}"
            await asyncio.sleep(0.05)
        return value

    async def screenshot(self) -> bytes:
        """The visible part of the page as PNG."""
        return base64.b64decode((await self._call("Page.captureScreenshot"))["data"])

    def _endpoint(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"ws://\S+", line):
                return found[0]
        raise RuntimeError("the browser ended")

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session_id} if self._session_id else {}))
        reply = await asyncio.wait_for(answer, _WAIT_TIMEOUT_S)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    async def _read(self) -> None:
        async for frame in self._socket:
            message = frame.json()
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message["method"] == "Network.requestWillBeSent":
                self.requested_urls.append(message["params"]["request"]["url"])
