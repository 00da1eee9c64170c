"""A lane's money: reservations out of its open grants, and what happens when the cap is near.

The cap holds because money is taken from the budget before it is reserved, and reserved before anything is sent.
Near the cap a reservation waits for attempts in flight to give back what they did not need; only when no lane that
draws on the budget, of this run or another, can give anything back any more is it exhausted. So that nobody waits in
vain, a lane keeps no grant that it does not reserve from, and those that died are buried, whatever run they are of.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from schemas.attempts import LaneId
from schemas.errors import BudgetExhausted
from schemas.money import Money
from tasks.drains import Draining, rest
from tasks.ledger import budgets, leases
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Run
from tasks.patience import Patience

#: A grant lasts about so long at the lane's rate of reserving, so that the budget's one row is not hot.
GRANT_LASTS_S = 8.0
#: The first grant of a lane, in worst cases.
FIRST_GRANT = 64
#: How long to wait before asking again while another lane may give money back.
ASK_AGAIN_S = 0.5


@dataclass
class _Open:
    """One open grant: what is free of it, and how many reservations are out.

    `is_closing`: nothing more is reserved from it.
    """

    free: int
    out: int = 0
    is_closing: bool = False


@dataclass
class Reservation:
    """Money set aside for an attempt; `used` is what it took: its cost, or its bound while unknown; at first 0."""

    grant_id: int
    worst: int
    used: int = 0


@dataclass
class Grants:
    """The open grants of one lane. `tight_because` says why reservations wait where the cap has refused; None: no.

    `may_bury` says whether the lane knows enough to take lanes of other runs for dead.
    """

    ledger: Ledger
    run: Run
    lane_id: LaneId
    patience: Patience = field(default_factory=Patience)
    may_bury: Callable[[], bool] = lambda: True
    _tight_because: str = ""
    #: When somebody last had to wait for money, by the event loop's clock, and how many do now.
    _tight_at: float | None = None
    _waiting: int = 0
    _explained_at: float = 0.0
    _cap: int = field(init=False)
    _open: dict[int, _Open] = field(default_factory=dict)
    _reserved_since: float = 0.0
    _reserved: int = 0
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _newcomers: asyncio.Lock = field(default_factory=asyncio.Lock)
    _given_back: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._cap = self.run.cap

    @asynccontextmanager
    async def reserved(self, worst: int, *, rung: int) -> AsyncIterator[Reservation]:
        """Set `worst` pico units aside while the block lasts, then give back what was not used.

        First attempts queue behind one another and documents already paid for do not, so that near the cap the
        upper tiers get what comes back first. Raises BudgetExhausted, and Draining where it would have to wait.
        """
        reservation = Reservation(await self._reserve(worst, rung), worst)
        try:
            yield reservation
        finally:
            grant = self._open[reservation.grant_id]
            grant.free += worst - reservation.used
            grant.out -= 1
            self._given_back.set()

    async def _reserve(self, worst: int, rung: int) -> int:
        self._reserved += worst
        if not self._asking.locked() and (grant_id := self._take(worst)) is not None:
            return grant_id
        if rung > 0:
            return await self._ask(worst)
        async with self._newcomers:
            return await self._ask(worst)

    async def _ask(self, worst: int) -> int:
        async with self._asking:
            while True:
                if (grant_id := self._take(worst)) is not None:
                    return grant_id
                if self.patience.draining.is_set():
                    raise Draining
                self._given_back.clear()
                opened = await self.patience.ask(
                    budgets.open_grant,
                    self.ledger,
                    self.run.run_id,
                    self.lane_id,
                    self.run.budget_id,
                    need=worst,
                    want=max(worst, self._wanted(worst)),
                    known=list(self._open),
                )
                if opened is not None:
                    self._open[opened.grant_id] = _Open(opened.amount)
                    self._tight_at = None
                    await self._close_spent()
                    continue
                await self._note_tightness(worst)
                self._waiting += 1
                try:
                    await self._wait_for_money(worst)
                finally:
                    self._waiting -= 1

    async def _note_tightness(self, worst: int) -> None:
        """Say why it waits; not anew with each reply, of which there may be hundreds in a second."""
        now = asyncio.get_running_loop().time()
        if not self._tight_because or now - self._explained_at > ASK_AGAIN_S:
            self._explained_at = now
            more = f"`farthing budget {self.run.run_id} SUM`"
            advice = f"; replies give back what they did not need, and {more} raises it"
            self._tight_because = await self._explain("is all spoken for", worst) + advice
        self._tight_at = now

    async def _explain(self, how: str, worst: int) -> str:
        """How the budget stands, in sums that add up to its cap, and what the next attempt needs of it."""
        room = await self.patience.ask(budgets.find_room, self.ledger, self.run.budget_id)
        shared = self.run.budget_name
        whose = f"{shared}, the budget that this run shares," if shared else "the budget"
        cap, spent, held, left, most = (
            str(Money(pico, self.run.currency)) for pico in (room.cap, room.spent, room.held, room.left, worst)
        )
        return (
            f"{whose} of {cap} {how}: {spent} spent, {held} held for what is in flight, {left} left, and the next "
            f"attempt may cost up to {most}"
        )

    @property
    def tight_because(self) -> str | None:
        """Why reservations wait, or waited a moment ago, where the cap has refused; None: none does."""
        if self._tight_at is None:
            return None
        is_past = asyncio.get_running_loop().time() - self._tight_at > ASK_AGAIN_S
        return None if is_past and not self._waiting else self._tight_because

    async def _wait_for_money(self, worst: int) -> None:
        """Until something is given back here, or may have been elsewhere. Raises BudgetExhausted or Draining."""
        if any(grant.out for grant in self._open.values()):
            await self._given_back.wait()
        elif self._open:
            await self._close(list(self._open))  # scraps that are too small for anyone, together, may be enough
        elif await self.patience.ask(budgets.is_exhausted, self.ledger, self.run.budget_id, worst):
            raise BudgetExhausted(await self._advice(worst))
        else:
            if self.run.budget_name and self.may_bury():  # the own run's dead are buried at every heartbeat
                await self.patience.ask(leases.bury_sharing, self.ledger, self.run.run_id)
            await rest(self.patience.draining, ASK_AGAIN_S)

    async def _advice(self, worst: int) -> str:
        for_all = ", which raises it for all who name it" if self.run.budget_name else ""
        return (
            f"{await self._explain('does not cover one more attempt', worst)}; run the same command with a larger "
            f"--budget to go on{for_all}"
        )

    async def give_back(self) -> None:
        """Close what nothing is reserved from, unless somebody asks just now: another lane may wait for it."""
        if not self._asking.locked():
            async with self._asking:
                await self._close([grant_id for grant_id, grant in self._open.items() if not grant.out])

    def hear(self, cap: int, *, is_overdrawn: bool) -> None:
        """Take note of the budget's cap as it is now, and whether more than that is granted.

        Then it was lowered: what is open already is closed as its replies come, and whoever needs money asks anew.
        """
        if is_overdrawn:
            for grant in self._open.values():
                grant.is_closing = True
        if cap != self._cap:
            self._cap = cap
            self._given_back.set()  # whoever waits for money asks again

    def _take(self, worst: int) -> int | None:
        for grant_id, grant in self._open.items():
            if grant.free >= worst and not grant.is_closing:
                grant.free -= worst
                grant.out += 1
                return grant_id
        return None

    def _wanted(self, worst: int) -> int:
        """What a new grant should hold: GRANT_LASTS_S of reserving at the rate since the last one."""
        now = asyncio.get_running_loop().time()
        elapsed, reserved = now - self._reserved_since, self._reserved
        is_first = not self._reserved_since
        self._reserved_since, self._reserved = now, 0
        if is_first or elapsed <= 0:
            return FIRST_GRANT * worst
        return int(reserved * min(4.0, GRANT_LASTS_S / elapsed))

    async def _close_spent(self) -> None:
        """Close older grants that nothing is reserved from: the new one serves from now on."""
        *older, _newest = self._open
        await self._close([grant_id for grant_id in older if not self._open[grant_id].out])

    async def _close(self, grants: list[int]) -> None:
        for grant_id in grants:
            del self._open[grant_id]
        if grants:
            await self.patience.ask(budgets.close_grants, self.ledger, self.run.run_id, grants)
