"""What if, from a real ledger: its own rows, read by an auditor, priced again."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.errors import ConfigurationError
from schemas.whatif import Past, Scenario, reprice
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.spend import audit
from tasks.ledger.whatif import find_past
from tests.integration.test_spend import PRO_COST
from tests.ledgers import BOOK, COST, RESERVED, run_everything


async def read(url: str, below: str | None = None, run: int = 1) -> Past:
    async with opened(SecretStr(url), Role.AUDITOR) as ledger:
        return await find_past(ledger, run, BOOK, None if below is None else Decimal(below))


async def test_priced_again_by_the_same_book_a_run_costs_what_it_cost(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    found, was = await audit(ledger, run=RunId(run.run_id)), await read(ledger_url)
    again = reprice(was, Scenario(), BOOK)
    assert (again.cost_pico, again.unknown_pico) == (found.cost_pico, found.unknown_pico)
    assert (was.cost_pico, was.unknown_pico) == (found.cost_pico, found.unknown_pico)
    for name, step in zip(("flash", "pro"), again.steps, strict=True):
        tier = found.tiers[name]
        assert (step.name, step.cost_pico, step.unknown_pico) == (name, tier.cost_pico, tier.unknown_pico)
    assert [step.documents for step in again.steps] == [5, 1]  # the sixth is a copy, and was not sent
    assert reprice(await read(ledger_url, below="0.85"), Scenario(), BOOK) == again  # the run's own threshold


async def test_each_tier_alone_is_priced_from_what_was_sent(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    was = await read(ledger_url)
    flash, pro = (reprice(was, Scenario(ladder=(name,)), BOOK) for name in ("flash", "pro"))
    assert (flash.cost_pico, flash.unknown_pico) == (5 * COST, 2 * RESERVED)
    # W at Pro's prices is at most W times 660,000 / 150,000, the dearer of the two ratios
    assert (pro.cost_pico, pro.unknown_pico) == (5 * PRO_COST, 2 * RESERVED * 66 // 15)


@pytest.mark.parametrize(
    ("below", "at_pro", "cost"),
    [
        ("0.4", 0, 5 * COST),  # document 1 was 0.4 sure: not below
        ("0.41", 1, 5 * COST + PRO_COST),
        ("0.9", 1, 5 * COST + PRO_COST),  # the others were 0.9 sure
        ("0.95", 4, 5 * COST + 4 * PRO_COST),  # three results of flash would climb; the dead letter would not
    ],
)
async def test_another_threshold_moves_the_documents_that_it_decides_about(
    below: str, at_pro: int, cost: int, ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    found = reprice(await read(ledger_url, below), Scenario(), BOOK)
    assert [step.documents for step in found.steps] == [5, at_pro]
    assert found.cost_pico == cost


async def test_a_run_that_is_not_there_is_refused(ledger_url: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no run 7"):
        await read(ledger_url, run=7)
