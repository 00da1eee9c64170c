"""Steering a live run from elsewhere: a pause, a limit and a cap that its lanes obey with their next heartbeat."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.latency import Latency, Pace
from sandbox.tariff import FLASH, PRO
from schemas.errors import ConfigurationError
from schemas.money import Currency, Money
from tasks import enrichment, report, steering
from tasks.grants import Grants
from tasks.lanes import Ended
from tasks.ledger import budgets, leases, runs
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.runs import Run
from tasks.steps import outcome
from tests.ledgers import BOOK, CAP, JOB, RESERVED, Hand, opening, run_everything, sql, value
from tests.world import World, make_world

DOCUMENTS = 400
#: Requests in flight at each tier, as the job says.
USUAL = 8
#: A reply takes so long at the median, and a lane beats so often.
REPLY_S, BEAT_S = 0.4, 0.05
TIMES = LeaseTimes(beat_every_s=BEAT_S)
#: By then a lane has heard what was said, and what was in flight is finished.
HEARD_S = 4 * REPLY_S


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    """As many in flight as may be, for as long as there are documents."""
    async with make_world(tmp_path, ledger_url, documents=DOCUMENTS) as made:
        job = tmp_path / "jobs" / "colours" / "job.yaml"
        job.write_text(job.read_text().replace("concurrency: 16", f"concurrency: {USUAL}"))
        made.server.house.latency = Latency(Pace(1.0, reply_s=REPLY_S), seed=1)
        yield made


@asynccontextmanager
async def ledger_of(world: World) -> AsyncIterator[Ledger]:
    async with opened(enrichment.require_database(world.settings), Role.LANE, pool_size=1) as ledger:
        yield ledger


@asynccontextmanager
async def at_work(
    world: World, lanes: int = 1, **request: Any
) -> AsyncIterator[tuple[Run, asyncio.Future[list[Ended]]]]:
    """A run with lanes at work, which has sent as much at once as it may; however the test ends, they leave."""
    run = await world.open(lanes=lanes, **request)
    asked = world.request(lanes=lanes, **request)
    works = (enrichment.work_lane(asked, world.settings, run, times=TIMES) for _ in range(lanes))
    working = asyncio.gather(*works)
    try:
        await until(lambda: working.done() or world.server.house.account.peak[FLASH] >= run.ceilings["flash"])
        assert not working.done()
        yield run, working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def until(holds: Callable[[], bool], within_s: float = 30) -> None:
    """Wait for it; what never comes fails the test."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)


async def settle(world: World, run: Run, working: asyncio.Future[list[Ended]]) -> tuple[Run, list[Ended]]:
    ended = await asyncio.wait_for(working, 30)
    return await enrichment.settle_run(world.settings, run, ended), ended


async def most_in_flight(world: World) -> dict[str, int]:
    """The most requests that ran at once for a while from now, by the provider's own count."""
    world.server.house.account.set_limits({})
    await asyncio.sleep(4 * REPLY_S)
    return dict(world.server.house.account.peak)


def answer_at_once(world: World) -> None:
    """From now on, so that what is left is soon done."""
    world.server.house.latency = Latency(Pace(0.0), seed=1)


def assert_all_is_well(world: World, run_id: int) -> None:
    """One ending per document, and what the ledger knows is what was billed."""
    assert world.value(f"SELECT count(*) FROM document WHERE run_id = {run_id}") == DOCUMENTS
    assert world.value("SELECT sum(cost_pico) FROM attempt") == sum(world.bill().values())


