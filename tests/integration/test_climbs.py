"""What a lane makes of replies that no honest provider gives, and of waits and drains that come at a bad moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.attempts import Call, Reply
from tasks import enrichment
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
