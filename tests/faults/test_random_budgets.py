"""Random budgets, by seed: whatever the cap, the lanes and the mishaps, no cap is passed and hardly any is left.

Overshoot is the checker's to find (I7: by every instant, a budget's bill is within its cap). What is left unused when
a run pauses is measured here, bounds of unknown attempts being spent: less than one reservation, the dearest, in all
and not per lane. For whoever gave up last had looked once, and seen that its need does not fit and that no living
lane of any run holds a grant; so all was spent but less than that need, and only a late reply, which makes a bound a
cost, can give some back. A raised cap then finishes the run, and nothing is paid twice.

What a provider bills beyond what it was asked for no reservation can bound: then the run stops, and says by how much.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tasks.ledger.runs import Run
from tests.faults.purses import Draw, Pause, Purses, draw, purses, say
from tests.faults.summary import Tally

#: Budgets that are played side by side.
AT_ONCE = 6
#: What chance may still make of a run; after so many pauses it gets all the money it wants.
PAUSES = 2
SHORT, LONG, PARTS = 6, 1000, 8
SHORT_PAIRS, LONG_PAIRS = 2, 60


@pytest.fixture
async def table(tmp_path: Path, ledger_url: str) -> AsyncIterator[Purses]:
    async with purses(tmp_path, ledger_url) as made:
        yield made


@dataclass(frozen=True)
class Costs:
    """What an ordinary document costs, and the least that an attempt reserves, in pico units."""

    cost_of_one: int
    least: int


@dataclass(frozen=True)
class Played:
    """A budget's pauses, and the dearest reservation on it."""

    pauses: Sequence[Pause]
    dearest: int

    @property
    def left(self) -> list[float]:
        """What was left at each pause, in reservations; of a cap that was lowered too late, less than nothing."""
        return [(pause.cap - pause.spent) / self.dearest for pause in self.pauses]


