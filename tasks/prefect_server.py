"""Making sure that the temporary server which Prefect starts for a process does not outlive it.

Prefect stops it when the process ends in good order; after SIGKILL nobody would. A small guard waits for the end of
a pipe that only this process holds, and stops the server then.
"""

from __future__ import annotations

import subprocess
import sys

from prefect.server.api.server import SubprocessASGIServer

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
