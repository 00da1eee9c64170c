"""A real browser, for tests that read a page as people see it.

Debian's chromium, spoken to in its own protocol, https://chromedevtools.github.io/devtools-protocol/, by the aiohttp
that is there already: a driver from PyPI would add 50 MB to what `make demo` installs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Why a test that needs one is skipped.
NO_CHROMIUM = "there is no chromium to read the page with: apt-get install -y --no-install-recommends chromium"
START_S = 60.0
SHOWN_S = 60.0
CLICKS = 6
#: In a container chromium has no sandbox of its own, and /dev/shm is small. It visits this machine's pages only.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"),
    *(
        "--no-first-run",
        "--disable-breakpad",
        "--disable-extensions",
        "--disable-background-networking",
        "--disable-component-update",
    ),
    "--force-prefers-reduced-motion",
)


@dataclass
class Page:
    """The one tab of a browser: what its scripts did not catch, what it asked for, and what the browser minded."""

    socket: aiohttp.ClientWebSocketResponse
    uncaught: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _asked: int = 0
    _answers: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)

    async def open(self, url: str) -> None:
        await self._do("Page.navigate", url=url)

    async def text(self) -> str:
        """What is to be read on the page now, one space between words, and between the cells of a table."""
        return " ".join((await self.evaluate("document.body?.innerText ?? ''")).split())

    async def shows(self, *sought: str, within_s: float = SHOWN_S) -> str:
        """The page's text, once all of this is in it."""
        text = ""
        for _ in range(int(within_s / 0.2)):
            text = await self.text()
            if all(words in text for words in sought):
                return text
            await asyncio.sleep(0.2)
        raise AssertionError(f"the page shows no {[words for words in sought if words not in text]}, but: {text}")

    async def click(self, words: str, *shown: str) -> None:
        """Click with the mouse on what bears these words, and no others, once it is there, until all of this shows.

        A page that is still arriving moves under the mouse: a person who hit nothing clicks again.
        """
        for _ in range(CLICKS - 1):
            await self._click(words)
            with suppress(AssertionError):
                await self.shows(*shown, within_s=SHOWN_S / CLICKS)
                return
        await self._click(words)
        await self.shows(*shown)

    async def _click(self, words: str) -> None:
        await self.shows(words)
        where = await self.evaluate(
            f"""(() => {{
                const bears = element => element.innerText?.trim() === {json.dumps(words)};
                const found = [...document.querySelectorAll('*')].filter(bears).at(-1);
                found.scrollIntoView({{block: 'center'}});
                const box = found.getBoundingClientRect();
                return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
            }})()"""
        )
        for happens in ("mousePressed", "mouseReleased"):
            await self._do("Input.dispatchMouseEvent", type=happens, button="left", clickCount=1, **where)

    async def press(self, key: str) -> None:
        """A key on what has the focus."""
        text = {"Enter": "\r"}.get(key, "")
        await self._do(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=13, text=text
        )
        await self._do("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=13)

    async def be(self, width: int, height: int, scheme: str) -> None:
        """A window or a phone of this size, whose owner prefers this colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self._do("Emulation.setDeviceMetricsOverride", **size)
        await self._do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def evaluate(self, script: str) -> Any:
        found = await self._do("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def keep(self, picture: Path, *, whole: bool = False) -> None:
        """A PNG of what is to be seen, or of the whole page."""
        found = await self._do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        picture.write_bytes(base64.b64decode(found["data"]))

    async def listen(self) -> None:
        """Take what the browser says, until it is gone."""
        async for message in self.socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said.get("method") == "Runtime.exceptionThrown":
                self.uncaught.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said.get("method") == "Network.requestWillBeSent":
                self.requested.append(said["params"]["request"]["url"])
            elif said.get("method") == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said.get("method") == "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(said["params"]["args"]))

    async def _do(self, method: str, **params: Any) -> dict[str, Any]:
        self._asked += 1
        answer = self._answers[self._asked] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self._asked, "method": method, "params": params})
        said = await asyncio.wait_for(answer, SHOWN_S)
        assert "error" not in said, said
        return dict(said["result"])


@asynccontextmanager
async def browsing(profile: Path, width: int = 1280, height: int = 1000) -> AsyncIterator[Page]:
    """A browser that keeps nothing but in `profile`, and is gone when the block ends."""
    assert CHROMIUM is not None
    port = profile / "DevToolsActivePort"
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"),
        *("--remote-debugging-port=0", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(START_S):
            while not (port.exists() and port.read_text().count("\n")):
                await asyncio.sleep(0.1)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port.read_text().split()[0]}") as session:
            async with session.get("/json/list") as listed:
                (tab,) = [each for each in await listed.json() if each["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page._do(f"{domain}.enable")
                yield page
            await listening
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
