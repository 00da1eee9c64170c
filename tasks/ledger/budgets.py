"""The hard budget: a lane takes grants from one row, reserves each attempt's worst case from them, and gives back.

At every committed state: used by closed grants + amounts of open grants = granted <= cap (G9). A grant is closed
by what its attempts really cost plus the bounds of its unknowns, never by what was reserved; if a late reply
makes an unknown known, it is closed once more with the new sum.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.attempts import LaneId, RunId
from schemas.errors import ConfigurationError
from schemas.money import Currency, Money
from tasks.ledger.connection import Ledger


@dataclass(frozen=True, slots=True)
class WantedBudget:
    """The budget that a run is to draw on. Without a `name` it is the run's own; with one, all who name it share it.

    `cap` is what is to hold, `declared` what the job file says, both in pico units. With `keeps_cap` nobody asked for
    another cap than those: what somebody asked for before holds.
    """

    name: str | None
    currency: Currency
    cap: int
    declared: int
    is_simulated: bool
    keeps_cap: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Money a lane may spend without asking again, in pico units."""

    grant_id: int
    amount: int


@dataclass(frozen=True, slots=True)
class Room:
    """A budget in pico units: `spent`, bounds of unknowns included, and `held` by lanes for what they send."""

    cap: int
    spent: int
    held: int

    @property
    def left(self) -> int:
        return self.cap - self.spent - self.held


_MAKE = text("""
    INSERT INTO budget (currency, cap, is_simulated, name, declared)
    VALUES (:currency, :cap, :is_simulated, :name, :declared) ON CONFLICT (name, is_simulated) DO NOTHING
    RETURNING budget_id
""")

_SHARED = text("""
    SELECT budget_id, currency, cap, declared FROM budget
    WHERE name = :name AND is_simulated = :is_simulated FOR NO KEY UPDATE
""")

_CHANGE_CAP = text("UPDATE budget SET cap = :cap, declared = :declared WHERE budget_id = :budget_id")

_OPEN = text("""
    WITH room AS (
        SELECT budget_id, least(CAST(:want AS bigint), cap - granted) AS amount FROM budget
        WHERE budget_id = :budget_id AND cap - granted >= :need FOR UPDATE
    ), taken AS (
        UPDATE budget b SET granted = b.granted + room.amount FROM room
        WHERE b.budget_id = room.budget_id RETURNING b.budget_id, room.amount
    )
    INSERT INTO budget_grant (budget_id, run_id, lane_id, amount)
    SELECT budget_id, :run_id, :lane_id, amount FROM taken RETURNING grant_id, amount
""")

#: A grant that this lane was given by a COMMIT whose answer was lost.
_FORGOTTEN = text("""
    SELECT grant_id, amount FROM budget_grant g
    WHERE run_id = :run_id AND lane_id = :lane_id AND grant_id <> ALL(CAST(:known AS bigint[]))
      AND NOT EXISTS (SELECT FROM grant_close c WHERE c.grant_id = g.grant_id)
    LIMIT 1
""")

#: In one statement, so that nothing is given back between the two looks.
_IS_EXHAUSTED = text("""
    SELECT cap - granted < :need AND NOT EXISTS (
        SELECT FROM budget_grant g JOIN lane l USING (lane_id)
        WHERE g.budget_id = b.budget_id AND l.ended_at IS NULL
          AND NOT EXISTS (SELECT FROM grant_close c WHERE c.grant_id = g.grant_id))
    FROM budget b WHERE b.budget_id = :budget_id
""")

_ROOM = text("""
    SELECT b.cap, s.spent, greatest(b.granted - s.spent, 0) AS held
    FROM budget b CROSS JOIN LATERAL (
        SELECT coalesce(sum(l.cost + l.bounds), 0) AS spent
        FROM lane l JOIN run r USING (run_id) WHERE r.budget_id = b.budget_id) s
    WHERE b.budget_id = :budget_id
""")

_NAMED = text("SELECT budget_id FROM budget WHERE name = :name AND is_simulated = :is_simulated")

#: One settlement of a budget at a time: two would both write the next close of a grant.
_LOCK_BUDGET = text("""
    SELECT budget_id FROM budget WHERE budget_id = (SELECT budget_id FROM run WHERE run_id = :run_id)
    FOR NO KEY UPDATE
""")

#: Closes anew every one of these grants, and of these lanes' grants, whose books differ from the attempts' rows.
#: Each attempt is looked up by its key: a join could be one of all pairs, where statistics are older than the run.
_SETTLE = text("""
    WITH last AS (
        SELECT g.grant_id, g.budget_id, g.amount, c.close_no, coalesce(c.used, g.amount) AS booked
        FROM budget_grant g
        LEFT JOIN LATERAL (SELECT close_no, used FROM grant_close x WHERE x.grant_id = g.grant_id
                           ORDER BY close_no DESC LIMIT 1) c ON true
        WHERE g.run_id = :run_id AND (g.lane_id = ANY(:lanes) OR g.grant_id = ANY(:grants))
    ), spent AS (
        SELECT i.grant_id, sum(coalesce(
            (SELECT o.cost FROM attempt_outcome o
             WHERE o.run_id = i.run_id AND o.document_no = i.document_no AND o.attempt_no = i.attempt_no),
            (SELECT u.bound FROM attempt_unknown u
             WHERE u.run_id = i.run_id AND u.document_no = i.document_no AND u.attempt_no = i.attempt_no),
            i.reserved)) AS used
        FROM attempt_intent i
        WHERE i.run_id = :run_id AND i.grant_id IN (SELECT grant_id FROM last)
        GROUP BY i.grant_id
    ), due AS (
        SELECT last.grant_id, last.budget_id, last.booked, last.close_no, coalesce(spent.used, 0) AS used
        FROM last LEFT JOIN spent USING (grant_id)
        WHERE last.close_no IS NULL OR last.booked <> coalesce(spent.used, 0)
    ), closed AS (
        INSERT INTO grant_close (grant_id, close_no, used)
        SELECT grant_id, coalesce(close_no, 0) + 1, used FROM due RETURNING grant_id
    )
    UPDATE budget b SET granted = b.granted + d.change
    FROM (SELECT budget_id, sum(used - booked) AS change FROM due GROUP BY budget_id) d
    WHERE b.budget_id = d.budget_id
""")


