"""Off-peak over real lanes: a run over the edge of a peak sends nothing in it, says why it waits, and goes on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from structlog.testing import capture_logs

from sandbox.bill import bill_path, read_lines
from sandbox.tariff import charge_at
from schemas.attempts import Call, Reply
from schemas.errors import ConfigurationError, UnknownPrice
from schemas.jobs import When
from tasks import enrichment
from tasks.completions import Completions
from tasks.lanes import Ended
from tasks.ledger import runs
from tasks.ledger.connection import Role, opened
from tasks.ledger.runs import Run
from tasks.ledger.spend import Audit, audit, progress
from tests.world import World, make_world

#: A Thursday. The ladder's longest deadline is 5 s, so the guard begins at 00:57:55 and the peak at 01:00:00.
BEFORE, GUARD, PEAK, AFTER = (f"2026-09-24T{clock}Z" for clock in ("00:50:00", "00:58:30", "02:00:00", "04:00:10"))
DOCUMENTS = 200
OFF_PEAK: dict[str, Any] = {"when": When.OFF_PEAK}


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url, documents=DOCUMENTS) as made:
        await set_clock(made, BEFORE)
        yield made


async def set_clock(world: World, now: str) -> None:
    """As an operator of the sandbox does: the lane hears of it only from the provider."""
    async with httpx2.AsyncClient() as client:
        reply = await client.post(f"{world.settings.base_url}/sandbox/clock", json={"now": now})
        assert reply.status_code == 200, reply.text


def bill(world: World) -> list[dict[str, Any]]:
    return list(read_lines(bill_path(world.root)))


def move_clock_at(monkeypatch: pytest.MonkeyPatch, world: World, attempt: int, now: str) -> None:
    """Let the provider's clock jump as the lane sends its attempt of that number."""
    complete, count = Completions.complete, 0

    async def complete_and_move(self: Completions, call: Call) -> Reply:
        nonlocal count
        count += 1
        if count == attempt:
            world.server.house.clock.set(datetime.fromisoformat(now))
        return await complete(self, call)

    monkeypatch.setattr(Completions, "complete", complete_and_move)


async def wait_for_reason(world: World, run: Run, why: str) -> str:
    """What `farthing status` says, once it says why."""
    async with asyncio.timeout(20), opened(enrichment.require_database(world.settings), Role.AUDITOR) as ledger:
        while why not in (said := (await progress(ledger, run.run_id)).waiting_because or ""):
            await asyncio.sleep(0.05)
        return said


@asynccontextmanager
async def at_work(world: World, **request: Any) -> AsyncIterator[tuple[Run, asyncio.Task[Ended]]]:
    """A run with a lane at work; however the test ends, the lane leaves."""
    run = await world.open(**request)
    lane = asyncio.create_task(world.work(run, **request))
    try:
        yield run, lane
    finally:
        lane.cancel()
        await asyncio.gather(lane, return_exceptions=True)


async def read_audit(world: World, run: Run) -> Audit:
    async with opened(enrichment.require_database(world.settings), Role.AUDITOR) as ledger:
        return await audit(ledger, run=run.run_id)


def more_at_peak(lines: list[dict[str, Any]]) -> int:
    """What the provider would have billed more for the same tokens in a peak, by its own tariff."""
    peak = datetime.fromisoformat(PEAK)
    costs = [
        charge_at(line["served_model"], "USD", peak).price.cost(line["hit"], line["miss"], line["output"])
        for line in lines
    ]
    return sum(costs) - sum(line["cost_pico"] for line in lines)


async def settled(world: World, run: Run, lane: asyncio.Task[Ended]) -> Run:
    ended = await asyncio.wait_for(lane, 30)
    return await enrichment.settle_run(world.settings, run, [ended])


async def test_a_run_over_a_peak_sends_nothing_in_it_and_goes_on_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_clock_at(monkeypatch, world, 60, GUARD)
    async with at_work(world, **OFF_PEAK) as (run, lane):
        said = await wait_for_reason(world, run, "peak")
        assert "begin at 09:00 Beijing (01:00 UTC)" in said
        before = len(bill(world))
        intents = world.value("SELECT count(*) FROM attempt_intent")
        assert 60 <= before < DOCUMENTS
        await set_clock(world, PEAK)
        assert await wait_for_reason(world, run, "peak prices until") == (
            "peak prices until 12:00 Beijing (04:00 UTC); off-peak saves half"
        )
        assert len(bill(world)) == before
        assert world.value("SELECT count(*) FROM attempt_intent") == intents
        assert world.value("SELECT coalesce(sum(in_flight), 0) FROM lane") == 0
        await set_clock(world, AFTER)
        assert (await settled(world, run, lane)).state == "done"
    lines = bill(world)
    assert {line["band"] for line in lines} == {"off-peak"}
    assert {line["at"] < PEAK for line in lines} == {True, False}
    assert not [line for line in lines if "2026-09-24T01:00:00Z" <= line["at"] < "2026-09-24T04:00:00Z"]
    assert world.value("SELECT count(*) FROM result") == DOCUMENTS
    held_back = "sent_at >= '2026-09-24T00:57:55Z' AND sent_at < '2026-09-24T04:00:05Z'"  # by what the lane knew
    assert world.value(f"SELECT count(*) FROM attempt WHERE signal <> 'not_sent' AND {held_back}") == 0
    booked = world.value("SELECT sum(cost_pico) FROM attempt")
    assert booked == sum(line["cost_pico"] for line in lines)
    assert world.value("SELECT count(*) FROM attempt WHERE unknown_pico > 0") == 0
    found = await read_audit(world, run)
    assert found.off_peak_attempts == len(lines)
    assert found.off_peak_saved_pico == more_at_peak(lines) > 0


