"""The temporary Prefect server of a command: started beside whatever else is slow, and gone when the command is.

Prefect would start one by itself, but only when it is first needed, and it would import all of its server here as
well; that makes a command several seconds slower. And in a terminal, Ctrl-C reaches every process of the foreground
group; the server must go on, since a lane that drains still shows what it finishes there: it gets a session of its
own. After SIGKILL a small guard stops it, which waits for the end of a pipe that only this process holds.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from typing import Any

from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

from schemas.errors import ConfigurationError

PREFECT_GONE = "Prefect's server went away: look after it, and run the same command to go on"
STOP_S = 5.0
MOST_LAUNCHES = 3
#: As Prefect starts its own: without pages, and with nothing that is only for a server that stays.
_SERVER = ("uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on")
_ENVIRONMENT = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}

#: Waits until its standard input ends, that is, until whoever started it is gone.
_GUARD = """
import os, signal, sys
sys.stdin.read()
try:
    os.kill(int(sys.argv[1]), signal.SIGTERM)
except ProcessLookupError:
    pass
"""

#: Kept so that the pipes stay open for as long as this process lives.
_guards: list[subprocess.Popen[bytes]] = []


class TemporaryServer:
    """A server on its way, or up. Until `wait` has returned nobody may ask Prefect for anything."""

    def __init__(self) -> None:
        self._launch()
        atexit.register(self.stop)

    def wait(self) -> None:
        """Return once it answers, with Prefect told to use it. Raises ConfigurationError where it does not start."""
        patience_s = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + patience_s
        launches = 1
        while not self._answers():
            if self._process.poll() is not None and launches < MOST_LAUNCHES:  # somebody else took the port
                launches += 1
                self._launch()
            elif self._process.poll() is not None:
                raise ConfigurationError(
                    "Prefect's temporary server does not start: run `prefect server start` to see why, or set "
                    "PREFECT_API_URL to a server that is up"
                )
            elif time.monotonic() > deadline:
                raise ConfigurationError(
                    f"Prefect's temporary server has not answered for {patience_s} s, this machine may be busy: "
                    "run the same command again, wait longer with "
                    f"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS={2 * patience_s}, or set PREFECT_API_URL to a "
                    "server that is up"
                )
            time.sleep(0.1)
        os.environ["PREFECT_API_URL"] = self.url
        refresh_global_settings_context()

    def stop(self) -> None:
        """End it: in order, or at once when that takes long."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _launch(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter and arguments)
            [sys.executable, "-m", *_SERVER, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _guard(self._process)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310 (our own http)
            return True
        return False


def start_temporary_server() -> TemporaryServer | None:
    """Start one, which takes seconds. None: PREFECT_API_URL is set, so there is a real server."""
    return None if PREFECT_API_URL.value() else TemporaryServer()


def require_lasting_server() -> None:
    """Raises ConfigurationError where Prefect's server would end with this process: no worker can know of it."""
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "lanes on workers need a Prefect server that they share: start it with `prefect server start`, and set "
            "PREFECT_API_URL to its address, here and for `prefect worker start`"
        )


def guard_temporary_server() -> None:
    """Let the guard watch a server that Prefect started, for a flow that our command line did not start."""
    if PREFECT_API_URL.value():
        return
    from prefect.server.api.server import SubprocessASGIServer  # only here: it imports all of the server

    server = SubprocessASGIServer()  # the process's one instance, whether it runs or not
    if server.server_process is not None and server.running:
        _guard(server.server_process)


def _guard(server: subprocess.Popen[Any]) -> None:
    guard = subprocess.Popen(  # noqa: S603 (our own interpreter, our own text, a number)
        [sys.executable, "-c", _GUARD, str(server.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _guards.append(guard)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
