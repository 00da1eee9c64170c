"""What of a run's events is worth telling: which announcement, with what in it, and how often."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from schemas.announcements import KINDS, RunEvent, announcements, exceeds

ROOT = Path(__file__).parents[2]
AT = datetime(2026, 9, 26, tzinfo=UTC)


def events(*told: tuple[str, dict[str, Any]]) -> list[RunEvent]:
    return [RunEvent(number, AT, kind, detail) for number, (kind, detail) in enumerate(told, 1)]


def primed(served_model: str | None, tier: str = "flash") -> tuple[str, dict[str, Any]]:
    return "primed", {"tier": tier, "attempts": 3, "prefix_tokens": 640, "served_model": served_model}


def changed(before: str, after: str) -> tuple[str, dict[str, Any]]:
    return "served_model_changed", {"tier": "flash", "from": [before, "fp_1"], "to": [after, "fp_2"]}


def models_told(*told: tuple[str, dict[str, Any]]) -> list[tuple[Any, Any]]:
    found = announcements(events(*told))
    assert {each.name for each in found} <= {"farthing.model.changed"}
    return [(each.numbers["from"], each.numbers["to"]) for each in found]


@pytest.mark.parametrize(
    ("kind", "detail", "told"),
    [
        ("paused", {"reason": "operator"}, [("farthing.run.paused", "operator")]),
        ("paused", {}, [("farthing.run.paused", "unfinished")]),
        ("paused", {"reason": "budget"}, [("farthing.run.paused", "budget"), ("farthing.budget.reached", None)]),
        ("cache_lost", {"tier": "flash", "replies": 100, "lost": "$1.00"}, [("farthing.cache.lost", None)]),
        (
            "dead_letters_above_tolerance",
            {"dead_letters": 9, "tolerance": "0.01"},
            [("farthing.dead_letters.above_tolerance", None)],
        ),
        ("done", {"ledger_digest": "sha256:"}, [("farthing.run.done", None)]),
        ("limit_changed", {"now": {}}, []),
        ("resumed", {"documents": 3}, []),
    ],
)
def test_an_event_is_told_under_its_name(
    kind: str, detail: dict[str, Any], told: list[tuple[str, str | None]]
) -> None:
    assert [(each.name, each.because) for each in announcements(events((kind, detail)))] == told
    assert not told or kind in KINDS


def test_a_model_that_changed_is_told_of_once_however_many_lanes_see_it() -> None:
    assert models_told(primed("m"), changed("m", "n"), changed("m", "n"), primed("n")) == [("m", "n")]
    assert models_told(primed("m"), changed("m", "n"), changed("n", "m"), changed("m", "o")) == [
        ("m", "n"),
        ("m", "o"),
    ]


def test_a_lane_that_finds_another_model_than_the_run_began_with_is_told_of() -> None:
    """As after a pause of days: the lane itself sees no change."""
    paused = ("paused", {"reason": "operator"})
    found = announcements(events(primed("m"), primed("p", "pro"), paused, primed("n"), primed("p", "pro")))
    assert [each.name for each in found] == ["farthing.run.paused", "farthing.model.changed"]
    assert found[1].numbers == {"tier": "flash", "from": "m", "to": "n"}


def test_another_replica_of_the_same_model_is_no_change_of_model() -> None:
    summary = ("served_model_changed", {"tier": "flash", "replies_by_others": 3})
    assert models_told(primed(None), primed("m"), changed("m", "m"), summary) == []


def test_a_model_s_name_cannot_act_on_what_shows_it() -> None:
    assert models_told(primed("m"), changed("m", "n\x1b[2J")) == [("m", "n\\x1b[2J")]


def test_an_announcement_has_an_identity_of_its_own_that_does_not_depend_on_who_tells_it() -> None:
    told = events(("paused", {"reason": "budget"}), changed("m", "n"), changed("n", "o"))
    names = [each.identity(7) for each in announcements(told)]
    assert len(set(names)) == 4
    assert [each.identity(7) for each in announcements(told)] == names
    assert not {each.identity(8) for each in announcements(told)} & set(names)


def test_dead_letters_exceed_a_tolerance_only_above_it() -> None:
    assert [exceeds(dead, 200, Decimal("0.01")) for dead in (0, 2, 3)] == [False, False, True]
    assert [exceeds(dead, 200, Decimal(0)) for dead in (0, 1)] == [False, True]


def test_the_example_automations_are_automations_of_announcements_and_are_off() -> None:
    written = yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]
    found = [AutomationCore.model_validate(each) for each in written]
    assert [each.enabled for each in found] == [False] * 3
    kinds = [("paused", {"reason": "budget"}), ("dead_letters_above_tolerance", {"tolerance": "0"})]
    known = {each.name for each in announcements(events(*kinds))}
    ours = {name for each in found for name in each.trigger.expect if name.startswith("farthing.")}
    assert ours
    assert ours <= known
