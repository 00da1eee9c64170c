"""A run in one terminal, steered from another: commands in processes of their own, over the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
#: At two in flight, and a second for a reply, that takes minutes.
DOCUMENTS = 400
BEGUN_WITHIN_S = 120.0


@dataclass
class Desk:
    """A folder with a job, and terminals in it."""

    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "farthing", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        made = subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)  # type: ignore[call-overload]  # the pipes are pipes
        self.started.append(made)
        return made

    def farthing(self, *arguments: str) -> dict[str, Any]:
        """The object that a command prints."""
        stdout, stderr = self.start(*arguments, "--json").communicate(timeout=120)
        assert self.started[-1].returncode == 0, stderr
        found: dict[str, Any] = json.loads(stdout)
        return found


#: What integration/test_steering.py shows with lanes in its own process.
pytestmark = pytest.mark.long


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FARTHING_", "PREFECT_"))}
    made = Desk(tmp_path, inherited | {"FARTHING_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)})
    made.farthing("new", "tickets")
    job = tmp_path / "jobs/tickets/job.yaml"
    job.write_text(f"{job.read_text()}\nconcurrency: 2\n")
    texts = [f"Ticket {number}: where is my parcel?" for number in range(DOCUMENTS)]
    (tmp_path / "data/tickets").mkdir(parents=True)
    pq.write_table(
        pa.table({"id": [f"t{n}" for n in range(DOCUMENTS)], "text": texts}), tmp_path / "data/tickets/1.parquet"
    )
    made.farthing("sandbox", "up")
    yield made
    for left in made.started:
        if left.poll() is None:
            left.kill()
            left.wait()
    made.farthing("sandbox", "reset", "--yes", "--force")


def wait_for_lanes(desk: Desk, running: subprocess.Popen[str], lanes: int) -> None:
    """Until so many are at work and something has ended."""
    for _ in range(int(BEGUN_WITHIN_S)):
        assert running.poll() is None, running.communicate()
        asked = desk.start("status", "--json")
        stdout, _ = asked.communicate(timeout=60)
        if asked.returncode == 0 and (seen := json.loads(stdout))["lanes"] == lanes and seen["attempts"] > 3:
            return
        time.sleep(2)
    raise AssertionError("the run did not begin")


def test_a_run_is_limited_paused_and_given_another_budget_from_another_terminal(desk: Desk) -> None:
    running = desk.start("run", "tickets", "--sandbox", "--json", "--quiet")
    wait_for_lanes(desk, running, 1)
    assert desk.farthing("limit", "tickets", "flash=6")["ceilings"] == {"flash": 6, "pro": 2}
    assert desk.farthing("budget", "1", "3 USD")["was_pico"] == 10**12
    paused = desk.farthing("pause")
    assert (paused["run"], paused["changed"], paused["lanes"]) == (1, True, 1)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 3, stderr
    audit = json.loads(stdout)
    assert (audit["state"], audit["reason"], audit["proved"], audit["unknown_pico"]) == (
        "paused",
        "operator",
        True,
        0,
    )
    assert 0 < audit["results"] < DOCUMENTS
    assert audit["advice"] == "`farthing pause` stopped this run: run the same command to go on"
    assert audit["advice"] in stderr
    status = desk.farthing("status")
    assert (status["ceilings"], status["concurrency"]) == ({"flash": 6, "pro": 2}, {"flash": 2, "pro": 2})
    assert status["budget_pico"] == 3 * 10**12
    assert {"limit_changed", "cap_changed", "paused"} <= {event["kind"] for event in status["events"]}