async def find_budget(connection: AsyncConnection, wanted: WantedBudget) -> tuple[int, int]:
    """The id and the cap of the budget to draw on: a new one, or the shared one of that name, locked.

    A cap that is asked for changes a shared budget for all who name it. Raises ConfigurationError where that is in
    another currency, or where the job file declares another cap than the others' and none is asked for.
    """
    row = {name: getattr(wanted, name) for name in ("cap", "is_simulated", "name")}
    declared = None if wanted.name is None else wanted.declared
    row |= {"currency": wanted.currency.value, "declared": declared}
    made = (await connection.execute(_MAKE, row)).scalar_one_or_none()
    if made is not None:
        return int(made), wanted.cap
    shared = (await connection.execute(_SHARED, row)).one()
    if shared.currency != wanted.currency.value:
        raise ConfigurationError(_explain_currency(wanted, shared.currency))
    if not wanted.keeps_cap:
        await connection.execute(_CHANGE_CAP, row | {"budget_id": shared.budget_id})
        return shared.budget_id, wanted.cap
    if shared.declared != wanted.declared:
        raise ConfigurationError(_explain_cap(wanted, shared.declared))
    return shared.budget_id, shared.cap


def _explain_currency(wanted: WantedBudget, currency: str) -> str:
    return (
        f"budget: {wanted.name} is in {currency}, and this run is billed in {wanted.currency}; sums are never "
        "converted: name another budget for it"
    )


def _explain_cap(wanted: WantedBudget, declared: int) -> str:
    here, there = (
        Money(pico, wanted.currency).exact for pico in (wanted.declared, declared)
    )  # two that differ look it
    return (
        f"budget: this job caps {wanted.name} at {here}, and it was declared as {there} before: write that cap in "
        "every job that names it, or say once with --budget which one holds from now on, for all of them"
    )


async def open_grant(
    ledger: Ledger,
    run_id: RunId,
    lane_id: LaneId,
    budget_id: int,
    *,
    need: int,
    want: int,
    known: Collection[int] | None = None,
) -> Grant | None:
    """Take `want` pico units, or what is left if that is at least `need`. None: the cap does not allow it.

    With all its open grants that are `known`, a lane first gets one that it was given by a COMMIT whose answer was
    lost, whatever its amount: this is then safe to repeat.
    """
    async with ledger.transaction("open_grant") as connection:
        if known is not None:
            key = {"run_id": run_id, "lane_id": lane_id, "known": list(known)}
            if forgotten := (await connection.execute(_FORGOTTEN, key)).one_or_none():
                return Grant(*forgotten)
        row = (
            await connection.execute(
                _OPEN,
                {"budget_id": budget_id, "run_id": run_id, "lane_id": lane_id, "need": need, "want": want},
            )
        ).one_or_none()
        return Grant(*row) if row else None


async def is_exhausted(ledger: Ledger, budget_id: int, need: int) -> bool:
    """Whether it is in vain to ask again: `need` does not fit, and no living lane of any run can give some back."""
    async with ledger.transaction() as connection:
        return bool((await connection.execute(_IS_EXHAUSTED, {"budget_id": budget_id, "need": need})).scalar_one())


async def find_room(ledger: Ledger, budget_id: int) -> Room:
    """What was spent of a budget, what lanes hold of it, and so what is left. Costs one row per lane."""
    async with ledger.transaction() as connection:
        row = (await connection.execute(_ROOM, {"budget_id": budget_id})).one()
        return Room(*(int(sum_) for sum_ in row))


async def find_named(ledger: Ledger, name: str, *, is_simulated: bool) -> Room | None:
    """As `find_room`, of the shared budget of that name. None: nobody has drawn on it yet."""
    async with ledger.transaction() as connection:
        key = {"name": name, "is_simulated": is_simulated}
        found = (await connection.execute(_NAMED, key)).scalar_one_or_none()
    return None if found is None else await find_room(ledger, found)


async def close_grants(ledger: Ledger, run_id: RunId, grants: list[int]) -> None:
    """Close these grants by what their attempts used; every attempt of theirs must have been recorded."""
    async with ledger.transaction("close_grants") as connection:
        await settle_grants(connection, run_id, grants=grants)


async def settle_grants(
    connection: AsyncConnection, run_id: RunId, *, lanes: Sequence[LaneId] = (), grants: Sequence[int] = ()
) -> None:
    """Close these grants, and all of these ended lanes, by their attempts' rows. Safe to repeat."""
    await connection.execute(_LOCK_BUDGET, {"run_id": run_id})
    await connection.execute(_SETTLE, {"run_id": run_id, "lanes": list(lanes), "grants": list(grants)})
