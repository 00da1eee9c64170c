"""What a lane makes of replies that no honest provider gives, and of waits and drains that come at a bad moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from schemas.attempts import Call, Reply
from schemas.errors import InputChanged, InputUnavailable
from schemas.readings import Order
from tasks import bulkhead, enrichment
from tasks.bulkhead import Bulkhead
from tasks.completions import Completions
from tasks.lanes import Ended, Lane
from tasks.ledger import attempts, budgets, leases
from tasks.ledger.connection import PassingFailure, Role, opened
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tests.world import World, make_world


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url) as made:
        yield made


def alter_replies(monkeypatch: pytest.MonkeyPatch, change: Callable[[Reply], Reply]) -> None:
    """Let every reply of the emulated provider arrive changed."""
    complete = Completions.complete

    async def complete_and_change(self: Completions, call: Call) -> Reply:
        return change(await complete(self, call))

    monkeypatch.setattr(Completions, "complete", complete_and_change)


@dataclass
class Held:
    """Replies that the provider has billed and that do not arrive before `arrive` is set."""

    count: int = 0
    arrive: asyncio.Event = field(default_factory=asyncio.Event)


def hold_replies(monkeypatch: pytest.MonkeyPatch) -> Held:
    complete, held = Completions.complete, Held()

    async def complete_and_hold(self: Completions, call: Call) -> Reply:
        reply = await complete(self, call)
        held.count += 1
        await held.arrive.wait()
        return reply

    monkeypatch.setattr(Completions, "complete", complete_and_hold)
    return held


@dataclass
class Working:
    """A lane at work."""

    lane: Lane
    task: asyncio.Task[Ended]

    @classmethod
    async def start(
        cls, world: World, monkeypatch: pytest.MonkeyPatch, times: LeaseTimes = USUAL_TIMES, **request: Any
    ) -> Working:
        started: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        run_shards = Lane.run_shards

        async def run_and_tell(self: Lane) -> Ended:
            started.set_result(self)
            return await run_shards(self)

        monkeypatch.setattr(Lane, "run_shards", run_and_tell)
        run = await world.open(**request)
        work = enrichment.work_lane(world.request(**request), world.settings, run, times=times)
        task = asyncio.create_task(work)
        return cls(await started, task)

    async def wait_until(self, why: str) -> None:
        """Until the lane says that it waits because of that; one that never does fails the test."""
        async with asyncio.timeout(20):
            while why not in (self.lane.waiting_because() or ""):
                assert not self.task.done()
                await asyncio.sleep(0.01)

    async def ended(self) -> Ended:
        """How it ends; a lane that does not leave fails the test."""
        return await asyncio.wait_for(self.task, 20)


def billing(world: World) -> dict[str, int]:
    return dict(world.sql("SELECT billing, count(*) FROM attempt GROUP BY 1"))


@pytest.mark.parametrize("served", ["gpt-5.5", "self-hosted-flash-2xh100"])
async def test_a_reply_of_a_model_that_nobody_priced_is_kept_with_its_bound_and_stops_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch, served: str
) -> None:
    alter_replies(monkeypatch, lambda reply: replace(reply, served_model=served))
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert served in ended.advice
    assert billing(world).keys() == {"unknown"}
    assert world.value("SELECT sum(unknown_pico) FROM attempt") == world.value("SELECT granted FROM budget") > 0


@pytest.mark.parametrize("kind", ["usage_unbalanced", "usage_negative", "usage_strings"])
async def test_usage_that_cannot_be_true_keeps_its_bound_and_stops_the_run(world: World, kind: str) -> None:
    world.plan_mishaps({"kind": kind, "every": 1, "match": "1.3."})
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert "usage is" in ended.advice
    assert world.sql("SELECT document_no, attempt_no FROM attempt WHERE billing = 'unknown'") == [(3, 1)]


async def test_replies_that_never_report_usage_stop_the_run(world: World) -> None:
    world.plan_mishaps({"kind": "usage_missing", "every": 1})
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert "DEEPSEEK_BASE_URL" in ended.advice
    assert 5 <= billing(world)["unknown"] < 60


async def test_replies_that_now_and_then_lack_usage_stop_nothing(world: World) -> None:
    world.plan_mishaps({"kind": "usage_missing", "share": 0.15, "seed": 7})
    run, _ = await world.run()
    assert run.state == "done"
    assert billing(world)["unknown"] > 5


async def test_a_lane_that_drains_does_not_wait_for_the_money_of_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "0.002 USD"
    run = await world.open(budget=budget)
    async with opened(enrichment.require_database(world.settings), Role.LANE) as ledger:
        other = await leases.register(ledger, run.run_id)
        async with leases.alive(ledger, other):
            held = run.cap - 100
            assert await budgets.open_grant(ledger, run.run_id, other, run.budget_id, need=held, want=held)
            working = await Working.start(world, monkeypatch, budget=budget)
            await working.wait_until("is all spoken for")
            working.lane.drain("interrupted")
            assert (await working.ended()).reason == "interrupted"
    assert world.bill() == {}


@pytest.mark.parametrize("question", [(leases, "claim"), (attempts, "find_endings")], ids=lambda asked: asked[1])
async def test_a_lane_that_drains_while_postgres_is_away_waits_only_for_what_was_sent(
    world: World, monkeypatch: pytest.MonkeyPatch, question: tuple[Any, str]
) -> None:
    ask, asked = getattr(*question), 0

    async def ask_once(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise PassingFailure("Postgres is away")
        return await ask(*arguments)

    held = hold_replies(monkeypatch)
    monkeypatch.setattr(*question, ask_once)
    working = await Working.start(world, monkeypatch)
    await working.wait_until("Postgres is away")
    while not held.count:
        await asyncio.sleep(0.01)
    working.lane.drain("interrupted")
    held.arrive.set()
    assert (await working.ended()).reason == "interrupted"
    assert billing(world) == {"known": held.count}


async def test_an_intent_that_waited_for_postgres_is_not_made_once_the_lane_drains(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    intend, is_away = attempts.intend, True

    async def intend_later(*arguments: Any) -> Any:
        if is_away:
            raise PassingFailure("Postgres is away")
        return await intend(*arguments)

    monkeypatch.setattr(attempts, "intend", intend_later)
    working = await Working.start(world, monkeypatch)
    await working.wait_until("Postgres is away")
    working.lane.drain("interrupted")
    is_away = False
    assert (await working.ended()).reason == "interrupted"
    assert world.value("SELECT count(*) FROM attempt_intent") == 0
    assert world.bill() == {}


async def test_a_heartbeat_that_hangs_is_given_up_and_the_lane_fences_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_arguments: Any) -> None:
        await asyncio.Event().wait()

    held = hold_replies(monkeypatch)
    working = await Working.start(world, monkeypatch, LeaseTimes(beat_every_s=0.05, fence_after_s=0.4))
    while not held.count:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(leases, "beat", hang)
    await working.wait_until("fenced")
    held.arrive.set()
    assert (await working.ended()).reason == "fenced"
    assert billing(world) == {"known": held.count}


async def test_a_lane_whose_heartbeat_is_overdue_makes_no_intent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its heartbeat hangs: here, for good, in a place that nothing gives up."""
    held = hold_replies(monkeypatch)

    async def hang(lane: Lane) -> None:
        lane._shares = lane._held = {"flash": 16, "pro": 16}  # as with its first heartbeat
        lane._allow(lanes=1)
        await asyncio.Event().wait()

    monkeypatch.setattr(Lane, "_beat", hang)
    working = await Working.start(world, monkeypatch, LeaseTimes(fence_after_s=0.8))
    while not held.count:
        await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    held.arrive.set()
    assert (await working.ended()).reason == "fenced"
    assert billing(world) == {"known": held.count}


