"""The adaptive in-flight limit: slow start, one cut per round trip, a fair queue, no place lost when cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from schemas.attempts import Signal
from tasks.limiter import CALM_ROUND_TRIPS, DECREASE, SLOW_START, Limiter, Place


async def fill(limiter: Limiter) -> list[int]:
    """Take every free place; returns the tickets."""
    return [await limiter.acquire() for _ in range(limiter.limit - limiter.in_flight)]


def release_all(limiter: Limiter, tickets: list[int], signal: Signal | None = Signal.ANSWERED) -> None:
    for ticket in tickets:
        limiter.release(ticket, signal)


async def round_trip(limiter: Limiter, tickets: list[int]) -> list[int]:
    """Everything in flight is answered, and each place given back is taken again at once."""
    taken: list[int] = []
    for ticket in tickets:
        limiter.release(ticket, Signal.ANSWERED)
        taken += await fill(limiter)
    return taken


async def test_the_limit_doubles_each_round_trip_until_the_ceiling() -> None:
    limiter = Limiter(ceiling=100)
    tickets = await fill(limiter)
    seen = []
    for _ in range(4):
        seen.append(limiter.limit)
        tickets = await round_trip(limiter, tickets)
    assert seen == [SLOW_START, 2 * SLOW_START, 4 * SLOW_START, 100]
    assert limiter.in_flight == limiter.limit == 100


async def test_a_ceiling_below_the_start_holds_from_the_start() -> None:
    limiter = Limiter(ceiling=3)
    release_all(limiter, await fill(limiter))
    assert limiter.limit == 3


async def test_one_round_trip_of_objections_cuts_the_limit_once() -> None:
    limiter = Limiter(ceiling=1000)
    release_all(limiter, await fill(limiter), Signal.RATE_LIMITED)
    assert limiter.limit == int(SLOW_START * DECREASE)
    release_all(limiter, await fill(limiter), Signal.UNAVAILABLE)
    assert limiter.limit == int(SLOW_START * DECREASE * DECREASE)


async def test_after_an_objection_the_limit_grows_by_about_one_a_round_trip() -> None:
    limiter = Limiter(ceiling=1000)
    tickets = await fill(limiter)
    limiter.release(tickets.pop(), Signal.RATE_LIMITED)
    release_all(limiter, tickets, None)
    cut = limiter.limit
    tickets = await fill(limiter)
    for _ in range(5):
        tickets = await round_trip(limiter, tickets)
    assert cut + 4 <= limiter.limit <= cut + 6


async def test_a_stated_ceiling_is_believed_at_once() -> None:
    limiter = Limiter(ceiling=1000)
    tickets = await fill(limiter)
    limiter.release(tickets.pop(), Signal.RATE_LIMITED, ceiling=4)
    assert limiter.limit <= 4


async def test_each_of_several_lanes_believes_its_share_of_a_stated_ceiling() -> None:
    limiters = [Limiter(ceiling=1000, lanes=3) for _ in range(3)]
    for limiter in limiters:
        tickets = await fill(limiter)
        limiter.release(tickets.pop(), Signal.RATE_LIMITED, ceiling=39)
        release_all(limiter, tickets, None)
        tickets = await fill(limiter)
        for _ in range(CALM_ROUND_TRIPS - 1):
            tickets = await round_trip(limiter, tickets)
    assert [limiter.limit for limiter in limiters] == [13, 13, 13]


async def test_a_stated_ceiling_is_remembered_and_passed_only_after_a_calm_while() -> None:
    limiter = Limiter(ceiling=1000)
    tickets = await fill(limiter)
    limiter.release(tickets.pop(), Signal.RATE_LIMITED, ceiling=8)
    release_all(limiter, tickets, None)
    seen = []
    tickets = await fill(limiter)
    for _ in range(CALM_ROUND_TRIPS + 4):
        tickets = await round_trip(limiter, tickets)
        seen.append(limiter.limit)
    assert seen[: CALM_ROUND_TRIPS - 1] == [8] * (CALM_ROUND_TRIPS - 1)
    assert seen[-1] > 8 * 4, "after that it is a slow start again"


class Account:
    """A provider with a ceiling for all lanes: it answers in turn, and refuses `late` answers after it was asked."""

    def __init__(self, ceiling: int, limiters: list[Limiter], *, late: int = 1, states: bool = True) -> None:
        self.ceiling, self.limiters, self.late, self.states = ceiling, limiters, late, states
        self.running: deque[tuple[Limiter, int]] = deque()
        self.refused: deque[tuple[int, Limiter, int]] = deque()
        self.answers = self.objections = 0

    async def round_trip(self) -> None:
        for _ in range(max(1, len(self.running))):
            await self.answer()

    async def answer(self) -> None:
        self.answers += 1
        if self.running:
            limiter, ticket = self.running.popleft()
            limiter.release(ticket, Signal.ANSWERED)
        while self.refused and self.refused[0][0] <= self.answers:
            _, limiter, ticket = self.refused.popleft()
            limiter.release(ticket, Signal.RATE_LIMITED, self.ceiling if self.states else None)
            self.objections += 1
        for limiter in self.limiters:
            for ticket in await fill(limiter):
                if len(self.running) < self.ceiling:
                    self.running.append((limiter, ticket))
                else:
                    self.refused.append((self.answers + self.late, limiter, ticket))


async def test_a_ceiling_that_holds_is_doubted_at_the_price_of_what_is_sent_until_the_first_objection() -> None:
    limiter = Limiter(ceiling=1000)
    account = Account(50, [limiter], late=5)
    for _ in range(10):
        await account.round_trip()
    before = account.objections
    for _ in range(4 * CALM_ROUND_TRIPS):
        await account.round_trip()
    assert 1 <= account.objections - before <= 4 * 5
    assert limiter.limit >= 50 * DECREASE


async def test_lanes_that_doubt_their_shares_do_not_starve_each_other() -> None:
    limiters = [Limiter(ceiling=1000, lanes=4) for _ in range(4)]
    account, limits, round_trips = Account(200, limiters, late=20), Counter[int](), 40 * CALM_ROUND_TRIPS
    for _ in range(round_trips):
        await account.round_trip()
        limits.update({number: limiter.limit for number, limiter in enumerate(limiters)})
    assert min(limits.values()) / round_trips > 45, limits
    assert account.objections < account.answers / 50


async def test_after_objections_without_a_stated_ceiling_the_limit_soon_climbs_again() -> None:
    limiter = Limiter(ceiling=1000)
    account = Account(1000, [limiter], states=False)
    for _ in range(10):
        await account.round_trip()
    assert limiter.limit == 1000
    account.ceiling = 20
    for _ in range(10):
        await account.round_trip()
    assert limiter.limit < 50
    account.ceiling = 1000
    for _ in range(2 * CALM_ROUND_TRIPS):
        await account.round_trip()
    assert limiter.limit == 1000


async def test_an_objection_at_a_ceiling_that_was_believed_before_is_a_cut() -> None:
    limiter = Limiter(ceiling=1000)
    limiter.release(await limiter.acquire(), Signal.RATE_LIMITED, ceiling=10)
    assert limiter.limit == 10
    release_all(limiter, await fill(limiter), Signal.RATE_LIMITED)
    assert limiter.limit == int(10 * DECREASE)


async def test_a_ceiling_that_is_topped_up_is_reached_again_in_the_end() -> None:
    limiter = Limiter(ceiling=100)
    limiter.release(await limiter.acquire(), Signal.RATE_LIMITED, ceiling=4)
    tickets = await fill(limiter)
    for _ in range(CALM_ROUND_TRIPS + 6):
        tickets = await round_trip(limiter, tickets)
    assert limiter.limit == 100


async def test_the_limit_never_falls_below_one() -> None:
    limiter = Limiter(ceiling=1000)
    for _ in range(50):
        release_all(limiter, await fill(limiter), Signal.RATE_LIMITED)
    limiter.release(await limiter.acquire(), Signal.RATE_LIMITED, ceiling=0)
    assert limiter.limit == 1


async def test_successes_of_an_idle_lane_do_not_raise_the_limit() -> None:
    limiter = Limiter(ceiling=1000)
    for _ in range(100):
        limiter.release(await limiter.acquire(), Signal.ANSWERED)
    assert limiter.limit == SLOW_START


async def test_no_more_than_the_limit_are_in_flight_and_the_first_come_are_first_served() -> None:
    limiter = Limiter(ceiling=2)
    tickets = await fill(limiter)
    served: list[int] = []

    async def ask(number: int) -> None:
        tickets.append(await limiter.acquire())
        served.append(number)

    waiting = [asyncio.create_task(ask(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert (limiter.in_flight, served) == (2, [])
    limiter.release(tickets[0])
    limiter.release(tickets[1])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (limiter.in_flight, served) == (2, [0, 1])
    limiter.release(tickets[2])
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2]


async def test_a_place_given_to_a_cancelled_waiter_goes_to_the_next() -> None:
    limiter = Limiter(ceiling=1)
    ticket = await limiter.acquire()
    first, second = (asyncio.create_task(limiter.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    limiter.release(ticket)  # the place is first's from here on
    first.cancel()
    await asyncio.wait([first])
    assert await second > ticket
    assert limiter.in_flight == 1


async def test_a_waiter_cancelled_in_the_queue_is_passed_over() -> None:
    limiter = Limiter(ceiling=1)
    ticket = await limiter.acquire()
    first, second = (asyncio.create_task(limiter.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    limiter.release(ticket)
    await second
    assert limiter.in_flight == 1


async def test_below_a_lowered_ceiling_nobody_is_let_in_before_enough_have_left() -> None:
    limiter = Limiter(ceiling=16)
    tickets = await fill(limiter)
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.allow(3, lanes=1)
    for ticket in tickets[:13]:
        limiter.release(ticket, Signal.ANSWERED)
    await asyncio.sleep(0)
    assert (limiter.in_flight, limiter.limit, waiting.done()) == (3, 3, False)
    limiter.release(tickets[13], Signal.ANSWERED)
    await waiting
    assert limiter.in_flight == 3


async def test_a_place_taken_before_the_ceiling_fell_is_surplus_until_enough_are_given_back() -> None:
    limiter = Limiter(ceiling=4)
    places = [Place(limiter, await limiter.acquire()) for _ in range(4)]
    assert not any(place.is_surplus for place in places)
    limiter.allow(2, lanes=1)
    assert all(place.is_surplus for place in places)
    for place in places[:2]:
        place.leave()
    assert not any(place.is_surplus for place in places)


async def test_a_raised_ceiling_is_reached_as_fast_as_from_a_start_and_waiters_are_let_in_at_once() -> None:
    limiter = Limiter(ceiling=2)
    tickets = await fill(limiter)
    limiter.allow(64, lanes=1)
    seen = []
    for _ in range(6):
        tickets = await round_trip(limiter, tickets)
        seen.append(limiter.limit)
    assert seen == [4, 8, 16, 32, 64, 64]


async def test_what_the_provider_stated_outlives_a_ceiling_that_was_lowered_and_raised() -> None:
    limiter = Limiter(ceiling=100)
    release_all(limiter, await fill(limiter))
    limiter.release(await limiter.acquire(), Signal.RATE_LIMITED, ceiling=6)
    limiter.allow(2, lanes=1)
    assert limiter.limit == 2
    limiter.allow(100, lanes=1)
    tickets = await fill(limiter)
    for _ in range(4):
        tickets = await round_trip(limiter, tickets)
    assert limiter.limit == 6


async def test_without_a_place_nobody_is_let_in_and_the_first_ones_are_used_as_at_a_start() -> None:
    limiter = Limiter(ceiling=0)
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(SLOW_START + 1)]
    await asyncio.sleep(0)
    assert limiter.in_flight == 0
    limiter.allow(100, lanes=1)
    await asyncio.sleep(0)
    assert limiter.in_flight == SLOW_START
    limiter.allow(0, lanes=1)
    release_all(limiter, list(range(1, SLOW_START + 1)))
    await asyncio.sleep(0)
    assert (limiter.in_flight, limiter.limit, waiting[-1].done()) == (0, 0, False)
    limiter.allow(2, lanes=1)
    await waiting[-1]


async def test_of_a_lane_that_drains_nobody_waits_for_a_place() -> None:
    limiter = Limiter(ceiling=0)
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.open()
    await waiting
    await limiter.acquire()


async def test_a_tier_is_wanted_while_somebody_has_a_place_or_waits_and_barred_while_there_is_none() -> None:
    limiter = Limiter(ceiling=0)
    assert (limiter.is_wanted, limiter.is_barred) == (False, False)
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    assert (limiter.is_wanted, limiter.is_barred) == (True, True)
    limiter.allow(1, lanes=1)
    ticket = await waiting
    assert (limiter.is_wanted, limiter.is_barred) == (True, False)
    limiter.release(ticket)
    assert not limiter.is_wanted
