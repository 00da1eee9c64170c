"""Leases: one lane per shard, dead lanes buried with their unknowns and grants, zombies that can commit nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import pytest

from schemas.attempts import LaneId, Signal
from schemas.ceilings import TURN_S
from schemas.documents import Duplicate
from schemas.records import DocumentState, Lease, Record
from tasks.ledger import leases, runs
from tasks.ledger.attempts import Fenced
from tasks.ledger.connection import Ledger, PassingFailure
from tasks.ledger.leases import Orders
from tasks.ledger.runs import Run
from tests.ledgers import BACKFILL, CAP, COST, RESERVED, Hand, lane_ledger, make_manifest, opening, sql, value


async def make_run(ledger: Ledger, documents: int = 6, shard_rows: int = 3) -> Run:
    return await runs.open_run(ledger, opening(manifest=make_manifest(documents, shard_rows)))


async def test_lanes_that_claim_at_once_get_shards_of_their_own(ledger_url: str) -> None:
    async with lane_ledger(ledger_url, pool_size=10) as ledger:
        run = await make_run(ledger, documents=30)
        hands = [await Hand.join(ledger, run, amount=1) for _ in range(2)]
        claims = [leases.claim(ledger, run.run_id, hand.lane_id) for hand in hands for _ in range(6)]
        claimed = [shard.lease for shard in await asyncio.gather(*claims) if shard is not None]
        assert len({lease.shard_no for lease in claimed}) == len(claimed) == 10
    owners = sql(ledger_url, "SELECT DISTINCT lane_id, state, lease_epoch FROM shard ORDER BY 1")
    assert owners == [(1, "leased", 1), (2, "leased", 1)]


async def test_a_claimed_shard_comes_with_its_file_and_its_duplicates(ledger: Ledger) -> None:
    manifest = make_manifest(duplicates=[Duplicate(2, 0, True), Duplicate(4, 0, False)])
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening(manifest=manifest)))
    first, second = await hand.claim(), await hand.claim()
    assert (first.shard, first.file) == (manifest.shards[0], manifest.files[0])
    assert first.duplicates == {2: Duplicate(2, 0, True)}
    assert second.duplicates == {4: Duplicate(4, 0, False)}
    assert await leases.claim(ledger, hand.run.run_id, hand.lane_id) is None


async def test_a_lane_whose_session_ended_is_buried_and_a_living_one_is_not(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    async with AsyncExitStack() as stack:
        living, dead = [await Hand.join(ledger, run, amount=1) for _ in range(2)]
        await stack.enter_async_context(leases.alive(ledger, living.lane_id))
        async with leases.alive(ledger, dead.lane_id):
            assert await leases.bury_dead(ledger, run.run_id, grace_s=0) == 0
        assert await leases.bury_dead(ledger, run.run_id) == 0  # it beat less than ten seconds ago
        assert await leases.bury_dead(ledger, run.run_id, grace_s=0) == 1
    ended = sql(ledger_url, "SELECT lane_id, ended_because FROM lane WHERE ended_at IS NOT NULL")
    assert ended == [(dead.lane_id, "died")]


async def test_a_heartbeat_that_finds_every_connection_busy_may_try_again(ledger_url: str) -> None:
    async with lane_ledger(ledger_url, pool_size=1) as ledger:
        ledger.engine.pool._timeout = 0.05  # type: ignore[attr-defined]
        hand = await Hand.join(ledger, await make_run(ledger))
        async with ledger.transaction():
            with pytest.raises(PassingFailure, match="heartbeat"):
                async with leases.alive(ledger, hand.lane_id):
                    pass


async def test_a_lane_hears_how_many_others_have_something_to_send_by_tier(ledger: Ledger) -> None:
    run = await make_run(ledger)
    first, second, third = [await leases.register(ledger, run.run_id) for _ in range(3)]

    async def tell(lane_id: LaneId, held: dict[str, int]) -> Mapping[str, Sequence[int]]:
        async with leases.alive(ledger, lane_id) as session:
            orders = await leases.beat(session, lane_id, 0, None, held)
        assert orders is not None
        return orders.wanting

    assert await tell(first, {"flash": 0, "pro": 0}) == {}
    assert await tell(third, {"flash": 2}) == {"flash": [1, 1], "pro": [1, 1]}
    assert await tell(second, {}) == {"flash": [2, 1], "pro": [1, 1]}
    assert await tell(first, {}) == {"flash": [1, 0]}


async def test_who_is_stuck_while_it_takes_places_keeps_no_other_lane_from_its_heartbeat(ledger: Ledger) -> None:
    run = await make_run(ledger)
    stuck, other = [await leases.register(ledger, run.run_id) for _ in range(2)]
    async with leases.alive(ledger, stuck) as halted, leases.alive(ledger, other) as session:
        await halted.execute(leases._HOLD_LOCK, {"space": leases.HOLD_SPACE, "lane_id": stuck})
        async with asyncio.timeout(5):
            assert await leases.hold(session, other, {"flash": 4}, {"flash": 1}, run.ceilings) == {"flash": 1}
            assert await leases.beat(session, other, 0, None, {"flash": 1}) is not None
        await halted.rollback()
        assert await leases.hold(session, other, {"flash": 4}, {"flash": 1}, run.ceilings) == {"flash": 4}


@pytest.mark.parametrize("is_backfill", [False, True])
async def test_lanes_that_take_places_at_once_never_hold_more_than_the_ceiling(
    is_backfill: bool, ledger_url: str
) -> None:
    """Each wants all of them. Those of a backfill are of two runs."""
    async with lane_ledger(ledger_url, pool_size=10) as ledger, AsyncExitStack() as stack:
        names = [{}, {}]
        if is_backfill:
            sql(ledger_url, BACKFILL)
            names = [{"backfill_id": 1, "selection": {"partitions": [name]}} for name in "ab"]
        parts = [await runs.open_run(ledger, opening(**name)) for name in names]
        lanes = [await leases.register(ledger, parts[number % 2].run_id) for number in range(6)]
        sessions = [await stack.enter_async_context(leases.alive(ledger, lane_id)) for lane_id in lanes]
        most = parts[0].ceilings
        tried = zip(sessions, lanes, strict=True)
        held = await asyncio.gather(*(leases.hold(*each, most, {}, most) for each in tried))
    assert sum(each.get("flash", 0) for each in held) == most["flash"]


async def test_a_lane_without_a_heartbeat_is_buried_though_its_session_lives(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    hand = await Hand.join(ledger, run)
    async with leases.alive(ledger, hand.lane_id) as session:
        told = await leases.beat(session, hand.lane_id, 3, "because", {"flash": 2})
        assert told == Orders("running", {"flash": 8, "pro": 8}, CAP, is_overdrawn=False, lanes=1, rank=0)
        assert abs(told.turn - time.time() / TURN_S) < 2
        assert sql(ledger_url, "SELECT in_flight, waiting_because, places FROM lane") == [
            (3, "because", {"flash": 2})
        ]
        sql(ledger_url, "UPDATE lane SET heartbeat_at = clock_timestamp() - interval '31 seconds'")
        assert await leases.bury_dead(ledger, run.run_id) == 1
        assert await leases.beat(session, hand.lane_id, 3, None, {}) is None
    assert sql(ledger_url, "SELECT in_flight, waiting_because FROM lane") == [(0, None)]


async def test_burial_opens_the_shards_declares_the_unknowns_and_closes_the_grants(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await make_run(ledger)
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.intend(hand.intent(lease, 1), hand.intent(lease, 2))
    assert await leases.bury_dead(ledger, run.run_id, grace_s=0) == 1
    assert sql(ledger_url, "SELECT state, lease_epoch, lane_id FROM shard ORDER BY shard_no") == [
        ("open", 2, None),
        ("open", 0, None),
    ]
    unknowns = sql(ledger_url, "SELECT document_no, attempt_no, bound, because FROM attempt_unknown ORDER BY 1")
    assert unknowns == [(1, 1, RESERVED, "lane died"), (2, 1, RESERVED, "lane died")]
    assert value(ledger_url, "SELECT used FROM grant_close") == COST + 2 * RESERVED
    assert value(ledger_url, "SELECT granted FROM budget") == COST + 2 * RESERVED
    assert sql(ledger_url, "SELECT attempts, cost, bounds FROM lane") == [(3, COST, 2 * RESERVED)]
    following = await (await Hand.join(ledger, run, amount=1)).claim()
    assert following.lease == Lease(0, 3)


async def test_a_buried_lane_commits_no_intent_and_claims_no_shard(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    zombie = await Hand.join(ledger, run)
    lease = (await zombie.claim()).lease
    await leases.bury_dead(ledger, run.run_id, grace_s=0)
    assert await zombie.intend(zombie.intent(lease, 0)) == [Fenced()]
    assert await leases.claim(ledger, run.run_id, zombie.lane_id) is None
    assert not await leases.finish(ledger, run.run_id, zombie.lane_id, lease)
    assert value(ledger_url, "SELECT count(*) FROM attempt_intent") == 0


async def test_a_late_outcome_of_a_buried_lane_is_counted_once(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    zombie = await Hand.join(ledger, run)
    lease = (await zombie.claim()).lease
    await zombie.intend(zombie.intent(lease, 0), zombie.intent(lease, 1))
    await leases.bury_dead(ledger, run.run_id, grace_s=0)
    await zombie.record(Record(zombie.outcome(0)))
    await zombie.record(Record(zombie.outcome(1, signal=Signal.LOST, verdict=None, usage=None)))
    assert sql(ledger_url, "SELECT attempts, cost, bounds FROM lane") == [(2, COST, RESERVED)]
    totals = sql(ledger_url, "SELECT attempts, cost_pico, unknown_pico FROM run_cost")
    assert totals == [(2, COST, RESERVED)]


async def test_a_lane_may_record_while_it_is_being_buried(ledger_url: str) -> None:
    """Both take the same locks, in the same order: no deadlock, and nothing is lost or counted twice."""
    async with lane_ledger(ledger_url, pool_size=8) as ledger:
        run = await make_run(ledger, documents=40, shard_rows=4)
        for _ in range(5):
            zombie = await Hand.join(ledger, run)
            lease = (await zombie.claim()).lease
            numbers = range(lease.shard_no * 4, lease.shard_no * 4 + 4)
            known = value(ledger_url, "SELECT coalesce(max(attempt_no), 0) FROM attempt_intent") + 1
            await zombie.intend(*(zombie.intent(lease, number, known) for number in numbers))
            await asyncio.gather(
                leases.bury_dead(ledger, run.run_id, grace_s=0),
                *(zombie.record(Record(zombie.outcome(number, known))) for number in numbers),
            )
        await leases.bury_dead(ledger, run.run_id, grace_s=0)  # a lane that records just then is passed over
    assert value(ledger_url, "SELECT sum(cost) FROM lane") == 20 * COST
    assert value(ledger_url, "SELECT granted FROM budget") == 20 * COST
    assert value(ledger_url, "SELECT sum(attempts) FROM lane") == 20


async def test_a_shard_is_finished_only_when_every_document_has_a_terminal_row(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await make_run(ledger)
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.answer(lease, 2)
    assert not await leases.finish(ledger, run.run_id, hand.lane_id, lease)
    await hand.answer(lease, 1)
    assert await leases.finish(ledger, run.run_id, hand.lane_id, lease)
    assert await leases.finish(ledger, run.run_id, hand.lane_id, lease)  # safe to repeat
    assert await leases.has_unfinished(ledger, run.run_id)
    await hand.answer_shard()
    assert not await leases.has_unfinished(ledger, run.run_id)
    assert await leases.has_ended(ledger, run.run_id)
    sql(ledger_url, "UPDATE shard SET state = 'held' WHERE shard_no = 0")
    assert not await leases.has_unfinished(ledger, run.run_id)
    assert not await leases.has_ended(ledger, run.run_id)  # whoever waits for its lanes waits on


async def test_a_failed_shard_dead_letters_what_did_not_end(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 1)
    for _ in range(2):
        assert await leases.fail(ledger, run.run_id, hand.lane_id, lease, "input_changed")
    assert sql(ledger_url, "SELECT document_no, state, reason FROM document ORDER BY 1") == [
        (0, "dead_letter", "input_changed"),
        (1, "result", None),
        (2, "dead_letter", "input_changed"),
    ]
    assert sql(ledger_url, "SELECT done, results, dead_letters FROM lane") == [(3, 1, 2)]
    assert value(ledger_url, "SELECT state FROM shard WHERE shard_no = 0") == "failed"
    assert not await leases.finish(ledger, run.run_id, hand.lane_id, lease)


async def test_a_fenced_lane_cannot_fail_the_shard_of_its_heir(ledger: Ledger, ledger_url: str) -> None:
    run = await make_run(ledger)
    zombie = await Hand.join(ledger, run)
    lease = (await zombie.claim()).lease
    await leases.bury_dead(ledger, run.run_id, grace_s=0)
    heir = await Hand.join(ledger, run)
    await heir.claim()
    assert not await leases.fail(ledger, run.run_id, zombie.lane_id, lease, "input_changed")
    assert value(ledger_url, "SELECT count(*) FROM document") == 0


@pytest.mark.parametrize("is_second", [False, True])
async def test_leaving_gives_everything_back_and_may_be_repeated(
    is_second: bool, ledger: Ledger, ledger_url: str
) -> None:
    run = await make_run(ledger)
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    dead = hand.ending(lease, 0, DocumentState.DEAD_LETTER, reason="empty_text")
    await hand.record(Record(ending=dead))
    await hand.leave()
    if is_second:
        await hand.leave()
    assert sql(ledger_url, "SELECT ended_because, done FROM lane") == [("done", 1)]
    assert value(ledger_url, "SELECT granted FROM budget") == 0
    assert sql(ledger_url, "SELECT state, lease_epoch FROM shard WHERE shard_no = 0") == [("open", 2)]
