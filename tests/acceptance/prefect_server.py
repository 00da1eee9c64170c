"""A Prefect server with a worker, as the README's section `On a schedule` starts them, and what tests ask them."""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
_SECTION = (ROOT / "README.md").read_text("utf-8").split("\n## On a schedule\n")[1]
README_S_SCHEDULE = [line.removeprefix("$ ") for line in _SECTION.split("```")[1].splitlines()[1:]]
#: States in which a flow run stays.
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "CRASHED"})

T = TypeVar("T")


def eventually(look: Callable[[], T | None], within_s: float = 120.0) -> T:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"nothing came of it within {within_s} s"
        time.sleep(0.2)
    return found


@dataclass(frozen=True)
class Server:
    """A Prefect server of its own, and the environment in which commands use it."""

    url: str
    environment: dict[str, str]

    def post(self, path: str, **wanted: Any) -> Any:
        """What the server has of this kind; `wanted` narrows it, in the words of Prefect's filters."""
        body = json.dumps(wanted).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        for _ in range(60):
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as refusal:
                if refusal.code != 503:  # its SQLite is busy, and nothing was done
                    raise
                time.sleep(1)
        raise AssertionError(f"the Prefect server is too busy for {path}")

    def delete(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{path}", method="DELETE")).close()

    def command(self, *arguments: str) -> str:
        done = subprocess.run(arguments, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
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

    def end(self, flow_run_id: str, within_s: float = 180.0) -> dict[str, Any]:
        """The flow run, once it has ended."""

        def look() -> dict[str, Any] | None:
            seen = self.flow_run(flow_run_id)
            return seen if seen["state_type"] in ENDED else None

        return eventually(look, within_s)


@contextmanager
def serving(home: Path) -> Iterator[Server]:
    """The server of the README's command, at a port of its own, for as long as the block lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",  # how often a worker looks for what is due: tests do not wait for it
        "FARTHING_HOME": str(home / "farthing"),
        "FARTHING_TIME_SCALE": "0",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (start,) = [line for line in README_S_SCHEDULE if line.startswith("prefect server start")]
    shell = subprocess.Popen(["bash", "-c", f"{start} wait"], cwd=home, env=environment, start_new_session=True)
    try:
        wait_until_healthy(f"{url}/health")
        yield Server(url, environment)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(30)


def wait_until_healthy(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError("the Prefect server did not answer: see fastapi's pin in pyproject.toml")


@dataclass
class Played:
    """What the README's commands leave behind: a sandbox with a ledger, and a worker that tests may end and start."""

    server: Server
    ledger_url: str
    #: The addresses of the sandbox, as variables.
    sandbox: dict[str, str]
    #: The process that leads the worker's group.
    worker: subprocess.Popen[bytes]
    log: Path

    def start_worker(self) -> None:
        """Another one; whoever starts it has ended the one before."""
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(
                ["prefect", "worker", "start", "--pool", "farthing"],
                cwd=ROOT,
                env=self.server.environment | self.sandbox,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_worker(self) -> None:
        """Without a word, as when a machine is lost. What it has started is in sessions of their own, and stays."""
        with suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()

    def ask_provider(self, method: str, page: str, body: object = None) -> Any:
        """One of the emulator's own pages, such as `mishaps`."""
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.sandbox['DEEPSEEK_BASE_URL']}/sandbox/{page}", raw, method=method)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    @contextmanager
    def slow_replies(self) -> Iterator[None]:
        """Each reply takes about two seconds, so that something is in flight whenever a test looks."""
        self.ask_provider("POST", "mishaps", [{"kind": "trickle", "args": {"bytes": 512, "pause": 0.4}}])
        try:
            yield
        finally:
            self.ask_provider("DELETE", "mishaps")
