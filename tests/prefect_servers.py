"""A real Prefect server, started as the README's section `On a schedule` does, and what tests ask of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
_SECTION = (ROOT / "README.md").read_text("utf-8").split("\n## On a schedule\n")[1]
README_S_SCHEDULE = [line.removeprefix("$ ") for line in _SECTION.split("```")[1].splitlines()[1:]]
#: `PREFECT_CLIENT_MAX_RETRIES`: what users wait for a server that is gone is Prefect's, and not tested here.
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLIENT_MAX_RETRIES": "0"}
#: States in which a flow run stays.
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "CRASHED"})

T = TypeVar("T")


def eventually(look: Callable[[], T | None], within_s: float = 300.0) -> T:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"nothing came of it within {within_s} s"
        time.sleep(0.2)
    return found


@dataclass
class PrefectServer:
    """A server with a home of its own, at an address that stays the same."""

    home: Path
    port: int
    #: The shell that leads the group of the server's processes.
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        """In which commands use it: a home of Farthing's own whose sandbox answers at once, a folder for reports."""
        return _environment(self.home, self.port) | {
            "FARTHING_HOME": str(self.home / "farthing"),
            "FARTHING_TIME_SCALE": "0",
            "FARTHING_REPORTS": str(self.home / "reports"),
            "FARTHING_REPORTS_URL": "https://reports.example/farthing/",
        }

    @property
    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            with urllib.request.urlopen(f"{self.url}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    @property
    def log(self) -> str:
        return (self.home / "prefect.log").read_text()

    def kill(self) -> None:
        """Without a word, as the kernel would when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, **wanted: Any) -> Any:
        """What the server has of this kind; `wanted` narrows it, in the words of Prefect's filters."""
        return json.loads(self._ask("POST", path, json.dumps(wanted).encode()))

    def delete(self, path: str) -> None:
        self._ask("DELETE", path)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=body, headers=headers, method=method)
        for _ in range(60):
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return bytes(reply.read())
            except urllib.error.HTTPError as refusal:
                if refusal.code != 503:  # its SQLite is busy, and nothing was done
                    raise
                time.sleep(1)
        raise AssertionError(f"the Prefect server is too busy for {path}")

    def command(self, *arguments: str, **environment: str) -> str:
        """What it says on stdout."""
        done = subprocess.run(
            arguments, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, deployment: str, due: str | None = None, **parameters: Any) -> str:
        """A flow run of a deployment, as somebody would start it now or a schedule did; returns its id."""
        (found,) = self.post("deployments/filter", deployments={"name": {"any_": [deployment]}})
        details = {"scheduled_time": due} if due else {}
        state = {"type": "SCHEDULED", "state_details": details}
        return str(self.post(f"deployments/{found['id']}/create_flow_run", parameters=parameters, state=state)["id"])

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        (found,) = self.post("flow_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}})
        return dict(found)

    def change_state(self, flow_run_id: str, kind: str, name: str | None = None, *, force: bool = False) -> None:
        """As a button of Prefect's pages does."""
        state = {"type": kind, "name": name, "message": "by an operator"}
        said = self.post(f"flow_runs/{flow_run_id}/set_state", state=state, force=force)
        assert said["status"] == "ACCEPT", said

    def end(self, flow_run_id: str, within_s: float = 300.0) -> dict[str, Any]:
        """The flow run, once it has ended."""

        def look() -> dict[str, Any] | None:
            seen = self.flow_run(flow_run_id)
            return seen if seen["state_type"] in ENDED else None

        return eventually(look, within_s)


@contextmanager
def prefect_server(home: Path, port: int) -> Iterator[PrefectServer]:
    """The server of the README's command, for as long as the block lasts or until it is killed."""
    (start,) = [line for line in README_S_SCHEDULE if line.startswith("prefect server start")]
    environment = _environment(home, port)
    process = subprocess.Popen(["bash", "-c", f"{start} wait"], cwd=home, env=environment, start_new_session=True)
    server = PrefectServer(home, port, process)
    try:
        eventually(lambda: server.is_healthy, 300)
        yield server
    finally:
        if process.poll() is None:
            server.kill()


def _environment(home: Path, port: int) -> dict[str, str]:
    """Tests do not wait for what a server gathers before it writes, or a worker between two looks at what is due."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
