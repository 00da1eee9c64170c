"""Lanes against a real Postgres and the emulated DeepSeek over real sockets: what they promise, come what may."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.latency import Latency, Pace
from schemas.errors import ConfigurationError
from schemas.money import Currency, Money
from tasks import enrichment
from tasks.lanes import Ended
from tasks.ledger import leases, runs
from tasks.ledger.connection import Role, opened
from tests.world import World, make_world, write_documents


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url) as made:
        yield made


def assert_kept(world: World, run_id: int, documents: int = 60) -> None:
    """One terminal row per document; known cost equals the bill line by line; nothing billed without an intent."""
    rows = world.value(f"SELECT count(*) FROM document WHERE run_id = {run_id}")
    assert rows == documents
    bill = world.bill()
    ledger = {
        f"{run}.{number}.{attempt}": (cost, bound)
        for run, number, attempt, cost, bound in world.sql(
            "SELECT run_id, document_no, attempt_no, cost_pico, unknown_pico FROM attempt"
        )
    }
    assert bill.keys() <= ledger.keys()
    for key, (cost, bound) in ledger.items():
        if cost is not None:
            assert bill.get(key, 0) == cost, key
        else:
            assert bill.get(key, 0) <= bound, key
    for granted, cap in world.sql("SELECT granted, cap FROM budget"):
        assert granted <= cap
    booked = world.value("SELECT coalesce(sum(coalesce(cost_pico, 0) + unknown_pico), 0) FROM attempt")
    assert booked == world.value("SELECT sum(granted) FROM budget")


async def test_every_document_gets_a_result_and_the_ledger_equals_the_bill(world: World) -> None:
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("done", "done")
    assert_kept(world, run.run_id)
    assert world.value("SELECT sum(cost_pico) FROM attempt") == sum(world.bill().values()) > 0
    assert world.value("SELECT sum(unknown_pico) FROM attempt") == 0
    assert world.value("SELECT count(*) FROM unpriced") == 0


async def test_after_priming_the_whole_prefix_hits(world: World) -> None:
    await world.run()
    (rate,) = {row[0] for row in world.sql("SELECT prefix_hit_rate FROM cache_efficiency")}
    assert rate == 1
    assert world.value("SELECT count(*) FROM attempt WHERE purpose = 'priming' AND tier = 'flash'") <= 4


async def test_the_same_run_again_makes_no_attempt_and_reuses_every_answer(world: World) -> None:
    first, _ = await world.run()
    bill = world.bill()
    second, _ = await world.run()
    assert second.run_id != first.run_id
    assert world.bill() == bill
    assert world.value(f"SELECT count(*) FROM attempt WHERE run_id = {second.run_id}") == 0
    answers = "SELECT document_id, answer, tier FROM result WHERE run_id = {} ORDER BY 1"
    assert world.sql(answers.format(second.run_id)) == world.sql(answers.format(first.run_id))


async def test_a_stricter_threshold_does_not_reuse_answers_below_it(world: World) -> None:
    await world.run()
    unsure = world.value("SELECT count(*) FROM result WHERE tier = 'flash' AND confidence < 0.97")
    job = world.root / "jobs" / "colours" / "job.yaml"
    job.write_text(job.read_text().replace("below: 0.6", "below: 0.97"))
    second, _ = await world.run()
    assert unsure > 0
    states = dict(world.sql(f"SELECT state, count(*) FROM document WHERE run_id = {second.run_id} GROUP BY 1"))
    assert states == {"result": unsure, "reused": 60 - unsure}


async def test_the_budget_is_never_passed_and_a_larger_one_resumes(world: World) -> None:
    run, ended = await world.run(budget="0.002 USD")
    assert (run.state, ended.reason) == ("paused", "budget")
    assert 0 < sum(world.bill().values()) <= 2_000_000_000
    spent = Money(sum(world.bill().values()), Currency.USD)
    assert (
        f"$0.00200 does not cover one more attempt: {spent} spent, $0.00 held for what is in flight" in ended.advice
    )
    assert "--budget" in ended.advice
    again, _ = await world.run()
    assert (again.run_id, again.state, again.cap) == (run.run_id, "paused", 2_000_000_000)
    resumed, _ = await world.run(budget="1 USD")
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert_kept(world, run.run_id)
    assert world.value("SELECT count(*) FROM attempt WHERE verdict = 'accepted'") == 60


async def test_a_budget_below_one_attempt_spends_nothing(world: World) -> None:
    run, ended = await world.run(budget="0.000001 USD")
    assert (run.state, ended.reason) == ("paused", "budget")
    assert world.bill() == {}
    assert world.value("SELECT count(*) FROM attempt_intent") == 0


async def test_near_the_cap_nearly_all_of_it_can_be_used(world: World) -> None:
    """Unused at the end is at most one reservation, the money of a document that no longer fits."""
    await world.run(budget="0.002 USD")
    used = world.value("SELECT granted FROM budget")
    await world.run(budget="1 USD")
    worst = world.value("SELECT max(reserved) FROM attempt_intent")
    assert 2_000_000_000 - used <= worst


async def test_a_lane_with_nothing_left_to_do_gives_its_money_to_one_that_waits_for_it(world: World) -> None:
    """It goes on living, for the last shards may come back to it: nobody must wait until it leaves."""
    job = world.root / "jobs" / "colours" / "job.yaml"
    job.write_text(job.read_text().replace("shard_rows: 20", "shard_rows: 1").replace("below: 0.6", "below: 0"))
    write_documents(world.root, ["one is red", "and one is blue"])
    probe, _ = await world.run(limit=1)
    worst = world.value("SELECT max(reserved) FROM attempt_intent")
    write_documents(world.root, ["one is green", "one is red, and new"])
    request = {"budget": f"{worst * 3 // 2 / 10**12:.12f} USD"}
    run = await world.open(**request)
    async with asyncio.timeout(60):
        ended = await asyncio.gather(*(world.work(run, lanes=2, **request) for _ in range(2)))
    assert [end.reason for end in ended] == ["done", "done"]
    assert (await enrichment.settle_run(world.settings, run, list(ended))).state == "done"
    assert probe.run_id != run.run_id


@pytest.mark.long
async def test_a_storm_of_429_is_weathered_without_a_dead_letter(world: World) -> None:
    world.plan_mishaps({"kind": "rate_limited", "share": 0.5, "seed": 3})
    run, _ = await world.run()
    assert run.state == "done"
    assert world.value("SELECT count(*) FROM dead_letter") == 0
    assert_kept(world, run.run_id)


@pytest.mark.parametrize(
    ("kind", "reason", "says"), [("401", "key", "DEEPSEEK_API_KEY"), ("402", "provider", "top it up")]
)
async def test_a_refused_account_pauses_the_run_and_says_what_to_do(
    world: World, kind: str, reason: str, says: str
) -> None:
    world.plan_mishaps({"kind": kind, "every": 1, "match": "1."})
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", reason)
    assert says in ended.advice
    assert world.value("SELECT count(*) FROM document") == 0
    world.plan_mishaps()
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert_kept(world, run.run_id)


async def test_a_request_that_hangs_is_unknown_and_then_tried_again(world: World) -> None:
    job = world.root / "jobs" / "colours" / "job.yaml"
    job.write_text(job.read_text().replace("deadline_s: 5", "deadline_s: 0.5"))
    world.plan_mishaps(
        {"kind": "hang", "every": 1, "match": "1.3.1"}, {"kind": "blank_lines", "every": 1, "match": "1.4.1"}
    )
    run, _ = await world.run()
    assert run.state == "done"
    unknown = world.sql("SELECT document_no FROM attempt WHERE billing = 'unknown'")
    assert {(3,), (4,)} <= set(unknown)  # on a busy machine others may miss so short a deadline too
    assert_kept(world, run.run_id)


async def test_three_lost_replies_end_a_document_as_a_dead_letter_which_the_next_run_asks_again(world: World) -> None:
    world.plan_mishaps({"kind": "reset_after", "every": 1, "match": "1.7."})
    run, _ = await world.run()
    assert run.state == "done"
    assert world.sql("SELECT document_no, reason FROM dead_letter") == [(7, "lost")]
    assert world.value("SELECT count(*) FROM attempt WHERE document_no = 7") == 3
    world.plan_mishaps()
    again, _ = await world.run()
    attempts = f"SELECT DISTINCT document_no FROM attempt WHERE run_id = {again.run_id}"
    assert world.sql(attempts) == [(7,)]
    ended = f"SELECT state, count(*) FROM document WHERE run_id = {again.run_id} GROUP BY state ORDER BY state"
    assert world.sql(ended) == [("result", 1), ("reused", 59)]


def take_time(world: World) -> None:
    """Replies take a second, so that no lane has done everything before another one has come in."""
    world.server.house.latency = Latency(Pace(1.0, reply_s=1.0), seed=1)


async def test_two_lanes_share_a_run_and_no_document_is_answered_twice(world: World) -> None:
    take_time(world)
    run = await world.open()
    ended = await asyncio.gather(world.work(run, lanes=2), world.work(run, lanes=2))
    settled = await enrichment.settle_run(world.settings, run, list(ended))
    assert settled.state == "done"
    assert_kept(world, run.run_id)
    assert world.value("SELECT count(*) FROM attempt WHERE verdict = 'accepted'") == 60
    assert world.value("SELECT count(DISTINCT lane_id) FROM attempt") == 2


async def test_a_lane_without_work_keeps_no_money_from_one_that_waits_for_it(world: World) -> None:
    """The first to ask gets the whole budget, since it is less than a first grant."""
    take_time(world)
    run = await world.open(budget="0.02 USD")
    ended = await asyncio.wait_for(asyncio.gather(world.work(run, lanes=2), world.work(run, lanes=2)), 60)
    assert [end.reason for end in ended] == ["done", "done"]
    assert world.value("SELECT count(DISTINCT lane_id) FROM attempt") == 2
    assert_kept(world, run.run_id)


async def test_a_lane_that_is_cancelled_leaves_unknowns_and_the_next_one_finishes(world: World) -> None:
    run = await world.open()
    lane = asyncio.create_task(world.work(run))
    while not world.value("SELECT count(*) FROM document"):
        await asyncio.sleep(0.02)
    lane.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lane
    done = world.value("SELECT count(*) FROM document")
    assert world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL") == 0
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert done < 60
    assert_kept(world, run.run_id)


async def test_a_lane_that_is_interrupted_twice_does_not_wait_for_replies_and_settles_as_paused(world: World) -> None:
    world.plan_mishaps({"kind": "hang", "share": 0.5, "seed": 3})
    run = await world.open()
    lane = asyncio.create_task(world.work(run))
    hangs = "SELECT count(*) FROM attempt WHERE billing = 'open' AND intended_at < clock_timestamp() - interval '1 s'"
    while not world.value(hangs):
        await asyncio.sleep(0.02)
    signal.raise_signal(signal.SIGINT)
    await asyncio.sleep(0.2)
    assert not lane.done()
    signal.raise_signal(signal.SIGTERM)
    ended = await asyncio.wait_for(lane, 20)
    settled = await enrichment.settle_run(world.settings, run, [ended])
    assert (settled.state, settled.reason) == ("paused", "interrupted")
    assert world.value("SELECT count(*) FROM attempt WHERE billing = 'unknown'") > 0
    assert world.value("SELECT count(*) FROM attempt WHERE billing = 'open'") == 0
    world.plan_mishaps()
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")
    assert_kept(world, run.run_id)


async def test_the_first_interruption_of_a_lane_that_drains_by_itself_gives_nothing_up(world: World) -> None:
    """It may drain for want of money or by an order: whoever presses Ctrl-C once asks for a good end."""
    world.plan_mishaps({"kind": "trickle", "every": 1})
    run = await world.open()
    lane = asyncio.create_task(world.work(run))
    while not world.value("SELECT coalesce(sum(in_flight), 0) FROM lane"):
        await asyncio.sleep(0.02)
    await set_state(world, run.run_id, "superseded")
    await asyncio.sleep(1.2)
    signal.raise_signal(signal.SIGINT)
    ended = await asyncio.wait_for(lane, 20)
    assert ended.reason == "superseded"
    assert world.value("SELECT count(*) FROM attempt WHERE billing = 'unknown'") == 0


async def test_what_ends_a_run_outside_of_its_lane_leaves_it_paused(world: World) -> None:
    run = await world.open()
    with pytest.raises(asyncio.CancelledError):
        async with enrichment.paused_if_cut_short(world.settings, run):
            raise asyncio.CancelledError
    assert world.sql("SELECT state, reason FROM run") == [("paused", "interrupted")]


async def test_a_run_paused_from_elsewhere_drains_and_resumes(world: World) -> None:
    world.plan_mishaps({"kind": "rate_limited", "share": 0.9, "seed": 5})
    run = await world.open()
    lane = asyncio.create_task(world.work(run))
    while not world.value("SELECT count(*) FROM attempt_outcome"):
        await asyncio.sleep(0.02)
    await set_state(world, run.run_id, "paused")
    ended = await asyncio.wait_for(lane, 20)
    assert ended.reason == "paused"
    assert world.value("SELECT count(*) FROM attempt WHERE billing = 'open'") == 0
    world.plan_mishaps()
    resumed, _ = await world.run()
    assert (resumed.run_id, resumed.state) == (run.run_id, "done")


async def set_state(world: World, run_id: int, state: str) -> None:
    async with opened(enrichment.require_database(world.settings), Role.LANE) as ledger:
        await runs.change_state(ledger, run_id, state, "operator")


async def test_a_start_that_ends_early_does_not_pause_a_run_that_another_works_on(world: World) -> None:
    run = await world.open()
    async with opened(enrichment.require_database(world.settings), Role.LANE) as ledger:
        other = await leases.register(ledger, run.run_id)
        async with leases.alive(ledger, other):
            settled = await enrichment.settle_run(world.settings, run, [Ended("fenced")])
            assert settled.state == "running"
        await leases.leave(ledger, run.run_id, other, "done")
    settled = await enrichment.settle_run(world.settings, run, [Ended("fenced")])
    assert (settled.state, settled.reason) == ("paused", "fenced")


async def test_a_file_that_changed_after_opening_fails_its_shards_and_nothing_is_sent(world: World) -> None:
    run = await world.open()
    write_documents(world.root, [f"other {number}" for number in range(60)])
    ended = await world.work(run)
    settled = await enrichment.settle_run(world.settings, run, [ended])
    assert settled.state == "done"
    assert world.bill() == {}
    assert world.sql("SELECT reason, count(*) FROM dead_letter GROUP BY 1") == [("input_changed", 60)]


async def test_changed_documents_supersede_the_unfinished_run_and_keep_what_was_paid(world: World) -> None:
    paused, _ = await world.run(budget="0.002 USD")
    paid = world.value("SELECT count(*) FROM result")
    texts: list[str | None] = [f"document {number} is about a colour" for number in range(60)]
    write_documents(world.root, [*texts, "one more"])
    run, _ = await world.run()
    assert run.run_id != paused.run_id
    assert world.value(f"SELECT state FROM run WHERE run_id = {paused.run_id}") == "superseded"
    assert world.value(f"SELECT count(*) FROM document WHERE run_id = {run.run_id} AND state = 'reused'") == paid > 0


async def test_unfit_and_duplicate_rows_end_without_an_attempt(world: World) -> None:
    write_documents(
        world.root,
        ["a red one", None, "   ", "a red one", "another", "with no id"],
        ["a", "b", "c", "a", "a", None],
    )
    run, _ = await world.run()
    rows = world.sql(f"SELECT document_no, state, reason FROM document WHERE run_id = {run.run_id} ORDER BY 1")
    assert rows == [
        (0, "result", None),
        (1, "dead_letter", "null_text"),
        (2, "dead_letter", "empty_text"),
        (3, "duplicate", None),
        (4, "dead_letter", "conflicting_duplicate"),
        (5, "dead_letter", "null_id"),
    ]
    assert world.value("SELECT count(DISTINCT document_no) FROM attempt_intent") == 1


async def test_a_budget_in_another_currency_is_refused_before_anything_is_opened(world: World) -> None:
    with pytest.raises(ConfigurationError, match="never converted"):
        await world.open(budget="10 CNY")
    assert world.value("SELECT count(*) FROM run") == 0


async def test_at_a_peak_hour_reservations_and_costs_are_at_peak_price(world: World) -> None:
    world.server.house.clock.set(datetime(2026, 9, 24, 2, 0, tzinfo=UTC))
    run, _ = await world.run()
    assert run.state == "done"
    assert {row[0] for row in world.sql("SELECT DISTINCT band FROM attempt WHERE cost_pico > 0")} == {"peak"}
    assert_kept(world, run.run_id)


async def test_a_cache_that_is_lost_in_mid_run_raises_an_alarm_in_dollars(tmp_path: Path, ledger_url: str) -> None:
    async with make_world(tmp_path, ledger_url, documents=260) as world:
        run = await world.open()
        lane = asyncio.create_task(world.work(run))
        while not world.value("SELECT count(*) FROM run_event WHERE kind = 'primed'"):
            await asyncio.sleep(0.01)
        world.server.house.cache.look_up = lambda _prompt, _now: 0  # type: ignore[method-assign]  # the loss itself
        assert (await lane).is_done
        alarms = world.sql(
            "SELECT detail ->> 'tier', (detail ->> 'lost_pico')::bigint FROM run_event WHERE kind = 'cache_lost'"
        )
        lost = dict(world.sql("SELECT tier, lost_pico FROM cache_efficiency"))
    assert {tier for tier, _ in alarms} >= {"flash"}
    assert 0 < sum(pico for tier, pico in alarms if tier == "flash") <= lost["flash"]