async def test_a_paused_run_begins_nothing_more_finishes_what_is_in_flight_and_goes_on_when_asked(
    world: World,
) -> None:
    async with at_work(world, lanes=2) as (run, working), ledger_of(world) as ledger:
        steered = await steering.pause(ledger, run.run_id)
        settled, ended = await settle(world, run, working)
    assert (steered.is_changed, steered.seen.state, steered.seen.lanes) == (True, "paused", 2)
    assert (settled.state, settled.reason, {end.reason for end in ended}) == ("paused", "operator", {"paused"})
    late = """SELECT count(*) FROM attempt_intent WHERE intended_at > interval '0.5 s' +
              (SELECT happened_at FROM run_event WHERE kind = 'paused')"""
    assert world.value(late) == 0
    assert world.value("SELECT count(*) FROM attempt WHERE billing <> 'known'") == 0
    assert world.sql("SELECT detail FROM run_event WHERE kind = 'paused'") == [({"reason": "operator"},)]
    said = outcome(settled, ended, None)
    assert (said["state"], said["advice"]) == (
        "paused",
        "`farthing pause` stopped this run: run the same command to go on",
    )
    assert 0 < world.value("SELECT count(*) FROM document") < DOCUMENTS
    answer_at_once(world)
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert_all_is_well(world, run.run_id)


async def test_a_limit_holds_over_all_lanes_within_a_heartbeat_downwards_and_upwards(
    world: World,
) -> None:
    async with at_work(world, lanes=2) as (run, working), ledger_of(world) as ledger:
        await steering.limit(ledger, run.run_id, ["3"])
        await asyncio.sleep(HEARD_S)
        low = await most_in_flight(world)
        await steering.limit(ledger, run.run_id, ["flash=6"])
        await asyncio.sleep(HEARD_S)
        high = await most_in_flight(world)
        limited = await steering.limit(ledger, run.run_id, None)
        await asyncio.sleep(HEARD_S)
        free = await most_in_flight(world)
        answer_at_once(world)
        settled, _ = await settle(world, run, working)
    assert max(low.values()) == low[FLASH] == 3
    assert high[FLASH] == 6
    assert 6 < free[FLASH] <= USUAL
    assert (limited.was, limited.ceilings) == ({"flash": 6, "pro": 3}, {"flash": USUAL, "pro": USUAL})
    assert world.sql("SELECT detail FROM run_event WHERE kind = 'limit_changed' ORDER BY event_id") == [
        ({"now": {"flash": 3, "pro": 3}, "was": {"flash": USUAL, "pro": USUAL}},),
        ({"now": {"flash": 6, "pro": 3}, "was": {"flash": 3, "pro": 3}},),
        ({"now": {"flash": USUAL, "pro": USUAL}, "was": {"flash": 6, "pro": 3}},),
    ]
    assert settled.state == "done"
    assert_all_is_well(world, run.run_id)


@pytest.mark.long
async def test_more_may_be_in_flight_than_the_job_says(world: World) -> None:
    """The pool of connections and the documents in progress grow with it, which were enough for 24."""
    world.server.house.latency = Latency(Pace(1.0, reply_s=1.0), seed=1)
    async with at_work(world) as (run, _), ledger_of(world) as ledger:
        await steering.limit(ledger, run.run_id, ["40"])
        await until(lambda: world.server.house.account.peak[FLASH] > 24)
        assert (await most_in_flight(world))[FLASH] <= 40


@pytest.mark.long
async def test_who_had_a_place_before_the_limit_fell_and_waits_for_money_queues_again(world: World) -> None:
    """Else all of them would be sent at once when the money comes."""
    job = world.root / "jobs" / "colours" / "job.yaml"
    job.write_text(job.read_text().replace("below: 0.6", "below: 0"))
    world.server.house.latency = Latency(Pace(1.0, reply_s=1.0), seed=1)
    account = world.server.house.account
    async with at_work(world) as (run, _), ledger_of(world) as ledger:
        room = await budgets.find_room(ledger, run.budget_id)
        cap = room.spent + 4 * world.value("SELECT max(reserved) FROM attempt_intent WHERE tier = 'flash'")
        await runs.change_cap(ledger, run.run_id, cap)
        await until(lambda: account.in_flight[FLASH] <= 4)
        await until(lambda: "is all spoken for" in (world.value("SELECT waiting_because FROM lane") or ""))
        await steering.limit(ledger, run.run_id, ["3"])
        await until(lambda: account.in_flight[FLASH] <= 3)
        await asyncio.sleep(4 * BEAT_S)
        await steering.cap(ledger, run.run_id, "1 USD")
        assert (await most_in_flight(world))[FLASH] == 3


