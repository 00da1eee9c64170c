"""Every failpoint: killed there, resumed, and nothing is lost, forgotten or paid for twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tasks.failpoints import POINTS
from tasks.ledger.leases import LeaseTimes
from tests.faults.stage import KILLED, Stage, staged
from tests.faults.summary import Tally

#: What the summary calls all of these.
KILLED_THERE = "killed at a failpoint"
#: A cap that stops a run, and one that lets it go on: resumed without any it would keep the first.
TIGHT, AMPLE = {"request": {"budget": "0.0005 USD"}}, {"request": {"budget": "1 USD"}}

#: Of people who keep the books: tests/integration/test_books.py kills them.
STEPS_OF_BOOKS = ("book_closings", "close_month")
#: Of runs with a promise: tests/faults/test_certified.py kills them.
STEPS_OF_PROMISES = ("freeze", "certify")
POINTS_OF_RUNS = [point for point in POINTS if point.partition(".")[0] not in (*STEPS_OF_BOOKS, *STEPS_OF_PROMISES)]
STEPS_OF_BACKFILLS, BACKFILL = ("open_backfill", "change_backfill"), {"backfills": True}


@pytest.fixture(scope="module")
def stage(postgres: object, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    from sandbox.postgres import create_database, drop_database

    root = tmp_path_factory.mktemp("stage")
    name = f"stage_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=12) as made:
        made.times = LeaseTimes(beat_every_s=0.1, grace_s=0.3)  # the killed are buried at once
        made.remember_baseline()
        yield made
    drop_database(postgres, name)


def usual(stage: Stage, failpoint: str) -> int:
    return stage.run(failpoint=failpoint)


def after_a_crash(stage: Stage, failpoint: str) -> int:
    """A lane has died with attempts in flight before the one that is killed now."""
    assert stage.run(failpoint="send.after:3") == KILLED
    return stage.run(failpoint=failpoint)


def near_the_cap(stage: Stage, failpoint: str) -> int:
    return stage.run(failpoint=failpoint, **TIGHT)


def spoiled(stage: Stage, failpoint: str) -> int:
    """The input changes under the run."""
    return stage.run(failpoint=failpoint, spoils=True)


def steered(stage: Stage, failpoint: str) -> int:
    """An operator changes what the run may."""
    return stage.run(failpoint=failpoint, steers=True)


def backfilled(stage: Stage, failpoint: str) -> int:
    """The input is a backfill's only partition."""
    return stage.run(failpoint=failpoint, **BACKFILL)


SCENES: dict[str, Callable[[Stage, str], int]] = {
    "bury": after_a_crash,
    "close_grants": near_the_cap,
    "change_state": near_the_cap,
    "change_limits": steered,
    "change_cap": steered,
    "fail": spoiled,
    **dict.fromkeys(STEPS_OF_BACKFILLS, backfilled),
}


def play(stage: Stage, point: str, hit: int) -> bool:
    """Kill at that hit, resume, check. False: the run ended without reaching it."""
    stage.scene()
    step = point.partition(".")[0]
    code = SCENES.get(step, usual)(stage, f"{point}:{hit}")
    assert code in (0, 3, KILLED), stage.told()
    earlier = stage.snapshot()
    again: dict[str, Any] = {"fail": {"run_id": stage.run_id}, **{each: BACKFILL for each in STEPS_OF_BACKFILLS}}
    stage.resume(**again.get(step, AMPLE))
    assert stage.violations(earlier) == [], stage.told()
    return code == KILLED


@pytest.mark.parametrize("point", POINTS_OF_RUNS)
def test_killed_at_its_first_hit_a_run_goes_on_and_keeps_its_promise(point: str, stage: Stage, tally: Tally) -> None:
    assert play(stage, point, 1), f"{point} was never reached"
    tally.count(KILLED_THERE)


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS_OF_RUNS)
def test_killed_at_each_hit_until_a_run_ends_clean(point: str, stage: Stage, tally: Tally) -> None:
    hit = 2  # the first is every commit's
    while play(stage, point, hit):
        hit += 1
    tally.count(KILLED_THERE, hit - 2)
