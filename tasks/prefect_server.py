"""Making sure that the temporary server which Prefect starts for a process neither dies before it nor outlives it.

In a terminal, Ctrl-C reaches every process of the foreground group; the server must go on, since a lane that drains
still shows what it finishes there: it gets a session of its own. And Prefect stops it only when the process ends in
good order: after SIGKILL a small guard does, which waits for the end of a pipe that only this process holds.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL

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


def start_temporary_server() -> None:
    """Start it now, in a session of its own. With PREFECT_API_URL set there is a real server, and nothing to do."""
    if PREFECT_API_URL.value():
        return
    popen = subprocess.Popen
    # Prefect has no setting for this and starts the server in one place, with this function.
    subprocess.Popen = partial(popen, start_new_session=True)  # type: ignore[assignment,misc]
    try:
        SubprocessASGIServer().start()
    finally:
        subprocess.Popen = popen  # type: ignore[misc]


def guard_temporary_server() -> None:
    """Start the guard, if Prefect started a server for this process. Against a real server there is nothing to do."""
    server = SubprocessASGIServer()  # the process's one instance, whether it runs or not
    if server.server_process is None or not server.running:
        return
    guard = subprocess.Popen(  # noqa: S603 (our own interpreter, our own text, a number)
        [sys.executable, "-c", _GUARD, str(server.server_process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _guards.append(guard)
