"""Shared budgets: every run of every job that names one draws on one row, and they must agree on what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from schemas.attempts import Signal
from schemas.errors import BudgetExhausted, ConfigurationError
from schemas.money import Currency, Money
from schemas.records import Record
from tasks.grants import Grants
from tasks.ledger import budgets, leases, runs, spend
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.proof import prove
from tasks.ledger.runs import Opening, Run
from tests.ledgers import BACKFILL, BOOK, CAP, COST, JOB, RESERVED, Hand, lane_ledger, opening, sql, value

NAME = "tickets-2026-11"


def sharing(job: str = "colours", declared: int = CAP, **changes: Any) -> Opening:
    """A run of a job that names the shared budget, with that cap in its job file."""
    named = replace(JOB, name=job, budget_name=NAME, budget=Money(declared, changes.get("currency", Currency.USD)))
    return opening(**{"job": named, "cap": declared, "keeps_cap": "cap" not in changes} | changes)


async def two_runs(ledger: Ledger) -> tuple[Run, Run]:
    return await runs.open_run(ledger, sharing("first")), await runs.open_run(ledger, sharing("second"))


async def test_runs_that_name_a_budget_draw_on_one_row(ledger: Ledger, ledger_url: str) -> None:
    first, second = await two_runs(ledger)
    own = await runs.open_run(ledger, opening())
    assert first.budget_id == second.budget_id != own.budget_id
    assert (first.budget_name, second.budget_name, own.budget_name) == (NAME, NAME, None)
    assert sql(ledger_url, "SELECT name, cap, declared FROM budget ORDER BY 1") == [
        (NAME, CAP, CAP),
        (None, CAP, None),
    ]


async def test_jobs_that_start_at_once_make_one_budget(ledger_url: str) -> None:
    async with lane_ledger(ledger_url, pool_size=8) as ledger:
        opening_all = (runs.open_run(ledger, sharing(f"job-{number}")) for number in range(8))
        assert {run.budget_id for run in await asyncio.gather(*opening_all)} == {1}
    assert value(ledger_url, "SELECT count(*) FROM budget") == 1


async def test_simulated_money_and_real_money_never_share_a_budget(ledger: Ledger) -> None:
    real = await runs.open_run(ledger, sharing("first"))
    simulated = await runs.open_run(ledger, sharing("second", is_simulated=True))
    assert real.budget_id != simulated.budget_id


WRONG: dict[str, tuple[Callable[[], Opening], str]] = {
    "another cap": (lambda: sharing("second", CAP * 2), f"caps {NAME} at 2 USD, and it was declared as 1 USD before"),
    "another currency": (lambda: sharing("second", currency=Currency.CNY), f"{NAME} is in USD, .* billed in CNY"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_job_that_does_not_agree_is_refused_and_nothing_is_opened(
    name: str, ledger: Ledger, ledger_url: str
) -> None:
    await runs.open_run(ledger, sharing("first"))
    make, words = WRONG[name]
    with pytest.raises(ConfigurationError, match=words) as caught:
        await runs.open_run(ledger, make())
    assert caught.value.exit_code == 2
    assert value(ledger_url, "SELECT count(*) FROM run") == 1


async def test_a_run_whose_file_changed_its_mind_about_the_cap_is_not_resumed(ledger: Ledger) -> None:
    await two_runs(ledger)
    with pytest.raises(ConfigurationError, match="at 2 USD, and it was declared as 1 USD before"):
        await runs.open_run(ledger, sharing("second", CAP * 2))


async def test_a_cap_that_was_given_holds_for_all_from_then_on(ledger: Ledger, ledger_url: str) -> None:
    first, _ = await two_runs(ledger)
    given = await runs.open_run(ledger, sharing("second", cap=CAP * 3))
    assert (given.is_resumed, given.cap) == (True, CAP * 3)
    third, again = await runs.open_run(ledger, sharing("third")), await runs.open_run(ledger, sharing("first"))
    assert (third.cap, again.cap, again.run_id) == (CAP * 3, CAP * 3, first.run_id)
    events = sql(
        ledger_url, "SELECT run_id, kind, detail ->> 'cap' FROM run_event WHERE detail ? 'cap' ORDER BY event_id"
    )
    assert events == [
        (1, "opened", f"{CAP}"),
        (2, "opened", f"{CAP}"),
        (2, "cap_changed", f"{CAP * 3}"),
        (3, "opened", f"{CAP * 3}"),
    ]
    for run_id in (1, 2, 3):
        assert (await prove(ledger, run_id, BOOK)).proved


async def test_once_all_files_say_another_cap_it_is_given_once_and_then_agreed(ledger: Ledger) -> None:
    await two_runs(ledger)
    await runs.open_run(ledger, sharing("first", CAP * 2, cap=CAP * 2))
    assert (await runs.open_run(ledger, sharing("second", CAP * 2))).cap == CAP * 2
    with pytest.raises(ConfigurationError):
        await runs.open_run(ledger, sharing("third"))


async def test_a_run_does_not_change_its_budget(ledger: Ledger, ledger_url: str) -> None:
    """Else what it spent would leave one sum for another: the rest goes on as a new run, which reuses the results."""
    await runs.open_run(ledger, opening())
    moved = await runs.open_run(ledger, sharing("colours"))
    assert (moved.is_resumed, moved.budget_name) == (False, NAME)
    assert sql(ledger_url, "SELECT state FROM run ORDER BY run_id") == [("superseded",), ("running",)]


async def test_what_one_run_took_is_not_there_for_the_other(ledger: Ledger, ledger_url: str) -> None:
    run, other = await two_runs(ledger)
    first, second = await Hand.join(ledger, run, amount=CAP - RESERVED), await Hand.join(ledger, other, amount=1)
    key = (ledger, other.run_id, second.lane_id, other.budget_id)
    assert await budgets.open_grant(*key, need=RESERVED, want=RESERVED) is None
    assert not await budgets.is_exhausted(ledger, other.budget_id, RESERVED)
    await first.leave()
    assert await budgets.open_grant(*key, need=RESERVED, want=RESERVED) is not None
    assert value(ledger_url, "SELECT granted FROM budget") == RESERVED + 1


async def test_the_dead_of_another_run_give_back_what_they_held(ledger: Ledger, ledger_url: str) -> None:
    run, other = await two_runs(ledger)
    await Hand.join(ledger, run, amount=CAP)
    sql(ledger_url, "UPDATE lane SET heartbeat_at = heartbeat_at - interval '1 hour'")
    alive = await leases.register(ledger, other.run_id)
    await leases.bury_sharing(ledger, other.run_id)
    key = (ledger, other.run_id, alive, other.budget_id)
    assert await budgets.open_grant(*key, need=CAP, want=CAP) is not None


async def test_a_lane_does_not_wait_for_ever_for_the_dead_of_another_run(ledger: Ledger, ledger_url: str) -> None:
    run, other = await two_runs(ledger)
    await Hand.join(ledger, run, amount=CAP)
    sql(ledger_url, "UPDATE lane SET heartbeat_at = heartbeat_at - interval '1 hour'")
    grants = Grants(ledger, other, await leases.register(ledger, other.run_id))
    async with asyncio.timeout(20), grants.reserved(RESERVED, rung=0):
        assert value(ledger_url, "SELECT ended_because FROM lane WHERE run_id = %s", run.run_id) == "died"


async def test_two_runs_that_wait_for_each_other_are_both_told_when_nothing_is_left(ledger: Ledger) -> None:
    """Neither fits, and each gives back what it holds before it gives up: whoever waits holds nothing."""
    both = await two_runs(ledger)
    lanes = [Grants(ledger, run, await leases.register(ledger, run.run_id)) for run in both]

    async def ask_too_much(grants: Grants) -> str:
        async with grants.reserved(RESERVED, rung=0):
            await asyncio.sleep(0.1)  # until the other has a grant too
        with pytest.raises(BudgetExhausted) as caught:
            async with grants.reserved(CAP * 2, rung=0):
                pass
        return str(caught.value)

    async with asyncio.timeout(20):
        told = await asyncio.gather(*map(ask_too_much, lanes))
    assert all(NAME in words and "for all who name it" in words for words in told)


async def test_both_runs_are_shown_and_proven_over_the_sum_of_both(ledger: Ledger, ledger_url: str) -> None:
    run, other = await two_runs(ledger)
    first = await Hand.join(ledger, run, amount=5 * RESERVED)
    await Hand.join(ledger, other, amount=RESERVED)
    lease = (await first.claim()).lease
    await first.answer(lease, 0)
    await first.intend(first.intent(lease, 1))
    await first.record(Record(first.outcome(1, signal=Signal.LOST, verdict=None, usage=None)))
    await first.leave()
    assert value(ledger_url, "SELECT granted FROM budget") == COST + RESERVED + RESERVED
    here = spend.SharedBudget(NAME, CAP, COST + RESERVED, 0, RESERVED, CAP - COST - 2 * RESERVED)
    there = replace(here, used_pico=0, others_pico=COST + RESERVED)
    async with opened(SecretStr(ledger_url), Role.AUDITOR) as auditor:
        assert (await spend.audit(auditor, run=run.run_id)).shared_budget == here
        assert (await spend.progress(auditor, run.run_id)).shared_budget == here
        assert (await spend.audit(auditor, run=other.run_id)).shared_budget == there
        assert (await spend.audit(auditor)).shared_budget == replace(here, used_pico=COST + RESERVED)
    for each in (run, other):
        assert (await prove(ledger, each.run_id, BOOK)).proved
    sql(ledger_url, "UPDATE budget SET granted = granted - 1")
    for each in (run, other):
        assert (await prove(ledger, each.run_id, BOOK)).guarantees["G9"] is False


async def test_what_an_export_closed_is_in_a_shared_budget_and_in_a_backfill_as_in_an_audit(
    ledger: Ledger, ledger_url: str
) -> None:
    run, _ = await two_runs(ledger)
    hand = await Hand.join(ledger, run, amount=5 * RESERVED)
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 1))
    await hand.record(Record(hand.outcome(1, signal=Signal.LOST, verdict=None, usage=None)))
    await hand.leave()
    sql(
        ledger_url,
        f"""
        INSERT INTO cost_adjustment (run_id, document_no, attempt_no, amount, evidence, billed_on, price_id, hit,
                                     miss, output)
        VALUES (1, 1, 1, {COST}, 'an export', '2026-09-26', 1, 640, 100, 5);
        {BACKFILL}; UPDATE backfill SET state = 'running'; UPDATE run SET backfill_id = 1""",
    )
    async with opened(SecretStr(ledger_url), Role.AUDITOR) as auditor:
        found = await spend.audit(auditor, run=run.run_id)
        backfill = await spend.progress_of_backfill(auditor, JOB.name)
    assert (found.cost_pico, found.unknown_pico) == (COST, 0)
    assert found.shared_budget == spend.SharedBudget(NAME, CAP, COST, 0, RESERVED - COST, CAP - RESERVED)
    assert backfill is not None
    assert (backfill.cost_pico, backfill.unknown_pico) == (COST, 0)


async def test_a_run_that_is_being_settled_keeps_nobody_from_the_shared_budget(
    ledger: Ledger, ledger_url: str
) -> None:
    """Its digest reads every row, which takes minutes where there are millions."""
    first, second = await two_runs(ledger)
    hand, neighbour = await Hand.join(ledger, first), await Hand.join(ledger, second)
    for _ in range(2):
        await hand.answer_shard()
    async with lane_ledger(ledger_url) as other, await psycopg.AsyncConnection.connect(ledger_url) as slow:
        await slow.execute("LOCK TABLE farthing.answer IN ACCESS EXCLUSIVE MODE")  # only the digest reads it
        settling = asyncio.create_task(runs.settle(other, first.run_id))
        waits = "datname = current_database() AND wait_event = 'relation'"
        while not value(ledger_url, f"SELECT count(*) FROM pg_stat_activity WHERE {waits}"):
            await asyncio.sleep(0.02)
        need = {"need": RESERVED, "want": RESERVED}
        grant = await asyncio.wait_for(
            budgets.open_grant(ledger, second.run_id, neighbour.lane_id, second.budget_id, **need), timeout=5
        )
        assert grant is not None
        assert not settling.done()
        await slow.rollback()
        assert await settling is not None
    assert value(ledger_url, f"SELECT granted FROM budget WHERE budget_id = {first.budget_id}") > 0
