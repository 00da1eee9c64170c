"""The watch of a lane: which replies become events of the run, and that no event is lost without a word."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.attempts import Reply, RunId, Signal, Usage
from schemas.errors import LedgerUnavailable
from schemas.money import Currency
from tasks.ledger.connection import Ledger, PassingFailure
from tasks.ledger.runs import Run
from tasks.priming import Primer
from tasks.watch import MOST_EVENTS, SAMPLE, Watch
from tests.ledgers import AT, BOOK, CAP, JOB, USAGE

RUN = Run(RunId(1), "colours", "running", None, 1000, Currency.USD, 1, CAP, is_simulated=False)
MISS = Usage(hit=0, miss=740, output=5)


class FakeLedger(Ledger):
    """Keeps the rows it is given. The answers to its first COMMITs are lost: failures come instead."""

    def __init__(self, *failures: Exception, for_ever: Exception | None = None) -> None:
        self.failures = repeat(for_ever) if for_ever else iter(failures)
        self.rows: list[Mapping[str, Any]] = []

    @asynccontextmanager
    async def transaction(self, step: str | None = None) -> AsyncIterator[Any]:
        yield self
        if failure := next(self.failures, None):
            raise failure

    async def execute(self, _statement: object, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [(row["kind"], json.loads(row["detail"])) for row in self.rows]


def watch_of(ledger: Ledger, **fields: Any) -> Watch:
    return Watch(ledger, JOB, RUN, BOOK, lambda: AT, **fields)


def served(model: str, fingerprint: str | None = None, usage: Usage | None = USAGE) -> Reply:
    return Reply(Signal.ANSWERED, AT, AT, usage=usage, served_model=model, fingerprint=fingerprint)


def prime(watch: Watch, usage: Usage | None, *, is_cold: bool = False) -> None:
    """The priming attempt after which the tier is warm, or was given up on."""
    primer = Primer(640 * 8, build_s=0, is_warm=True, is_cold=is_cold, attempts=3)
    watch.see("flash", served("m", usage=usage), primer, is_priming=True)


def see(watch: Watch, *replies: Reply) -> None:
    for reply in replies:
        watch.see("flash", reply, Primer(0, build_s=0), is_priming=False)


async def test_an_event_whose_commit_was_not_heard_of_is_told_again_under_the_same_key() -> None:
    ledger = FakeLedger(PassingFailure("Postgres is away"))
    watch = watch_of(ledger)
    see(watch, served("m"), served("n"))
    await watch.close()
    assert [kind for kind, _ in ledger.events] == ["served_model_changed"] * 2
    assert ledger.rows[0]["key"] == ledger.rows[1]["key"] is not None


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PassingFailure("Postgres is away"), "Postgres is away"),
        (LedgerUnavailable("there is no such table"), "there is no such table"),
        (ValueError("a text that may hold anything"), "ValueError"),
    ],
)
async def test_an_event_that_cannot_be_told_is_logged_as_missing(error: Exception, why: str) -> None:
    watch = watch_of(FakeLedger(for_ever=error), close_s=0.01)
    with capture_logs() as logs:
        see(watch, served("m"), served("n"))
        await watch.close()
    missing = {"event": "event is not in the ledger", "log_level": "error", "run": 1, "kind": "served_model_changed"}
    assert logs[-1] == missing | {"why": why}


async def test_replicas_that_take_turns_are_told_of_once_each() -> None:
    ledger = FakeLedger()
    watch = watch_of(ledger)
    see(watch, *[served("m", f"fp_{number % 2}") for number in range(300)])
    await watch.close()
    change = {"tier": "flash", "from": ["m", "fp_0"], "to": ["m", "fp_1"]}
    assert ledger.events == [("served_model_changed", change)]


async def test_a_fingerprint_that_is_new_in_every_reply_is_told_of_so_often_and_then_counted() -> None:
    ledger = FakeLedger()
    watch = watch_of(ledger)
    see(watch, *[served("m", f"fp_{number}") for number in range(300)])
    await watch.close()
    *changes, (_, rest) = ledger.events
    assert [change["to"] for _, change in changes] == [["m", f"fp_{number + 1}"] for number in range(MOST_EVENTS)]
    assert rest == {"tier": "flash", "replies_by_others": 300 - MOST_EVENTS - 1}


async def test_money_lost_after_the_last_alarm_is_summed_up_when_the_lane_leaves() -> None:
    ledger = FakeLedger()
    watch = watch_of(ledger)
    prime(watch, USAGE)
    see(watch, *[served("m", usage=MISS)] * SAMPLE * (MOST_EVENTS + 5))
    await watch.close()
    assert len(ledger.events) == 1 + MOST_EVENTS + 1
    assert [loss["replies"] for _, loss in ledger.events[1:]] == [SAMPLE] * MOST_EVENTS + [5 * SAMPLE]
    per_reply = USAGE.hit * (150_000 - 3_000)
    assert sum(loss["lost_pico"] for _, loss in ledger.events[1:]) == per_reply * SAMPLE * (MOST_EVENTS + 5)


async def test_a_primed_cache_is_told_of_with_the_prefix_that_hit() -> None:
    ledger = FakeLedger()
    watch = watch_of(ledger)
    prime(watch, Usage(hit=800, miss=10, output=5))
    await watch.close()
    primed = {"tier": "flash", "attempts": 3, "prefix_tokens": 768, "served_model": "m"}
    assert ledger.events == [("primed", primed)]


@pytest.mark.parametrize("usage", [None, MISS, Usage(hit=128, miss=612, output=5)])
async def test_a_cold_cache_is_told_of_and_what_it_costs_too(usage: Usage | None) -> None:
    """That the prefix is at least so long is known from its bytes."""
    ledger = FakeLedger()
    watch = watch_of(ledger)
    prime(watch, usage, is_cold=True)
    see(watch, *[served("m", usage=MISS)] * SAMPLE)
    await watch.close()
    cold, lost = ledger.events
    assert cold == ("cache_cold", {"tier": "flash", "attempts": 3, "prefix_tokens": 640, "served_model": "m"})
    assert (lost[0], lost[1]["lost_pico"]) == ("cache_lost", SAMPLE * 640 * (150_000 - 3_000))


async def test_no_cache_is_said_to_be_lost_whose_prefix_is_too_short_to_hit() -> None:
    ledger = FakeLedger()
    watch = watch_of(ledger)
    see(watch, *[served("m", usage=MISS)] * SAMPLE)
    await watch.close()
    assert ledger.events == []
