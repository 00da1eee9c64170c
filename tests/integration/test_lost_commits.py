"""A COMMIT whose answer was lost: what it gave is found again, so that asking twice takes nothing twice."""

from __future__ import annotations

from schemas.records import Lease
from tasks.ledger import budgets, leases, runs
from tasks.ledger.budgets import Grant
from tasks.ledger.connection import Ledger
from tests.ledgers import CAP, RESERVED, Hand, opening, value


async def join(ledger: Ledger) -> Hand:
    return await Hand.join(ledger, await runs.open_run(ledger, opening()), amount=RESERVED)


async def test_a_shard_whose_claim_was_not_heard_of_is_claimed_again_under_a_new_epoch(ledger: Ledger) -> None:
    hand = await join(ledger)
    await hand.claim()  # and suppose that the answer was lost
    again = await leases.claim(ledger, hand.run.run_id, hand.lane_id, working=[])
    assert again is not None
    assert again.lease == Lease(0, 2)
    following = await leases.claim(ledger, hand.run.run_id, hand.lane_id, working=[0])
    assert following is not None
    assert following.lease == Lease(1, 1)
    assert await leases.claim(ledger, hand.run.run_id, hand.lane_id, working=[0, 1]) is None


async def test_another_lanes_shard_is_not_taken_for_one_that_was_not_heard_of(ledger: Ledger) -> None:
    hand = await join(ledger)
    await hand.claim()
    other = await Hand.join(ledger, hand.run, amount=RESERVED)
    claimed = await leases.claim(ledger, hand.run.run_id, other.lane_id, working=[])
    assert claimed is not None
    assert claimed.lease == Lease(1, 1)


async def test_a_grant_that_was_not_heard_of_is_given_before_new_money_is_taken(
    ledger: Ledger, ledger_url: str
) -> None:
    hand = await join(ledger)

    async def ask(*known: int) -> Grant | None:
        run = hand.run
        return await budgets.open_grant(
            ledger, run.run_id, hand.lane_id, run.budget_id, need=5 * RESERVED, want=5 * RESERVED, known=known
        )

    assert await ask() == Grant(hand.grant_id, RESERVED)  # smaller than needed, and still not to be forgotten
    assert value(ledger_url, "SELECT granted FROM budget") == RESERVED
    fresh = await ask(hand.grant_id)
    assert fresh is not None
    assert fresh.amount == 5 * RESERVED
    await budgets.close_grants(ledger, hand.run.run_id, [hand.grant_id])
    assert await ask(fresh.grant_id) != Grant(hand.grant_id, RESERVED)  # a closed one is spent
    assert value(ledger_url, "SELECT granted FROM budget") <= CAP
