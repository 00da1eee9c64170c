"""Steering: what an operator asks of a run from another terminal, or from any machine that reaches its ledger.

An order is a change of the run's row or of its budget's, with an event that says so. Nobody is called: its lanes hear
of it with their next heartbeat (tasks/lanes.py). One that cannot reach Postgres hears nothing, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from schemas.attempts import RunId
from schemas.ceilings import parse_limits
from schemas.errors import ConfigurationError
from schemas.jobs import parse_cap
from schemas.money import Money
from tasks.ledger import budgets, runs, spend
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import OPERATOR, UNDER_WAY, Run
from tasks.ledger.spend import Progress, RunSummary


@dataclass(frozen=True)
class Steered:
    """What came of an order, and the run as it was then. `is_changed`: whether it was not so already."""

    seen: Progress
    is_changed: bool

    def to_json(self) -> dict[str, Any]:
        """One JSON object: sums in pico units."""
        names = ("run", "job", "state", "reason", "lanes", "in_flight")
        own = {name: value for name, value in asdict(self).items() if name not in ("seen", "is_changed")}
        return {"changed": self.is_changed} | {name: getattr(self.seen, name) for name in names} | own


@dataclass(frozen=True)
class Limited(Steered):
    """A limit that was set or lifted: requests in flight by tier, over all lanes."""

    ceilings: Mapping[str, int]
    was: Mapping[str, int]


@dataclass(frozen=True)
class Capped(Steered):
    """A budget whose cap was set. Of it, `spent_pico` is gone and `held_pico` set aside for what is in flight."""

    budget_pico: int
    was_pico: int
    spent_pico: int
    held_pico: int
    currency: str
    budget_name: str | None


def choose(listed: Sequence[RunSummary], states: Collection[str]) -> int:
    """The run that is meant where no number is given: the only one. Raises ConfigurationError for none or several."""
    meant = [each for each in listed if each.state in states]
    if len(meant) == 1:
        return meant[0].run
    such = " or ".join(states)
    if not meant:
        raise ConfigurationError(f"there is no run that is {such}: `farthing audit` lists the runs of this ledger")
    named = ", ".join(f"{each.run} ({each.job}, {each.state})" for each in reversed(meant))
    raise ConfigurationError(f"{len(meant)} runs are {such}, so say which by its number: {named}")


async def find(ledger: Ledger, run: int | None, job: str | None, states: Collection[str] = UNDER_WAY) -> int:
    """A run's number: the one that is given, else that of the only run in these states, of the job or of all."""
    return run if run is not None else choose(await spend.list_runs(ledger, job), states)


async def pause(ledger: Ledger, run_id: int) -> Steered:
    """Let the run's lanes make no further attempt. One that is paused already stays so, for the reason it was.

    Raises ConfigurationError where the run is over, or there is none of that number.
    """
    await spend.progress(ledger, run_id)
    is_changed = await runs.change_state(ledger, RunId(run_id), "paused", OPERATOR)
    seen = await spend.progress(ledger, run_id)
    if seen.state not in UNDER_WAY:
        raise ConfigurationError(f"{_name(seen)} is {seen.state}: there is nothing to pause")
    return Steered(seen, is_changed)


async def limit(ledger: Ledger, run_id: int, given: Sequence[str] | None) -> Limited:
    """Let so many requests of the run be in flight, written as for `parse_limits`; None: as many as its job says.

    Raises ConfigurationError where that makes no sense, or the run is over.
    """
    seen = await spend.progress(ledger, run_id)
    run = await runs.find_run(ledger, RunId(run_id))
    change = await runs.change_limits(ledger, run.run_id, None if given is None else _read_limits(given, run))
    if change is None:
        raise ConfigurationError(f"{_name(seen)} is {seen.state}: nothing of it will be in flight again")
    now, was = (_in_order(found, run.ladder) for found in (change.now, change.was))
    return Limited(seen, now != was, now, was)


async def cap(ledger: Ledger, run_id: int, given: str) -> Capped:
    """Give the run's budget another cap, written as for `--budget`. One that is shared changes for all who name it.

    Raises ConfigurationError where that is no sum, or in another currency than the run's, or the run is over.
    """
    seen = await spend.progress(ledger, run_id)
    run = await runs.find_run(ledger, RunId(run_id))
    wanted = _read_cap(given, run)
    was = await runs.change_cap(ledger, run.run_id, wanted.pico)
    if was is None:
        raise ConfigurationError(
            f"{_name(seen)} is {seen.state}: it will spend nothing more; `--budget` is for new runs"
        )
    room = await budgets.find_room(ledger, run.budget_id)
    return Capped(
        seen, was != wanted.pico, wanted.pico, was, room.spent, room.held, run.currency.value, run.budget_name
    )


def _read_limits(given: Sequence[str], run: Run) -> dict[str, int]:
    try:
        return parse_limits(given, run.ladder)
    except ValueError as error:
        raise ConfigurationError(f"limit: {error}") from None


def _read_cap(given: str, run: Run) -> Money:
    try:
        wanted = parse_cap(given)
    except ValueError as error:
        raise ConfigurationError(f"budget: {error}") from None
    if wanted.currency is not run.currency:
        raise ConfigurationError(
            f"budget: run {run.run_id} is billed in {run.currency}, and sums are never converted: write one like "
            f"`25 {run.currency}`"
        )
    return wanted


def _in_order(ceilings: Mapping[str, int], ladder: Sequence[str]) -> dict[str, int]:
    return {tier: ceilings[tier] for tier in ladder if tier in ceilings}


def _name(seen: Progress) -> str:
    return f"run {seen.run} of {seen.job}"