async def measure(table: Purses) -> Costs:
    """One pass with plenty of money and no mishap."""
    plan = Draw("measure", 0, 24, 1, 16, 24, (), (0, 1.0))
    table.write_job(plan)
    run = await table.open(plan, None)
    assert (await table.settle(run, await table.work(run, plan))).state == "done"
    return Costs(table.pause(run, 0).spent // 24, table.sql("SELECT min(reserved) FROM attempt_intent")[0][0])


async def play(table: Purses, plan: Draw, dice: random.Random) -> Played:
    """One budget of one job, changed while it works, then raised at every pause until the run is done."""
    table.write_job(plan)
    run, pauses = await table.open(plan, plan.cap), list[Pause]()
    table.befall(run, plan)
    over = asyncio.Event()
    changing = asyncio.create_task(change(table, plan, over))
    reasons = await table.work(run, plan)
    over.set()
    cap = await changing
    low = min(cap, plan.cap)
    while (run := await table.settle(run, reasons)).state != "done":
        pause = table.pause(run, low)
        assert pause.granted == pause.spent, (run, pause)
        assert "provider" not in reasons, run  # a reply passed its worst case
        if reasons <= {"budget", "done"}:
            pauses.append(pause)
        low = cap = raised(cap, len(pauses), dice)
        run = await table.open(plan, cap)
        reasons = await table.work(run, plan)
    return Played(pauses, table.dearest(run.budget_id))


async def change(table: Purses, plan: Draw, over: asyncio.Event) -> int:
    """The cap from now on: another one, as an operator gives it while lanes are at work, or the same as before."""
    requests, factor = plan.change
    due = table.server.requests + requests
    while requests and table.server.requests < due and not over.is_set():
        await asyncio.sleep(0.005)
    if factor == 1.0 or over.is_set():
        return plan.cap
    cap = int(plan.cap * factor)
    await table.open(plan, cap)
    return cap


def raised(cap: int, pauses: int, dice: random.Random) -> int:
    """A larger cap; at last one that suffices."""
    return 10**12 if pauses >= PAUSES else int(cap * dice.uniform(1.05, 2.5)) + 10**6


async def play_pair(table: Purses, plans: Sequence[Draw], dice: random.Random) -> Played:
    """Two jobs on one budget, side by side; raised by one of them, for both, until both are done."""
    name, cap = plans[0].name, plans[0].cap
    budget = f"{{name: {name}, cap: {say(cap)}}}"
    for plan in plans:
        table.write_job(plan, budget)
    runs, pauses = [await table.open(plan, None) for plan in plans], list[Pause]()
    for run, plan in zip(runs, plans, strict=True):
        table.befall(run, plan)
    while True:
        reasons = await asyncio.gather(*(table.work(run, plan) for run, plan in zip(runs, plans, strict=True)))
        runs = [await table.settle(run, why) for run, why in zip(runs, reasons, strict=True)]
        if all(run.state == "done" for run in runs):
            return Played(pauses, table.dearest(runs[0].budget_id))
        pause = table.pause(runs[0], cap)
        assert pause.granted == pause.spent, (runs, pause)
        assert "provider" not in set.union(*reasons), runs
        if set.union(*reasons) <= {"budget", "done"}:
            pauses.append(pause)
        cap = raised(cap, len(pauses), dice)
        plans = [plan for run, plan in zip(runs, plans, strict=True) if run.state != "done"]
        runs = [await table.open(plan, None if number else cap) for number, plan in enumerate(plans)]


async def play_all(table: Purses, plays: Sequence[Callable[[], Awaitable[Played]]]) -> list[Played]:
    """A few at a time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def take_turn(one: Callable[[], Awaitable[Played]]) -> Played:
        async with turns:
            return await one()

    return await asyncio.gather(*(take_turn(one) for one in plays))


async def play_caps(table: Purses, seed: int, numbers: Sequence[int]) -> list[Played]:
    costs = await measure(table)

    def one(number: int) -> Callable[[], Awaitable[Played]]:
        dice = random.Random(f"{seed} budget {number}")
        plan = draw(dice, f"b{number}", least=costs.least, cost_of_one=costs.cost_of_one)
        return lambda: play(table, plan, dice)

    return await play_all(table, [one(number) for number in numbers])


async def play_pairs(table: Purses, seed: int, numbers: Sequence[int]) -> list[Played]:
    costs = await measure(table)

    def one(number: int) -> Callable[[], Awaitable[Played]]:
        dice = random.Random(f"{seed} pair {number}")
        both = [
            draw(dice, f"p{number}{which}", least=costs.least, cost_of_one=2 * costs.cost_of_one) for which in "ab"
        ]
        return lambda: play_pair(table, [replace(plan, lanes=2) for plan in both], dice)

    return await play_all(table, [one(number) for number in numbers])


async def judge(table: Purses, played: Sequence[Played], seed: int) -> None:
    """No cap was passed, hardly anything was left, and all ended, each document once."""
    assert await table.violations() == [], f"seed {seed}"
    for each in played:
        assert all(left < 1 for left in each.left), (f"seed {seed}", each)


def tell(tally: Tally, played: Sequence[Played]) -> None:
    tally.count("random budgets", len(played))
    tally.count("pauses at a cap", sum(len(each.pauses) for each in played))
    most = max((left for each in played for left in each.left), default=0.0)
    tally.figure("most left unused at a pause, in reservations", f"{most:.3f}")


async def test_no_random_cap_is_passed_and_less_than_one_reservation_is_left(
    table: Purses, seed: int, tally: Tally
) -> None:
    played = await play_caps(table, seed, range(SHORT))
    await judge(table, played, seed)
    assert any(each.pauses for each in played)
    tell(tally, played)


@pytest.mark.long
async def test_two_jobs_on_one_budget_pass_no_random_cap(table: Purses, seed: int, tally: Tally) -> None:
    played = await play_pairs(table, seed, range(SHORT_PAIRS))
    await judge(table, played, seed)
    assert any(each.pauses for each in played)
    tell(tally, played)


async def test_a_provider_that_breaks_its_own_limit_passes_a_cap_by_what_it_broke_and_no_more(
    table: Purses, tally: Tally
) -> None:
    costs = await measure(table)
    broken = {"kind": "usage_over_max_tokens", "every": 5, "args": {"by": 9000}}
    plan = Draw("broken", 40 * costs.cost_of_one, 24, 2, 16, 6, (broken,), (0, 1.0))
    table.write_job(plan)
    run = await table.open(plan, plan.cap)
    table.befall(run, plan)
    reasons = await table.work(run, plan)
    assert "provider" in reasons
    assert (await table.settle(run, reasons)).state == "paused"
    over, bill = table.overrun(run), table.billed(run)
    assert plan.cap < bill <= plan.cap + sum(over.values())
    assert 1 <= len(over) <= plan.concurrency
    await assert_told(table, run, over)
    assert await table.work(await table.open(plan, None), plan) == {"budget"}
    assert table.billed(run) == bill
    tally.count("replies beyond what was asked for", len(over))


async def assert_told(table: Purses, run: Run, over: Mapping[str, int]) -> None:
    """Both proofs name what passed the cap, and nothing else is wrong."""
    found = await table.violations()
    assert all(any(f"attempt_outcome {attempt}: cost" in what for what in found) for attempt in over), found
    assert any(what.startswith("I7: budget") for what in found)
    assert {what.split(":")[0] for what in found} == {"I7", f"run {run.run_id} G9"}, found


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
async def test_a_thousand_random_caps(table: Purses, seed: int, scale: float, tally: Tally, part: int) -> None:
    count = max(1, int(LONG * scale / PARTS))
    played = await play_caps(table, seed, range(part * count, (part + 1) * count))
    await judge(table, played, seed)
    tell(tally, played)


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
async def test_many_pairs_of_jobs_on_one_budget(
    table: Purses, seed: int, scale: float, tally: Tally, part: int
) -> None:
    count = max(1, int(LONG_PAIRS * scale / 2))
    played = await play_pairs(table, seed, range(part * count, (part + 1) * count))
    await judge(table, played, seed)
    tell(tally, played)
