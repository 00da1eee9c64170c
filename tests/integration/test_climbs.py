"""What a lane makes of replies that no honest provider gives, and of waits and drains that come at a bad moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.attempts import Call, Reply
from tasks.completions import Completions
from tests.world import World, make_world


@pytest.fixture
async def world(tmp_path: Path, database_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, database_url) as made:
        yield made


def alter_replies(monkeypatch: pytest.MonkeyPatch, change: Callable[[Reply], Reply]) -> None:
    """Let every reply of the emulated provider arrive changed."""
    complete = Completions.complete

    async def complete_and_change(self: Completions, call: Call) -> Reply:
        return change(await complete(self, call))

    monkeypatch.setattr(Completions, "complete", complete_and_change)


def billing(world: World) -> dict[str, int]:
    return dict(world.sql("SELECT billing, count(*) FROM attempt GROUP BY 1"))


@pytest.mark.parametrize("served", ["gpt-5.5", "self-hosted-flash-2xh100"])
async def test_a_reply_of_a_model_that_nobody_priced_is_kept_with_its_bound_and_stops_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch, served: str
) -> None:
    alter_replies(monkeypatch, lambda reply: replace(reply, served_model=served))
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert served in ended.advice
    assert billing(world).keys() == {"unknown"}
    assert world.value("SELECT sum(unknown_pico) FROM attempt") == world.value("SELECT granted FROM budget") > 0


@pytest.mark.parametrize("kind", ["usage_unbalanced", "usage_negative", "usage_strings"])
async def test_usage_that_cannot_be_true_keeps_its_bound_and_stops_the_run(world: World, kind: str) -> None:
    world.plan_mishaps({"kind": kind, "every": 1, "match": "1.3."})
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert "usage is" in ended.advice
    assert world.sql("SELECT document_no, attempt_no FROM attempt WHERE billing = 'unknown'") == [(3, 1)]


async def test_replies_that_never_report_usage_stop_the_run(world: World) -> None:
    world.plan_mishaps({"kind": "usage_missing", "every": 1})
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("paused", "provider")
    assert "DEEPSEEK_BASE_URL" in ended.advice
    assert 5 <= billing(world)["unknown"] < 60


async def test_replies_that_now_and_then_lack_usage_stop_nothing(world: World) -> None:
    world.plan_mishaps({"kind": "usage_missing", "share": 0.15, "seed": 7})
    run, _ = await world.run()
    assert run.state == "done"
    assert billing(world)["unknown"] > 5
