"""A run notes what its account holds; an account that paid more than the ledger can explain is told of, no other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.balance import Paid
from schemas.money import PICO, Currency
from tasks import enrichment
from tasks.ledger import books, spend
from tasks.ledger.books import Scope
from tasks.ledger.connection import Role, opened
from tasks.report import balance_alarm
from tests.ledgers import sql
from tests.world import World, make_world


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url, documents=20) as made:
        yield made


def hold(world: World, dollars: int) -> None:
    """The account holds that much from now on."""
    account = world.server.house.account
    account.funded_pico = account.bill.cost_pico + dollars * PICO


async def paid(world: World, **scope: Any) -> tuple[Paid, ...]:
    """As an auditor, who reads nothing but views; an audit and a reconciliation say the same."""
    async with opened(SecretStr(world.database_url), Role.AUDITOR) as ledger:
        found = (await spend.audit(ledger, **scope)).balances
        if "run" in scope:
            assert await books.find_paid(ledger, Scope(scope["run"], None, Currency.USD, is_simulated=True)) == found
        return found


def notes(world: World) -> list[tuple[Any, ...]]:
    return world.sql(
        "SELECT detail ->> 'at', detail ->> 'currency', detail ->> 'total', detail ->> 'granted',"
        " detail ->> 'topped_up' FROM run_event WHERE kind = 'balance' ORDER BY event_id"
    )


async def test_a_run_notes_what_its_account_holds_and_what_it_paid_is_no_more_than_the_ledger_knows(
    world: World,
) -> None:
    run, _ = await world.run()
    account = world.server.house.account
    assert [each[:2] for each in notes(world)] == [("start", "USD"), ("end", "USD")]
    assert notes(world)[0][2:] == ("1000", "0", "1000")
    (found,) = await paid(world, run=run.run_id)
    assert 0 < found.cost_pico <= account.bill.cost_pico <= found.cost_pico + found.unknown_pico
    assert (found.paid_pico, found.added_pico, found.is_alarm) == (0, 0, False)  # the page tells whole cents


async def test_what_others_spend_on_the_account_is_an_alarm_and_what_came_onto_it_is_not(world: World) -> None:
    first, _ = await world.run()
    hold(world, 1_500)  # topped up
    second = await world.open(partitions=(), limit=5)
    hold(world, 1_493)  # another program at work
    ended = await world.work(second, limit=5)
    await enrichment.settle_run(world.settings, second, [ended])
    (alone,) = await paid(world, run=first.run_id)
    (other,) = await paid(world, run=second.run_id)
    (both,) = await paid(world, job="colours")
    assert (alone.is_alarm, other.is_alarm, both.is_alarm) == (False, True, True)
    assert (other.paid_pico, other.added_pico) == (7 * PICO, 0)
    assert (both.paid_pico, both.added_pico) == (7 * PICO, 500 * PICO)
    assert both.cost_pico <= world.server.house.account.bill.cost_pico <= both.cost_pico + both.unknown_pico
    assert "the account paid $7.00 more than this ledger can explain" in balance_alarm((other,))
    assert balance_alarm((alone,)) == ""


#: Of the second run one attempt cost a dollar, and one may have.
DEARER = """
    UPDATE attempt_outcome SET cost = 1000000000000 WHERE run_id = 2 AND document_no = 0;
    UPDATE attempt_outcome SET cost = NULL WHERE run_id = 2 AND document_no = 1;
    INSERT INTO attempt_unknown SELECT run_id, document_no, attempt_no, 1000000000000, 'lost' FROM attempt_intent
    WHERE run_id = 2 AND document_no = 1 ORDER BY attempt_no LIMIT 1
"""
ELSEWHERE = """UPDATE run_event SET detail = detail || '{"provider": "elsewhere"}' WHERE run_id = 2"""


async def test_what_other_runs_may_have_been_billed_meanwhile_explains_it(world: World) -> None:
    """Half of it is booked, half may have been billed; what a run of another provider spends explains nothing."""
    first = await world.open()
    second = await world.open(limit=5)
    await world.work(second, limit=5)
    ended = await world.work(first)
    sql(world.database_url, DEARER)
    hold(world, 998)
    await enrichment.settle_run(world.settings, first, [ended])
    (found,) = await paid(world, run=1)
    assert (found.paid_pico, found.is_alarm) == (2 * PICO, False)
    assert found.unknown_pico == PICO
    sql(world.database_url, ELSEWHERE)
    assert (await paid(world, run=1))[0].is_alarm


async def test_two_accounts_at_one_provider_are_two(world: World) -> None:
    await world.run()
    hold(world, 300)  # what the account of the other key holds
    world.settings = world.settings.model_copy(update={"api_key": SecretStr("sk-sandbox-of-another-team")})
    await world.run(partitions=(), limit=5)
    found = await paid(world, job="colours")
    assert [(each.paid_pico < PICO, each.is_alarm) for each in found] == [(True, False)] * 2


EXPIRED = """
    UPDATE run_event SET detail = detail || '{"total": "1020", "granted": "20"}'
    WHERE kind = 'balance' AND detail ->> 'at' = 'start';
    UPDATE run_event SET detail = detail || '{"total": "1000", "granted": "0"}'
    WHERE kind = 'balance' AND detail ->> 'at' = 'end'
"""


async def test_what_was_granted_and_expired_is_no_alarm(world: World) -> None:
    run, _ = await world.run()
    sql(world.database_url, EXPIRED)
    (found,) = await paid(world, run=run.run_id)
    assert (found.paid_pico, found.is_alarm, found.is_granted) == (20 * PICO, False, True)
    assert "granted balance expires" in balance_alarm((found,))
    sql(world.database_url, EXPIRED.replace('"total": "1000"', '"topped_up": "999", "total": "999"'))
    assert (await paid(world, run=run.run_id))[0].is_alarm


async def test_a_balance_that_is_not_told_is_not_known_and_fails_no_run(world: World) -> None:
    run = await world.open()
    ended = await world.work(run)
    nowhere = world.settings.model_copy(update={"base_url": "http://127.0.0.1:9"})
    assert (await enrichment.settle_run(nowhere, run, [ended])).state == "done"
    assert notes(world)[-1] == ("end", "USD", None, None, None)
    assert await paid(world, run=run.run_id) == ()


async def test_a_provider_without_such_a_page_is_not_asked(world: World) -> None:
    """A price card is set where there is none."""
    world.settings = world.settings.model_copy(update={"currency": Currency.USD})
    run, _ = await world.run()
    assert (notes(world), await paid(world, run=run.run_id)) == ([], ())