@pytest.mark.long
async def test_a_limit_holds_for_whoever_resumes_the_run_and_is_told(world: World) -> None:
    async with at_work(world) as (run, working), ledger_of(world) as ledger:
        await steering.limit(ledger, run.run_id, ["flash=2"])
        await steering.pause(ledger, run.run_id)
        await settle(world, run, working)
    world.server.house.account.set_limits({})
    async with at_work(world) as (again, _), ledger_of(world) as ledger:
        seen = await steering.spend.progress(ledger, run.run_id)
        assert again.ceilings == seen.ceilings == {"flash": 2, "pro": USUAL}
        assert (await most_in_flight(world))[FLASH] == 2
    told = "at most 2 flash, 8 pro, set by `farthing limit` (the job: 8 flash, 8 pro); --reset lifts it"
    assert report.resumed_line(seen, None).endswith(f"in flight: {told}")  # type: ignore[union-attr]  # it is resumed


@pytest.mark.long
async def test_two_starts_of_a_run_share_what_may_be_in_flight(world: World) -> None:
    """As from two machines, of which neither knows of the other."""
    async with at_work(world) as (run, _):
        other = asyncio.create_task(enrichment.work_lane(world.request(), world.settings, run, times=TIMES))
        while world.value("SELECT count(*) FROM lane WHERE heartbeat_at > started_at") < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(HEARD_S)
        assert USUAL // 2 < (await most_in_flight(world))[FLASH] <= USUAL
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


