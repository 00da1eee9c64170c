"""Prefect servers for tests: real ones, each with a home of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.stage import wait_until

#: `PREFECT_CLIENT_MAX_RETRIES`: what users wait for a server that is gone is Prefect's, and not tested here.
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLIENT_MAX_RETRIES": "0"}


@dataclass
class PrefectServer:
    """A real one, at an address that stays the same."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def post(self, path: str, **wanted: Any) -> Any:
        """What the server has of this kind; `wanted` narrows it, in the words of Prefect's filters."""
        body = json.dumps(wanted).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=body, headers=headers, method="POST")
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def kill(self) -> None:
        """Without a word, as the kernel would when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_healthy(self) -> bool:
        assert self.process.poll() is None, (self.home / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def prefect_server(home: Path, port: int) -> Iterator[PrefectServer]:
    environment = os.environ | {"PREFECT_HOME": str(home / "prefect"), **QUIET}
    arguments = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, start_new_session=True)
    server = PrefectServer(home, port, process)
    try:
        assert wait_until(lambda: server.is_healthy, 120), (home / "server.log").read_text()
        yield server
    finally:
        if process.poll() is None:
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
