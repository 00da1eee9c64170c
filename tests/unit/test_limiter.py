"""The adaptive in-flight limit: slow start, one cut per round trip, a fair queue, no place lost when cancelled."""

from __future__ import annotations

import asyncio

from schemas.attempts import Signal
from tasks.limiter import CALM_ROUND_TRIPS, DECREASE, SLOW_START, Limiter


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


async def test_a_ceiling_that_holds_is_doubted_at_the_price_of_one_objection() -> None:
    limiter, objections = Limiter(ceiling=1000), 0
    tickets = await fill(limiter)
    for _ in range(2 + 4 * CALM_ROUND_TRIPS):
        for ticket in tickets[:]:
            tickets.remove(ticket)
            limiter.release(ticket, Signal.ANSWERED)
            for more in await fill(limiter):
                if len(tickets) < 50:
                    tickets.append(more)
                else:  # the provider says so at once
                    limiter.release(more, Signal.RATE_LIMITED, ceiling=50)
                    objections += 1
    assert limiter.limit == 50
    assert 4 <= objections <= 1 + 4


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