@pytest.mark.parametrize(("comes_within_s", "most"), [(math.inf, USUAL // 2), (0.5, USUAL)])
async def test_a_lane_that_never_comes_leaves_its_share_to_who_is_there_after_a_while(
    world: World, comes_within_s: float, most: int
) -> None:
    """As where a cluster has fewer slots than there are lanes."""
    run, request = await world.open(lanes=2), world.request(lanes=2)
    times = replace(TIMES, comes_within_s=comes_within_s)
    working = asyncio.create_task(enrichment.work_lane(request, world.settings, run, times=times))
    account = world.server.house.account
    try:
        await until(lambda: account.peak[FLASH] >= most)
        await asyncio.sleep(HEARD_S)
        assert account.peak[FLASH] == most
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


@pytest.mark.parametrize("reply_s", [1.0, pytest.param(12.0, marks=pytest.mark.long)])
async def test_the_ceiling_holds_though_lanes_come_whenever_they_like_and_replies_take_long(
    world: World, reply_s: float
) -> None:
    """As of three starts within a second, of which none knows of the others, while all places are taken for long."""
    job, account = world.root / "jobs" / "colours" / "job.yaml", world.server.house.account
    job.write_text(job.read_text().replace("deadline_s: 5", "deadline_s: 60"))
    run = await world.open()

    def start() -> asyncio.Task[Ended]:
        return asyncio.create_task(enrichment.work_lane(world.request(), world.settings, run, times=TIMES))

    lanes = [start()]
    try:
        await until(lambda: account.peak[FLASH] >= USUAL, 60)
        world.server.house.latency = Latency(Pace(1.0, reply_s=reply_s), seed=1)
        await asyncio.sleep(3 * REPLY_S)
        lanes += [start(), start()]
        await until(lambda: world.value("SELECT count(*) FROM lane WHERE attempts > 0") == 3, 10 * reply_s)
        answer_at_once(world)
        settled, _ = await settle(world, run, asyncio.gather(*lanes))
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    assert (settled.state, account.peak[FLASH]) == ("done", USUAL)
    assert account.peak[PRO] <= USUAL
    assert_all_is_well(world, run.run_id)


async def test_a_lane_that_drains_holds_no_more_than_it_has_in_flight(world: World) -> None:
    """Others do not wait for its last reply."""
    left = """SELECT count(*) FROM lane WHERE ended_at IS NULL AND waiting_because LIKE 'draining%'
              AND CAST(places ->> 'flash' AS integer) BETWEEN 1 AND {}"""
    async with at_work(world) as (run, working), ledger_of(world) as ledger:
        world.server.house.latency = Latency(Pace(1.0, reply_s=4.0), seed=1)
        await asyncio.sleep(2 * REPLY_S)
        await steering.pause(ledger, run.run_id)
        await until(lambda: working.done() or world.value(left.format(USUAL // 2)))
        assert not working.done()


async def test_where_places_are_fewer_than_lanes_those_with_nothing_to_send_have_none(world: World) -> None:
    async with at_work(world) as (run, _), ledger_of(world) as ledger:
        for _ in range(4):
            await leases.register(ledger, run.run_id)
        limited = await steering.limit(ledger, run.run_id, ["2"])
        await asyncio.sleep(HEARD_S)
        assert limited.seen.lanes == 5
        assert (await most_in_flight(world))[FLASH] == 2


@pytest.mark.long
async def test_a_lowered_cap_stops_lanes_that_hold_more_and_what_is_left_under_it_is_used(world: World) -> None:
    """A lane's first grant would do for all of the documents."""
    async with at_work(world) as (run, working), ledger_of(world) as ledger:
        room = await budgets.find_room(ledger, run.budget_id)
        cap = room.spent + 5_000_000_000
        assert room.spent + room.held > cap
        capped = await steering.cap(ledger, run.run_id, f"{Money(cap, Currency.USD).decimal} USD")
        await asyncio.sleep(2 * BEAT_S)
        assert (capped.is_changed, capped.budget_pico, capped.was_pico) == (True, cap, 10**12)
        answer_at_once(world)
        settled, ended = await settle(world, run, working)
    assert (settled.state, settled.reason, settled.cap) == ("paused", "budget", cap)
    spent, dearest = sum(world.bill().values()), world.value("SELECT max(reserved) FROM attempt_intent")
    assert cap - dearest < spent <= cap
    assert world.value("SELECT granted FROM budget") == spent
    assert [end.reason for end in ended] == ["budget"]


async def test_a_run_that_paused_for_its_budget_goes_on_under_the_new_one(world: World) -> None:
    answer_at_once(world)
    run, ended = await world.run(budget="0.002 USD")
    assert (run.state, ended.reason) == ("paused", "budget")
    async with ledger_of(world) as ledger:
        capped = await steering.cap(ledger, run.run_id, "0.5")
    assert report.capped_lines(capped).endswith("\n`farthing run colours --sandbox` goes on under it")
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state, resumed.cap) == (run.run_id, "done", 5 * 10**11)
    events = world.sql("SELECT detail FROM run_event WHERE kind = 'cap_changed'")
    assert events == [({"cap": 5 * 10**11, "was": 2 * 10**9},)]
    assert_all_is_well(world, run.run_id)


async def test_who_waits_for_money_asks_again_when_a_heartbeat_tells_of_another_cap(ledger: Ledger) -> None:
    """Nothing comes back meanwhile: the reply that holds the rest takes its time."""
    run = await runs.open_run(ledger, opening(cap=RESERVED))
    grants = Grants(ledger, run, await leases.register(ledger, run.run_id))
    async with grants.reserved(RESERVED, rung=0):
        second = asyncio.create_task(grants.reserved(RESERVED, rung=0).__aenter__())
        async with asyncio.timeout(10):
            while grants.tight_because is None:
                await asyncio.sleep(0.01)
        assert f"`farthing budget {run.run_id} SUM`" in grants.tight_because
        assert await runs.change_cap(ledger, run.run_id, 3 * RESERVED) == RESERVED
        grants.hear(3 * RESERVED, is_overdrawn=False)
        await asyncio.wait_for(second, 10)


async def test_nothing_is_reserved_from_what_was_granted_above_a_lowered_cap(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening(cap=100 * RESERVED))
    lane_id = await leases.register(ledger, run.run_id)
    grants = Grants(ledger, run, lane_id)
    async with grants.reserved(RESERVED, rung=0):
        assert value(ledger_url, "SELECT granted FROM budget") == 64 * RESERVED
        await runs.change_cap(ledger, run.run_id, 2 * RESERVED)
        async with leases.alive(ledger, lane_id) as session:
            orders = await leases.beat(session, lane_id, 1, None, {})
        assert orders is not None
        assert (orders.cap, orders.is_overdrawn) == (2 * RESERVED, True)
        grants.hear(orders.cap, is_overdrawn=orders.is_overdrawn)
        second = asyncio.create_task(grants.reserved(RESERVED, rung=0).__aenter__())
        await asyncio.sleep(0.3)
        assert not second.done()
    await asyncio.wait_for(second, 10)
    assert sql(ledger_url, "SELECT cap, granted FROM budget") == [(2 * RESERVED, RESERVED)]


async def test_a_lane_of_a_run_from_before_limits_were_kept_goes_by_its_job(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    sql(ledger_url, "UPDATE run SET concurrency = '{}'")
    async with leases.alive(ledger, hand.lane_id) as session:
        orders = await leases.beat(session, hand.lane_id, 0, None, {})
    assert orders is not None
    assert orders.ceilings == {}
    limited = await steering.limit(ledger, run.run_id, ["2"])
    assert (limited.was, limited.ceilings) == ({}, {"flash": 2, "pro": 2})
    assert report.limited_lines(limited).startswith(
        "run 1 may have in flight, over all its lanes: at most 2 flash, 2 pro, was as the job says\n"
    )


async def test_the_newest_start_says_what_the_job_says_and_a_limit_lies_over_it(ledger: Ledger) -> None:
    run = await runs.open_run(ledger, opening())
    await runs.change_limits(ledger, run.run_id, {"pro": 3})
    other = replace(JOB, concurrency={"flash": 20, "pro": 20})
    again = await runs.open_run(ledger, opening(job=other))
    assert (again.run_id, again.ceilings) == (run.run_id, {"flash": 20, "pro": 3})
    await runs.change_limits(ledger, run.run_id, None)
    assert (await runs.find_run(ledger, run.run_id)).ceilings == {"flash": 20, "pro": 20}


async def test_the_same_again_is_no_event(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    orders = [
        lambda: steering.limit(ledger, run.run_id, ["4"]),
        lambda: steering.cap(ledger, run.run_id, "2 USD"),
        lambda: steering.pause(ledger, run.run_id),
    ]
    assert [(await order()).is_changed for order in orders] == [True] * 3
    events = sql(ledger_url, "SELECT kind, detail FROM run_event ORDER BY event_id")
    assert [(await order()).is_changed for order in orders] == [False] * 3
    assert sql(ledger_url, "SELECT kind, detail FROM run_event ORDER BY event_id") == events
    assert [kind for kind, _ in events] == ["opened", "limit_changed", "cap_changed", "paused"]


async def test_a_run_that_is_paused_already_keeps_its_reason(ledger: Ledger) -> None:
    run = await runs.open_run(ledger, opening())
    await runs.change_state(ledger, run.run_id, "paused", "budget")
    steered = await steering.pause(ledger, run.run_id)
    assert report.paused_lines(steered) == ("run 1 is paused already (budget); `farthing run colours` goes on")


@pytest.mark.parametrize("state", ["done", "superseded"])
async def test_of_a_run_that_is_over_nothing_can_be_changed(ledger: Ledger, ledger_url: str, state: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, f"UPDATE run SET state = '{state}'")
    before = sql(ledger_url, "SELECT state, reason, limits, cap FROM run JOIN budget USING (budget_id)")
    for order in (
        lambda: steering.pause(ledger, run.run_id),
        lambda: steering.limit(ledger, run.run_id, ["4"]),
        lambda: steering.limit(ledger, run.run_id, None),
        lambda: steering.cap(ledger, run.run_id, "2 USD"),
    ):
        with pytest.raises(ConfigurationError, match=f"run 1 of colours is {state}: "):
            await order()
    assert sql(ledger_url, "SELECT state, reason, limits, cap FROM run JOIN budget USING (budget_id)") == before
    assert value(ledger_url, "SELECT count(*) FROM run_event WHERE kind IN ('limit_changed', 'cap_changed')") == 0


async def test_a_shared_cap_changes_for_all_who_name_it_and_no_job_file_has_to(
    ledger: Ledger, ledger_url: str
) -> None:
    shared = opening(job=replace(JOB, budget_name="november"), keeps_cap=True)
    run = await runs.open_run(ledger, shared)
    other = await runs.open_run(ledger, replace(shared, selection={"partitions": ["2"]}))
    capped = await steering.cap(ledger, run.run_id, "3 USD")
    assert report.capped_lines(capped).startswith(
        "run 1: november, the budget that run 1 shares, is $3.00, was $1.00; $0.00 spent"
    )
    assert sql(ledger_url, "SELECT cap, declared FROM budget") == [(3 * CAP, CAP)]
    resumed = await runs.open_run(ledger, replace(shared, selection={"partitions": ["2"]}))
    assert (resumed.run_id, resumed.cap) == (other.run_id, 3 * CAP)


async def test_a_shared_cap_that_is_asked_for_at_a_resume_is_an_event_too(ledger: Ledger, ledger_url: str) -> None:
    shared = opening(job=replace(JOB, budget_name="november"), keeps_cap=True)
    run = await runs.open_run(ledger, shared)
    again = await runs.open_run(ledger, replace(shared, cap=2 * CAP, keeps_cap=False))
    assert (again.run_id, again.cap) == (run.run_id, 2 * CAP)
    events = sql(ledger_url, "SELECT detail FROM run_event WHERE kind = 'cap_changed'")
    assert events == [({"cap": 2 * CAP, "was": CAP},)]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("30 CNY", "billed in USD, and sums are never converted: write one like `25 USD`"),
        ("lots", "is not a sum of money"),
        ("0 USD", "a budget of nothing can pay for nothing"),
    ],
)
async def test_a_sum_that_cannot_be_the_cap_is_refused_and_the_cap_stays(
    ledger: Ledger, ledger_url: str, given: str, advice: str
) -> None:
    run = await runs.open_run(ledger, opening())
    with pytest.raises(ConfigurationError) as caught:
        await steering.cap(ledger, run.run_id, given)
    assert advice in str(caught.value)
    assert value(ledger_url, "SELECT cap FROM budget") == CAP


async def test_without_a_number_the_only_run_is_meant_and_of_several_none(ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="no run that is running or paused"):
        await steering.find(ledger, None, None)
    first = await runs.open_run(ledger, opening())
    assert await steering.find(ledger, None, None) == await steering.find(ledger, None, "colours") == first.run_id
    second = await runs.open_run(ledger, opening(job=replace(JOB, name="sizes")))
    assert await steering.find(ledger, None, "sizes") == second.run_id
    with pytest.raises(ConfigurationError, match=r"2 runs are .* 1 \(colours, running\), 2 \(sizes, running\)"):
        await steering.find(ledger, None, None)
    await runs.change_state(ledger, first.run_id, "paused", "budget")
    assert await steering.find(ledger, None, None, ("running",)) == second.run_id
    assert await steering.find(ledger, 7, None) == 7


async def test_a_run_that_is_not_there_cannot_be_steered(ledger: Ledger) -> None:
    for order in (steering.pause(ledger, 7), steering.limit(ledger, 7, ["4"]), steering.cap(ledger, 7, "1")):
        with pytest.raises(ConfigurationError, match="there is no run 7"):
            await order


async def test_a_limit_and_a_cap_leave_the_digest_of_the_run_as_it_is(ledger: Ledger) -> None:
    """What a settled run is proven by is what it did, and not what it was once allowed."""
    run = await runs.open_run(ledger, opening())
    await runs.change_limits(ledger, run.run_id, {"flash": 1})
    await runs.change_cap(ledger, run.run_id, 5 * CAP)
    hand = await Hand.join(ledger, run)
    for _ in range(2):
        await hand.answer_shard()
    await hand.leave()
    await runs.settle(ledger, run.run_id)
    from tasks.ledger.proof import prove

    assert (await prove(ledger, run.run_id, BOOK)).proved