async def test_a_run_that_may_work_at_any_hour_goes_on_at_peak_prices(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_clock_at(monkeypatch, world, 60, PEAK)
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("done", "done")
    assert {line["band"] for line in bill(world)} == {"off-peak", "peak"}
    found = await read_audit(world, run)
    assert (found.off_peak_attempts, found.off_peak_saved_pico) == (0, 0)


@pytest.mark.long
async def test_only_attempts_of_lanes_that_would_have_waited_count_as_saved(world: World) -> None:
    paused, _ = await world.run(budget="0.002 USD", **OFF_PEAK)
    lines = bill(world)
    run, _ = await world.run(budget="1 USD")
    assert (paused.state, run.run_id, run.state) == ("paused", paused.run_id, "done")
    found = await read_audit(world, run)
    assert found.off_peak_attempts == len(lines) < len(bill(world))
    assert found.off_peak_saved_pico == more_at_peak(lines) > 0


async def test_a_run_that_starts_in_a_peak_makes_no_attempt_not_even_to_prime(world: World) -> None:
    await set_clock(world, PEAK)
    async with at_work(world, **OFF_PEAK) as (run, lane):
        await wait_for_reason(world, run, "peak prices until 12:00 Beijing")
        assert world.value("SELECT count(*) FROM attempt_intent") == 0
        await set_clock(world, AFTER)
        assert (await settled(world, run, lane)).state == "done"
    assert {line["band"] for line in bill(world)} == {"off-peak"}


@pytest.mark.long
async def test_ctrl_c_while_it_waits_ends_it_paused_at_once_and_the_policy_is_that_of_the_next_start(
    world: World,
) -> None:
    job = world.root / "jobs" / "colours" / "job.yaml"
    job.write_text(f"{job.read_text()}when: off-peak\n")
    await set_clock(world, PEAK)
    with capture_logs() as logs:
        async with at_work(world) as (run, lane):
            await wait_for_reason(world, run, "peak prices until")
            signal.raise_signal(signal.SIGINT)
            left = await settled(world, run, lane)
    assert [line["event"] for line in logs].count("waits for off-peak prices") == 1  # not of each document
    assert (left.state, left.reason) == ("paused", "interrupted")
    assert world.value("SELECT count(*) FROM attempt_intent") == 0
    assert world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL") == 0
    assert world.value("SELECT granted FROM budget") == 0
    resumed, _ = await world.run(when=When.NOW)
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert {line["band"] for line in bill(world)} == {"peak"}


async def test_a_pause_from_elsewhere_ends_the_wait(world: World) -> None:
    await set_clock(world, PEAK)
    async with at_work(world, **OFF_PEAK) as (run, lane):
        await wait_for_reason(world, run, "peak prices until")
        async with opened(enrichment.require_database(world.settings), Role.LANE) as ledger:
            await runs.change_state(ledger, run.run_id, "paused", "operator")
        assert (await asyncio.wait_for(lane, 20)).reason == "paused"
    assert bill(world) == []


async def test_a_run_that_has_time_enough_waits_and_one_that_has_not_buys_as_late_as_it_can(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of work are left: with an hour of off-peak time before the end the run waits for that."""
    move_clock_at(monkeypatch, world, 60, GUARD)
    async with at_work(world, finish_by="2026-09-24T05:00Z") as (run, lane):
        await wait_for_reason(world, run, "there is time enough to finish by 13:00 Beijing (05:00 UTC)")
        signal.raise_signal(signal.SIGINT)
        assert (await settled(world, run, lane)).state == "paused"
    assert {line["band"] for line in bill(world)} == {"off-peak"}
    before = len(bill(world))
    async with at_work(world, finish_by="2026-09-24T03:00Z") as (again, lane):
        assert again.run_id == run.run_id
        assert (await settled(world, run, lane)).state == "done", "nothing is off-peak before the end"
    assert len(bill(world)) > before


async def test_money_is_given_back_while_it_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of a shared budget may need it."""
    move_clock_at(monkeypatch, world, 60, GUARD)
    async with at_work(world, **OFF_PEAK) as (run, _lane):
        await wait_for_reason(world, run, "peak prices begin")
        async with asyncio.timeout(20):
            while world.value("SELECT granted FROM budget") != world.value("SELECT sum(cost_pico) FROM attempt"):
                await asyncio.sleep(0.05)


async def test_an_end_that_is_past_starts_nothing(world: World) -> None:
    with pytest.raises(ConfigurationError, match="is past"):
        await world.open(finish_by="2026-09-24T00:49Z")
    assert world.value("SELECT count(*) FROM run") == 0


async def test_where_nobody_knows_the_hours_nothing_starts(world: World) -> None:
    world.server.house.clock.set(datetime(2026, 12, 31, 15, 59, tzinfo=UTC))  # in China the next year is a minute off
    with pytest.raises(UnknownPrice, match="chinesecalendar"):
        await world.open(**OFF_PEAK)
    assert world.value("SELECT count(*) FROM run") == 0
