"""kill -9 in the middle of a run, then the same command: the promise that nothing is lost and little is paid again.

Runs the real command line in a process of its own, with its own sandbox; prints both figures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import postgres
from sandbox.bill import bill_path, read_lines

ROOT = Path(__file__).parents[2]
#: At half of real time these take several seconds on the fastest machine, so that half of them is seen to have ended.
DOCUMENTS = 600


class Farthing:
    """The command line with a home of its own; the sandbox runs at half of real time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("FARTHING_", "PREFECT_"))
        }
        self.environment = inherited | {"FARTHING_HOME": str(home), "FARTHING_TIME_SCALE": "0.5"}

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "farthing", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "farthing", *arguments, "--json"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
        )
        assert done.stdout, done.stderr.decode()
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def farthing(tmp_path: Path) -> Iterator[Farthing]:
    made = Farthing(tmp_path / "home")
    yield made
    subprocess.run([sys.executable, "-m", "farthing", "sandbox", "down"], cwd=ROOT, env=made.environment, check=True)


def test_after_kill_9_the_same_command_finishes_and_only_what_was_in_flight_is_paid_again(
    farthing: Farthing, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("run", "licences", "--sandbox", "--limit", str(DOCUMENTS))
    with postgres.running(farthing.home):  # so that the ledger can be looked at while the run is alive and after
        running = farthing.start(*command)
        in_flight = kill_at_half(farthing, running)
        code, audit = farthing.ask(*command)
        assert code == 0
        code, proof = farthing.ask("verify")
    assert (code, proof["proved"]) == (0, True)
    assert (audit["run"], audit["state"]) == (1, "done")
    assert audit["results"] + audit["dead_letters"] == audit["documents"] == DOCUMENTS

    bill = {line["attempt"]: line["cost_pico"] for line in read_lines(bill_path(farthing.home))}
    paid, again = sum(bill.values()), sum(bill.values()) - audit["cost_pico"]
    with capsys.disabled():
        print(
            f"\nkill -9 with {in_flight} in flight: the bill is {paid / 1e12:.6f} USD for {len(bill)} attempts; "
            f"one pass is {audit['cost_pico'] / 1e12:.6f} and {again / 1e12:.6f} was in flight "
            f"({audit['unknown_attempts']} unknown, bounded by {audit['unknown_pico'] / 1e12:.6f})"
        )
    assert 0 < audit["unknown_attempts"] <= in_flight
    assert 0 <= again <= audit["unknown_pico"]


def kill_at_half(farthing: Farthing, running: subprocess.Popen[bytes]) -> int:
    """SIGKILL the run when about half of its documents have ended; returns the open intents of that moment."""
    ended = 0
    while ended < DOCUMENTS // 2:
        assert running.poll() is None, "the run ended before it could be killed"
        time.sleep(0.1)
        ended = look(farthing, "SELECT count(*) FROM farthing.document")
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert ended < DOCUMENTS
    return look(farthing, "SELECT count(*) FROM farthing.attempt WHERE billing = 'open'")


def look(farthing: Farthing, query: str) -> int:
    import psycopg

    server = postgres.status(farthing.home)
    assert server is not None
    try:
        with psycopg.connect(server.url) as connection:
            row = connection.execute(query).fetchone()
    except psycopg.errors.UndefinedTable:
        return 0
    return int(row[0]) if row else 0
