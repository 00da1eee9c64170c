"""What the README's commands leave behind, and what tests do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.bill import bill_path, read_lines
from tests.prefect_servers import ROOT, PrefectServer


@dataclass
class Played:
    """What the README's commands leave behind: a sandbox with a ledger, and a worker that tests may end and start."""

    server: PrefectServer
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
                preexec_fn=_hear_interrupts,
            )

    def kill_worker(self) -> None:
        """Without a word, as when a machine is lost. What it has started is in sessions of their own, and stays."""
        with suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()

    def farthing(self, *arguments: str) -> dict[str, Any]:
        """The object that a command prints that runs something in this sandbox."""
        said = self.server.command("farthing", *arguments, "--sandbox", "--quiet", "--json")
        return dict(json.loads(said))

    def bill(self, *run_ids: int) -> dict[str, int]:
        """What the provider billed of these runs, by attempt, oldest first: its own file, its own arithmetic."""
        lines = read_lines(bill_path(Path(self.server.environment["FARTHING_HOME"])))
        return {
            each["attempt"]: each["cost_pico"] for each in lines if int(each["attempt"].partition(".")[0]) in run_ids
        }

    def ask_provider(self, method: str, page: str, body: object = None) -> Any:
        """One of the emulator's own pages, such as `mishaps`."""
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.sandbox['DEEPSEEK_BASE_URL']}/sandbox/{page}", raw, method=method)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    @contextmanager
    def slow_replies(self, pause_s: float = 0.4) -> Iterator[None]:
        """Each reply takes five such pauses or so, that something is in flight whenever a test looks."""
        self.ask_provider("POST", "mishaps", [{"kind": "trickle", "args": {"bytes": 512, "pause": pause_s}}])
        try:
            yield
        finally:
            self.ask_provider("DELETE", "mishaps")


def _hear_interrupts() -> None:
    """A shell's background commands, and all that these start, would ignore them; a service's process does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
