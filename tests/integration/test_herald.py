"""What Prefect is told of a run, from a real ledger: everything once, and nothing that an earlier process told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from schemas.records import DocumentState, Record
from tasks.announcements import Herald
from tasks.ledger import runs
from tests.ledgers import JOB, Hand, lane_ledger, opening, value
from tests.world import make_world


@dataclass
class FakePrefect:
    """Takes events while it is there, as the real one does through its client."""

    is_there: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)

    async def take(self, events: Sequence[dict[str, Any]]) -> bool:
        self.events.extend(events if self.is_there else ())
        return self.is_there

    @property
    def names(self) -> list[str]:
        return [event["event"].removeprefix("farthing.") for event in self.events]


async def test_what_happens_to_a_run_is_told_once_and_by_whoever_works_on_it(ledger_url: str) -> None:
    prefect, later = FakePrefect(), FakePrefect()
    async with lane_ledger(ledger_url) as ledger:
        run = await runs.open_run(ledger, opening())
        herald = Herald(ledger, run, prefect.take)
        await herald.look()
        await runs.change_state(ledger, run.run_id, "paused", "budget")
        await herald.look()
        await herald.look()
        assert prefect.names == ["run.paused", "budget.reached"]
        again = await runs.open_run(ledger, opening())
        await runs.note(
            ledger, run.run_id, "cache_lost", {"tier": "flash", "replies": 9, "lost": "$1.00"}, key="lost"
        )
        await Herald(ledger, again, later.take).look()
        newest = value(ledger_url, "SELECT max(event_id) FROM run_event")
        await Herald(ledger, again, later.take, since=newest).look()  # a backfill's run, before it is resumed
    assert later.names == ["cache.lost"]
    paused, reached = prefect.events
    assert paused["resource"] == {
        "prefect.resource.id": f"farthing.run.{run.run_id}",
        "prefect.resource.name": f"run {run.run_id} of colours",
        "farthing.job": "colours",
        "farthing.simulated": "false",
        "farthing.reason": "budget",
    }
    numbers = {"run": run.run_id, "job": "colours", "documents": 6, "done": 0, "dead_letters": 0}
    assert paused["payload"] == numbers | {"spent": "$0.00", "budget": "$1.00", "reason": "budget"}
    assert reached["payload"] == numbers | {"spent": "$0.00", "budget": "$1.00"}


async def test_dead_letters_above_the_tolerance_are_noted_once_and_told(ledger_url: str) -> None:
    """Two processes at work on a run tell of it twice, by one name, which Prefect keeps once."""
    prefect = FakePrefect()
    async with lane_ledger(ledger_url) as ledger:
        run = await runs.open_run(ledger, opening(job=replace(JOB, tolerance=Decimal("0.2"))))
        hand = await Hand.join(ledger, run)
        lease = (await hand.claim()).lease
        herald = Herald(ledger, run, prefect.take)
        for number, names in ((0, []), (1, ["dead_letters.above_tolerance"])):  # one of six is less than a fifth
            dead = hand.ending(lease, number, DocumentState.DEAD_LETTER, reason="too_large")
            await hand.record(Record(ending=dead))
            await herald.look()
            await herald.look()
            assert prefect.names == names
        await Herald(ledger, run, prefect.take).look()
    first, second = prefect.events
    assert first["payload"]["dead_letters"] == 2
    assert first["payload"]["tolerance"] == "0.2"
    assert (first["id"], first["event"]) == (second["id"], second["event"])
    noted = "SELECT count(*) FROM run_event WHERE kind = 'dead_letters_above_tolerance'"
    assert value(ledger_url, noted) == 1


async def test_a_run_that_goes_on_with_another_model_says_so(tmp_path: Path, ledger_url: str) -> None:
    prefect = FakePrefect()
    async with make_world(tmp_path, ledger_url) as world:
        await world.run(budget="0.002 USD")
        world.plan_mishaps({"kind": "served_model"})
        run, _ = await world.run(budget="1 USD")
        async with lane_ledger(world.database_url) as ledger:
            await Herald(ledger, run, prefect.take).look()
    assert prefect.names == ["model.changed", "run.done"]
    changed, done = (event["payload"] for event in prefect.events)
    assert (changed["tier"], changed["documents"], done["done"]) == ("flash", 60, 60)
    assert changed["from"] != changed["to"]
    assert prefect.events[0]["resource"]["farthing.simulated"] == "true"


async def test_what_prefect_s_server_did_not_hear_it_hears_when_it_is_back(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.announcements.log", structlog.get_logger())  # a used one is as it was configured then
    prefect = FakePrefect(is_there=False)
    async with lane_ledger(ledger_url) as ledger:
        run = await runs.open_run(ledger, opening())
        herald = Herald(ledger, run, prefect.take)
        await runs.change_state(ledger, run.run_id, "paused", "operator")
        with capture_logs() as logs:
            await herald.look()
            await herald.look()
        assert [line["names"] for line in logs] == [["farthing.run.paused"]]
        prefect.is_there = True
        await herald.look()
    assert prefect.names == ["run.paused"]
