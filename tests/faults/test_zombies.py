"""Zombie lanes: stopped until others have buried them, then awake again among those who took their shards."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import pytest
from pydantic import SecretStr

from sandbox.postgres import Server, create_database, drop_database
from schemas.attempts import RunId
from tasks.ledger import leases
from tasks.ledger.connection import Role, opened
from tasks.ledger.leases import LeaseTimes
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

#: Others bury a lane soon, and it fences itself by its own clock before that.
TIMES = LeaseTimes(beat_every_s=0.1, fence_after_s=0.8, grace_s=0.5, dead_after_s=1.5)
#: Neither its clock nor its heartbeat stops this lane: whatever it may not do, only the ledger keeps it from.
UNFENCED = LeaseTimes(beat_every_s=60.0, fence_after_s=1000.0, grace_s=0.5, dead_after_s=2000.0)
FLOCK = 3
PARTS = 2


@pytest.fixture(scope="module")
def stage(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Replies take a while, so that a lane has some in flight and others waiting whenever it is stopped."""
    root = tmp_path_factory.mktemp("zombies")
    name = f"zombies_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=120, time_scale=1, reply=0.4) as made:
        made.times = TIMES
        made.remember_baseline()
        yield made
    drop_database(postgres, name)


def tell(children: Sequence[ForkServerProcess], number: signal.Signals) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, number)


def buried(stage: Stage, children: Sequence[ForkServerProcess]) -> int:
    """How many of these lanes others took for dead."""
    pids = ", ".join(str(child.pid) for child in children)
    return int(stage.value(f"SELECT count(*) FROM lane WHERE pid IN ({pids}) AND ended_because = 'died'"))


def raise_zombies(stage: Stage, chance: random.Random) -> int:
    """A flock of lanes is stopped at work; an heir buries them and takes their shards; they wake. Returns how many.

    One that is stopped in mid-transaction holds its own row, so that nobody can bury it: it is no zombie.
    """
    stage.scene()
    stage.starts = FLOCK + 1
    flock = [stage.start() for _ in range(FLOCK)]
    wait_until(lambda: all("lane working" in stage.told_by(child) or child.exitcode is not None for child in flock))
    time.sleep(chance.uniform(0.0, 0.3))
    tell(flock, signal.SIGSTOP)
    heir = stage.start()
    wait_until(lambda: buried(stage, flock) == FLOCK or heir.exitcode is not None, 2 * TIMES.dead_after_s)
    zombies = buried(stage, flock)
    time.sleep(chance.uniform(0.0, 0.4))  # the heir has begun on their shards, or not yet
    earlier = stage.snapshot()
    tell(flock, signal.SIGCONT)
    for child in (*flock, heir):
        assert stage.wait(child) in (0, 3), stage.told_by(child)
    stage.resume()
    found = stage.violations(earlier)
    assert found == [], f"{found}\n{stage.told()}"
    return zombies


#: A flock may be caught in mid-transaction, or its heir be quicker than the burial: not that often in a row.
FLOCKS_WITHOUT_ZOMBIES = 5


def raise_some(stage: Stage, chance: random.Random, seed: int) -> int:
    """At least one zombie: flocks without any are stopped again, a few times."""
    for _ in range(FLOCKS_WITHOUT_ZOMBIES):
        if zombies := raise_zombies(stage, chance):
            return zombies
    raise AssertionError(f"seed {seed}: nobody buried a stopped lane: {stage.told()}")


def test_lanes_that_wake_up_after_their_burial_commit_nothing(stage: Stage, seed: int, tally: Tally) -> None:
    tally.count("zombie lane", raise_some(stage, random.Random(seed), seed))


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_many_zombies_break_no_promise(part: int, stage: Stage, seed: int, scale: float, tally: Tally) -> None:
    chance, wanted, zombies = random.Random(seed * 1000 + part), max(1, int(110 * scale / PARTS)), 0
    while zombies < wanted:
        zombies += raise_some(stage, chance, seed)
    tally.count("zombie lane", zombies)


@pytest.mark.long  # its heartbeats are so short that a busy machine fences the heir
def test_without_clock_or_heartbeat_a_buried_lane_still_sends_nothing(stage: Stage, tally: Tally) -> None:
    """The epoch alone has to bite: the lane wakes between its burial and the next claim of its shards."""
    stage.scene()
    stage.starts, before = 2, stage.run_id
    zombie = stage.start(times=UNFENCED)
    intents = f"SELECT count(*) FROM attempt_intent WHERE run_id > {before}"
    assert wait_until(lambda: stage.value(intents) >= 8), stage.told()
    bury_stopped(stage, zombie)
    sent = stage.value(intents)
    stage.plan_mishaps(
        {"kind": "trickle", "args": {"bytes": 64, "pause": 0.2}}
    )  # what it sent would still be on its way
    tell([zombie], signal.SIGCONT)
    time.sleep(0.5)  # it has more to send, and would
    stage.plan_mishaps()
    heir = stage.start()
    assert stage.wait(heir) == 0, stage.told()
    tell([zombie], signal.SIGTERM)
    assert stage.wait(zombie) in (0, 3), stage.told()
    of_zombie = f"SELECT count(*) FROM attempt_intent JOIN lane USING (lane_id) WHERE pid = {zombie.pid}"
    found = stage.violations()
    assert found == [], f"{found}\n{stage.told()}"
    assert stage.value(of_zombie) == sent, "it was buried, and committed intents"
    tally.count("zombie lane")


def bury_stopped(stage: Stage, lane: ForkServerProcess) -> None:
    """Stop it, and end it as others would who have not heard of it for long."""
    for _ in range(100):
        tell([lane], signal.SIGSTOP)
        if asyncio.run(bury_all(stage)):
            return
        tell([lane], signal.SIGCONT)  # it was in mid-transaction, and held its row
        time.sleep(0.02)
    raise AssertionError("the lane could not be buried")


async def bury_all(stage: Stage) -> int:
    async with opened(SecretStr(stage.database_url), Role.LANE, pool_size=1) as ledger:
        return await leases.bury_dead(ledger, RunId(stage.run_id), dead_after_s=0.0)
