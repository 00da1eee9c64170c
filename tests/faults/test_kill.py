"""A run that is ended from outside, then the same command: nothing is lost and little or nothing is paid again.

Runs the real command line in a process of its own, with its own sandbox: kill -9, and Ctrl-C as a terminal sends
it, to every process of the group. Prints what was paid twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sandbox import postgres, service
from sandbox.bill import bill_path, read_lines
from schemas.attempts import RunId
from schemas.pricing import load_price_book
from tasks.ledger import spend
from tasks.ledger.connection import Role, opened
from tasks.ledger.proof import Proof, prove
from tasks.ledger.spend import Audit, Progress

ROOT = Path(__file__).parents[2]
#: At half of real time these take several seconds on the fastest machine, so that half of them is seen to have ended.
DOCUMENTS = 600
#: A run that was interrupted drains for some seconds and says goodbye for 15 at most.
LEAVES_S = 60.0


class Farthing:
    """The command line with a home of its own; the sandbox runs at half of real time.

    Prefect's database is made once for all: that takes seconds, and is not what is tested here.
    """

    def __init__(self, home: Path, prefect: Path) -> None:
        self.home = home
        self.started: list[subprocess.Popen[bytes]] = []
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("FARTHING_", "PREFECT_"))
        }
        self.environment = inherited | {"FARTHING_HOME": str(home), "FARTHING_TIME_SCALE": "0.5"}
        self.environment["PREFECT_HOME"] = str(prefect)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A process group of its own, as a shell makes one for each command."""
        child = subprocess.Popen(
            [sys.executable, "-m", "farthing", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started.append(child)
        return child

    def ask(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "farthing", *arguments, "--json"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
        )
        assert done.stdout, done.stderr.decode()
        return done.returncode, json.loads(done.stdout)

    def processes(self) -> list[str]:
        """Every process that knows of this home: the command, its servers, their guards."""
        mine = f"FARTHING_HOME={self.home}".encode()
        return [
            found.name for found in Path("/proc").iterdir() if found.name.isdecimal() and mine in environ_of(found)
        ]


def environ_of(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


@pytest.fixture
def farthing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farthing]:
    made = Farthing(tmp_path / "home", tmp_path_factory.getbasetemp() / "prefect")
    yield made
    for left in made.started:
        left.kill()  # a test that failed must not leave anything behind
        left.wait()
    stop = [sys.executable, "-m", "farthing", "sandbox", "down", "--force"]
    subprocess.run(stop, cwd=ROOT, env=made.environment, check=True)


@pytest.mark.long  # a minute and a half
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


@pytest.mark.long  # a minute and a half
def test_ctrl_c_in_a_terminal_pauses_a_second_one_gives_up_and_the_same_command_finishes(farthing: Farthing) -> None:
    """Ctrl-C reaches the whole group: the command drains, and neither it nor what it started may die of it."""
    command = ("run", "licences", "--sandbox", "--limit", str(DOCUMENTS))
    running = farthing.start(*command)
    await_documents(farthing, running, 20)
    interrupt(running)
    assert running.wait(LEAVES_S) == 3
    assert_left_nothing(farthing)
    assert farthing.ask("status", "1")[1]["state"] == "paused"
    with postgres.running(farthing.home) as server:
        drained = look_after(server.url)
        assert drained.unknown_attempts == 0

        running = farthing.start(*command)
        await_documents(farthing, running, drained.done + 20)
        hang_some(farthing)
        code, refused = farthing.ask("sandbox", "down")  # and meanwhile some hang
        assert (code, refused["exit_code"]) == (2, 2)
        assert f"run 1 (its lane is process {running.pid})" in refused["error"]
        interrupt(running)
        time.sleep(1)
        assert running.poll() is None, "it did not wait for what was in flight"
        interrupt(running)
        assert running.wait(LEAVES_S) == 3
        given_up = look_after(server.url)
        assert given_up.unknown_attempts > 0

        code, audit = farthing.ask(*command)
        assert (code, audit["run"], audit["proved"]) == (0, 1, True)
    assert audit["results"] + audit["dead_letters"] == audit["documents"] == DOCUMENTS
    again = sum(line["cost_pico"] for line in read_lines(bill_path(farthing.home))) - audit["cost_pico"]
    # Fewer, where replies had come that waited on disk: whoever resumes the run records them.
    assert 0 < audit["unknown_attempts"] <= given_up.unknown_attempts
    assert 0 <= again <= audit["unknown_pico"]
    assert_left_nothing(farthing)


@pytest.mark.long
def test_one_lane_process_killed_of_two_is_taken_over_and_the_command_still_succeeds(farthing: Farthing) -> None:
    """A pool that loses a process ends its others, so each lane has one of its own."""
    documents = 1500  # two shards, so that both lanes have one
    command = ("run", "licences", "--sandbox", "--lanes", "2", "--limit", str(documents))
    with postgres.running(farthing.home):
        running = farthing.start(*command)
        pid = 0
        while not pid:
            assert running.poll() is None, "the run ended before a lane could be killed"
            time.sleep(0.1)
            pid = look(farthing, WORKING)
        os.kill(pid, signal.SIGKILL)
        assert running.wait(240) == 0
        left = look_at(farthing, "SELECT min(ended_because), max(ended_because) FROM farthing.lane")
        assert left == ("died", "done")
        code, audit = farthing.ask("audit", "1")
        assert (code, audit["state"], audit["results"] + audit["dead_letters"]) == (0, "done", documents)
        assert farthing.ask("verify")[1]["proved"] is True


#: The process of a lane that has answered something, while both are at work.
WORKING = """SELECT coalesce(max(pid), 0) FROM farthing.lane
             WHERE attempts > 20 AND (SELECT count(*) FROM farthing.lane) = 2"""


def await_documents(farthing: Farthing, running: subprocess.Popen[bytes], many: int) -> None:
    """Return when so many documents of the run that goes on have ended and more are in flight."""
    query = "SELECT (SELECT count(*) FROM farthing.document), (SELECT sum(in_flight) FROM farthing.lane)"
    ended, in_flight = 0, 0
    while ended < many or not in_flight:
        assert running.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.1)
        ended, in_flight = look_at(farthing, query) or (0, 0)
    assert ended < DOCUMENTS


def interrupt(running: subprocess.Popen[bytes]) -> None:
    """Ctrl-C: SIGINT to the foreground process group."""
    os.killpg(running.pid, signal.SIGINT)


def hang_some(farthing: Farthing) -> None:
    """From now on a third of the requests get no reply."""
    endpoint = service.status(farthing.home).endpoint
    assert endpoint is not None
    rules = json.dumps([{"kind": "hang", "share": 0.3}]).encode()
    urllib.request.urlopen(f"{endpoint.url}/sandbox/mishaps", rules).close()


def look_after(url: str) -> Audit:
    """The run says that it was interrupted, in one voice, and proves. Returns its audit."""

    async def ask() -> tuple[Progress, Audit, Proof]:
        async with opened(SecretStr(url), Role.LANE, pool_size=1) as ledger:
            progress, audit = await spend.progress(ledger, 1, counts_open=True), await spend.audit(ledger, run=1)
            return progress, audit, await prove(ledger, RunId(1), load_price_book())

    status, audit, proof = asyncio.run(ask())
    assert proof.proved, proof.evidence
    assert (audit.state, audit.reason) == ("paused", "interrupted")
    same = ("state", "cost_pico", "unknown_pico", "attempts", "results", "dead_letters")
    assert [getattr(status, name) for name in same] == [getattr(audit, name) for name in same]
    return audit


def assert_left_nothing(farthing: Farthing) -> None:
    """Guards take a moment to see that their command is gone."""
    deadline = time.monotonic() + LEAVES_S
    while farthing.processes():
        assert time.monotonic() < deadline, farthing.processes()
        time.sleep(0.1)


def look(farthing: Farthing, query: str) -> int:
    row = look_at(farthing, query)
    return int(row[0]) if row else 0


def look_at(farthing: Farthing, query: str) -> tuple[Any, ...] | None:
    """One row of the sandbox's ledger; None while there is none."""
    import psycopg

    server = postgres.status(farthing.home)
    if server is None:
        return None
    try:
        with psycopg.connect(server.url) as connection:
            return connection.execute(query).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.OperationalError):
        return None
