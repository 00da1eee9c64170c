"""How soon work goes on after a crash, and what the crash costs: measured, and held to the promise."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from sandbox.bill import bill_path
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tasks.ledger.upgrades import upgrade
from tests.faults.checker import read_bill
from tests.faults.hurtable import HurtablePostgres, hurtable
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

#: What others do as soon as a lane's session is gone, but for a restart of Postgres that cuts everyone off.
SHORT_LEASE = LeaseTimes(grace_s=5.0)
#: The promise, in seconds: from a killed lane, or from Postgres being back, to the next intent.
AFTER_LANE_S, AFTER_POSTGRES_S = 10.0, 15.0
#: One after the other, by one worker: they measure, while another worker plays what it likes.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("recovery")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HurtablePostgres]:
    with hurtable(tmp_path_factory.mktemp("recovery")) as server:
        upgrade(SecretStr(server.server.url))
        yield server


@pytest.fixture(scope="module")
def stage(server: HurtablePostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("stage")
    with staged(root, server.server.url, documents=300, time_scale=1, reply=0.5) as made:
        made.remember_baseline()
        yield made


def attempts_of(stage: Stage, child: ForkServerProcess) -> int:
    query = f"SELECT count(*) FROM attempt_intent JOIN lane USING (run_id, lane_id) WHERE pid = {child.pid}"
    return int(stage.value(query))


@pytest.mark.parametrize("times", [SHORT_LEASE, USUAL_TIMES], ids=["short", "usual"])
def test_another_lane_soon_goes_on_with_the_work_of_a_killed_one(
    times: LeaseTimes, stage: Stage, tally: Tally
) -> None:
    stage.scene()
    stage.times, stage.starts = times, 2
    killed, other = stage.start(), stage.start()
    assert wait_until(lambda: attempts_of(stage, killed) > 20 and attempts_of(stage, other) > 20), stage.told()
    killed.kill()
    killed.join()
    of_killed = f"lane_id = (SELECT lane_id FROM lane WHERE pid = {killed.pid}) AND state = 'leased'"
    held = f"SELECT array_agg(shard_no) FROM shard WHERE {of_killed}"
    shards, since = stage.value(held), stage.value("SELECT extract(epoch FROM clock_timestamp())")
    assert shards, "the killed lane held nothing"
    assert stage.wait(other) == 0, stage.told()
    resumed = stage.value(
        f"SELECT extract(epoch FROM min(intended_at)) FROM attempt_intent JOIN lane USING (run_id, lane_id)"
        f" WHERE pid = {other.pid} AND shard_no IN ({', '.join(map(str, shards))})"
    )
    found = stage.violations()
    assert found == [], f"{found}\n{stage.told()}"
    lease = "the usual lease" if times is USUAL_TIMES else "a short lease"
    tally.count("SIGKILL")
    tally.figure(f"resumed after a killed lane, {lease}", f"{resumed - since:.1f} s")
    assert resumed - since <= AFTER_LANE_S


def test_lanes_soon_go_on_when_a_killed_postgres_is_back(
    stage: Stage, server: HurtablePostgres, scale: float, tally: Tally
) -> None:
    """Away for a moment or for long: whoever waits for it asks again often enough."""
    took: list[float] = []
    for away_s in (0.0, 5.0, 12.0)[: max(1, round(3 * scale))]:
        stage.scene()
        stage.times, stage.starts, before = USUAL_TIMES, 1, stage.run_id
        child = stage.start()
        intents = f"SELECT count(*) FROM attempt_intent WHERE run_id > {before}"
        assert wait_until(lambda intents=intents: stage.value(intents) > 20), stage.told()
        server.hurt(signal.SIGKILL, away_s)
        back = stage.value("SELECT extract(epoch FROM clock_timestamp())")
        assert stage.wait(child) == 0, stage.told()
        took.append(
            stage.value(
                f"SELECT extract(epoch FROM min(intended_at)) - {back} FROM attempt_intent"
                f" WHERE run_id > {before} AND intended_at > to_timestamp({back})"
            )
        )
        found = stage.violations()
        assert found == [], f"{found}\n{stage.told()}"
    tally.count("Postgres killed", len(took))
    tally.figure("resumed after a killed Postgres is back", f"{max(took):.1f} s at most of {len(took)}")
    assert max(took) <= AFTER_POSTGRES_S


@pytest.fixture
def wide(server: HurtablePostgres, tmp_path: Path, scale: float) -> Iterator[Stage]:
    """The width of DeepSeek's own limit, and replies so slow that it is what binds, not this machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    in_flight = max(100, int(2500 * scale))
    with staged(
        tmp_path,
        server.server.url,
        documents=6 * in_flight,
        in_flight=in_flight,
        reply_within_s=120,
        time_scale=1,
        reply=8,
    ) as made:
        made.deadline_s = 300.0
        made.change_job(concurrency=in_flight, shard_rows=in_flight // 5, budget="50 USD")
        yield made
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_kill_at_the_plateau_pays_again_only_for_what_was_in_flight(wide: Stage, tally: Tally) -> None:
    wide.scene()
    before = wide.run_id
    child = wide.start()
    open_ones = f"SELECT count(*) FROM attempt WHERE run_id > {before} AND billing = 'open'"
    plateau, half = int(0.9 * wide.in_flight), wide.documents // 2

    def is_at_its_plateau() -> bool:
        now = wide.ask_sandbox("GET", "status")
        return sum(now["in_flight"].values()) >= plateau or now["requests"] >= half

    assert wait_until(is_at_its_plateau, 240), wide.told()
    assert child.exitcode is None, f"the run ended before so many were in flight: {wide.told()}"
    child.kill()
    child.join()
    in_flight = wide.value(open_ones)
    assert in_flight >= 0.7 * wide.in_flight, wide.told()
    open_documents = f"SELECT document_no FROM attempt WHERE run_id > {before} AND billing = 'open'"
    were_open = {number for (number,) in rows(wide, open_documents)}
    wide.resume()
    found = wide.violations()
    assert found == [], f"{found}\n{wide.told()}"
    unknown = f"SELECT document_no FROM attempt_unknown WHERE run_id > {before}"
    assert {number for (number,) in rows(wide, unknown)} <= were_open
    tally.count("SIGKILL")
    tally.figure("paid again after a kill at the plateau", again(wide, before, in_flight))


def again(stage: Stage, before: int, in_flight: int) -> str:
    """The share of attempts and of money that a kill made unknown, in words."""
    [(unknown, attempts, known)] = rows(
        stage,
        "SELECT count(*) FILTER (WHERE u.because = 'lane died'), count(*), sum(coalesce(o.cost, 0))"
        " FROM attempt_intent i LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)"
        f" LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no) WHERE i.run_id > {before}",
    )
    billed = sum(line.cost for line in read_bill(bill_path(stage.root)))
    return (
        f"{stage.in_flight:,} allowed in flight, {in_flight:,} sent or come and not yet on the ledger: "
        f"{unknown:,} of {attempts:,} attempts unknown ({unknown / attempts:.1%}), "
        f"{(billed - int(known)) / 1e12:.4f} of {billed / 1e12:.4f} USD"
    )


def rows(stage: Stage, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(stage.database_url, options="-c search_path=farthing") as connection:
        return connection.execute(query).fetchall()