@pytest.mark.parametrize("minutes", [5, -5])
async def test_what_waited_too_long_for_its_permit_is_not_sent_and_tried_again_at_the_price_of_then(
    world: World, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    intend, ahead = attempts.intend, timedelta(0)

    async def intend_slowly(*arguments: Any) -> Any:
        nonlocal ahead
        permits = await intend(*arguments)
        ahead = timedelta(minutes=minutes)  # from now on: only who waited for this permit waited too long
        return permits

    monkeypatch.setattr(attempts, "intend", intend_slowly)
    working = await Working.start(world, monkeypatch)
    now = working.lane.climber.now
    working.lane.climber.now = lambda: now() + ahead
    assert (await working.ended()).is_done
    late = world.sql("SELECT run_id, document_no, attempt_no, cost_pico FROM attempt WHERE signal = 'not_sent'")
    assert late
    for run, number, attempt, cost in late:
        assert cost == 0
        assert f"{run}.{number}.{attempt}" not in world.bill()
    assert world.value("SELECT count(*) FROM result") == 60


async def test_both_instants_of_an_attempt_are_on_the_providers_clock(world: World) -> None:
    await world.run()
    apart = "SELECT max(abs(extract(epoch FROM completed_at - sent_at))) FROM attempt_outcome"
    assert world.value(apart) < 60  # whatever the emulated provider's clock is set to


async def test_reservations_follow_the_providers_clock_when_it_moves_in_mid_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold_replies(monkeypatch)
    working = await Working.start(world, monkeypatch)
    while not held.count:
        await asyncio.sleep(0.01)
    world.server.house.clock.set(datetime(2026, 9, 24, 2, 0, tzinfo=UTC))  # a peak hour
    held.arrive.set()
    assert (await working.ended()).is_done
    bands = "SELECT DISTINCT band FROM attempt_intent JOIN price USING (price_id)"
    assert {band for (band,) in world.sql(bands)} == {"off_peak", "peak"}


async def test_money_is_given_back_only_when_its_outcome_is_durable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a budget for one attempt at a time, the next one is intended only when the last one is recorded."""
    (world.root / "jobs" / "colours" / "prompt.md").write_text("Say in JSON which colour.")  # nothing to prime
    await world.run(limit=1)
    worst = world.value("SELECT max(reserved) FROM attempt_intent WHERE tier = 'flash'")
    record, open_intents = attempts.record, []

    async def record_slowly(*arguments: Any) -> Any:
        await asyncio.sleep(0.2)
        intents = "SELECT count(*) FROM attempt_intent i WHERE NOT EXISTS (SELECT FROM attempt_outcome o WHERE"
        intents += " (o.run_id, o.document_no, o.attempt_no) = (i.run_id, i.document_no, i.attempt_no))"
        open_intents.append(world.value(intents))
        return await record(*arguments)

    monkeypatch.setattr(attempts, "record", record_slowly)
    _, ended = await world.run(budget=f"{worst * 19 // 10 / 10**12:.12f} USD")
    assert ended.reason == "budget"
    assert len(open_intents) > 1
    assert max(open_intents) == 1


async def test_no_back_off_is_slept_through_by_a_drain(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.settings = world.settings.model_copy(update={"time_scale": 1.0})
    world.plan_mishaps({"kind": "503", "every": 1, "args": {"retry_after": 3600}})
    working = await Working.start(world, monkeypatch)
    while not working.lane.climber.backing_off:
        await asyncio.sleep(0.01)
    working.lane.drain("interrupted")
    assert (await working.ended()).reason == "interrupted"


@pytest.mark.parametrize("trouble", [InputChanged("part-0 changed"), InputUnavailable("the store hiccups")])
async def test_trouble_with_the_input_lets_what_was_paid_arrive(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    held, ask, calls = hold_replies(monkeypatch), Bulkhead._ask, count(1)

    async def fail_once(self: Bulkhead, message: Any) -> Any:
        if (isinstance(message, Order) and message.what == "plan") or next(calls) != 2:
            return await ask(self, message)
        while not held.count:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.2, held.arrive.set)
        raise trouble

    monkeypatch.setattr(Bulkhead, "_ask", fail_once)
    working = await Working.start(world, monkeypatch)
    await working.ended()
    assert billing(world) == {"known": held.count}
    assert sum(world.bill().values()) == world.value("SELECT sum(cost_pico) FROM attempt")


async def test_a_read_that_hangs_is_what_a_lane_waits_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bulkhead._Reader.ask

    async def hang(self: bulkhead._Reader, message: Any) -> Any:
        if isinstance(message, Order) and message.what == "read_shard":
            self.opened = "part-0.parquet"
            await asyncio.Event().wait()
        return await ask(self, message)

    monkeypatch.setattr(bulkhead._Reader, "ask", hang)
    monkeypatch.setattr(bulkhead, "SLOW_AFTER_S", 0.0)
    working = await Working.start(world, monkeypatch)
    await working.wait_until("reading part-0.parquet for 0 s")
    working.lane.drain("interrupted")
    assert (await working.ended()).reason == "interrupted"


async def test_a_start_buries_no_lane_that_has_just_registered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its row and its session it looks like one whose session ended, so both ends of a run give it time."""
    monkeypatch.setattr(enrichment, "GONE_AFTER_S", 600.0)
    run = await world.open()
    async with opened(enrichment.require_database(world.settings), Role.LANE) as ledger:
        await leases.register(ledger, run.run_id)
    await world.open()
    await enrichment.settle_run(world.settings, run, [])
    assert world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL") == 1
    monkeypatch.setattr(enrichment, "GONE_AFTER_S", 0.0)
    await world.open()
    assert world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL") == 0


async def test_documents_that_wait_for_their_turn_do_not_pass_a_breaker_that_opened_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing primes the cache, all but one document of a lane wait for their turn to do so."""
    world.plan_mishaps({"kind": "html"})
    world.settings = world.settings.model_copy(update={"time_scale": 1.0})
    working = await Working.start(world, monkeypatch)
    await working.wait_until("the provider has not answered")
    await asyncio.sleep(0.3)  # long enough for dozens of attempts, and shorter than until the first probe
    assert world.value("SELECT count(*) FROM attempt_intent") == 5
    assert working.lane.in_flight == 0
    working.lane.drain("interrupted", "")
    assert (await working.ended()).reason == "interrupted"
