"""A machine that runs short of descriptors or memory, or sets its clock; and what a long run takes of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

TIMES = LeaseTimes(beat_every_s=0.1, grace_s=0.3)
#: Done, refused with a reason, paused; 1 is a crash, which is where memory ends.
ORDERLY, OUT_OF_MEMORY = {0, 2, 3}, 1


@pytest.fixture(scope="module")
def ledger_of_stages(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    name = f"scarcity_{tmp_path_factory.getbasetemp().name}".replace("-", "_")
    yield create_database(postgres, name, template=template)
    drop_database(postgres, name)


@pytest.fixture(scope="module")
def stage(ledger_of_stages: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("scarcity")
    with staged(root, ledger_of_stages, documents=80, time_scale=1, reply=0.2) as made:
        made.times = TIMES
        made.remember_baseline()
        yield made


def resume_and_look(stage: Stage, **order: object) -> None:
    stage.resume(**order)
    found = stage.violations()
    assert found == [], f"{found}\n{stage.told()}"


@pytest.mark.long
@pytest.mark.parametrize("most", [14, 26, 32])
def test_too_few_descriptors_are_a_reason_or_a_slow_run_and_lose_nothing(
    most: int, stage: Stage, tally: Tally
) -> None:
    """Fewer than it takes to read the input, than a heartbeat needs, than there are attempts."""
    stage.scene()
    child = stage.start(limits={resource.RLIMIT_NOFILE: most})
    assert stage.wait(child) in ORDERLY, stage.told_by(child)
    assert "Traceback" not in stage.told_by(child)
    resume_and_look(stage)
    tally.count("too few descriptors")


@pytest.mark.long
def test_a_lane_that_gets_no_more_memory_loses_nothing(stage: Stage, tally: Tally) -> None:
    stage.scene()
    child = stage.start()
    assert wait_until(lambda: "lane working" in stage.told_by(child)), stage.told_by(child)
    now = int(Path(f"/proc/{child.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(child.pid or 0, resource.RLIMIT_AS, (now, now))
    assert stage.wait(child) in ORDERLY | {OUT_OF_MEMORY}, stage.told_by(child)
    resume_and_look(stage)
    tally.count("no more memory")


@pytest.mark.long
@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0, 86400.0], ids=["an hour back", "an hour on", "a day on"])
def test_a_clock_that_is_set_in_mid_run_changes_neither_the_lease_nor_the_bill(
    jump_s: float, stage: Stage, tally: Tally
) -> None:
    """A lease is kept by monotonic time and Postgres's own; a price is by the provider's clock."""
    stage.scene()
    child = stage.start(clock_jump_s=jump_s)
    assert stage.wait(child) == 0, stage.told_by(child)
    resume_and_look(stage)
    tally.count("clock set")


def test_lanes_on_machines_whose_clocks_are_hours_apart_share_a_run_and_its_bill(stage: Stage, tally: Tally) -> None:
    """One is three hours behind and dies; the other, ten minutes ahead, has its shards at once."""
    stage.scene()
    stage.starts = 2
    behind = stage.start(clock_jump_s=-3 * 3600.0, clock_jump_after_s=0.0)
    assert wait_until(lambda: "lane working" in stage.told_by(behind)), stage.told_by(behind)
    ahead = stage.start(clock_jump_s=600.0, clock_jump_after_s=0.0)
    assert wait_until(lambda: "lane working" in stage.told_by(ahead)), stage.told_by(ahead)
    behind.kill()
    assert stage.wait(ahead) == 0, stage.told_by(ahead)
    assert stage.violations() == [], stage.told()
    assert stage.value(f"SELECT count(*) FROM lane WHERE run_id = {stage.run_id} AND ended_because = 'died'") == 1
    stage.starts = 1
    tally.count("clocks of two machines apart")


@pytest.mark.long
def test_a_long_run_takes_no_more_memory_or_descriptors_than_a_short_one(
    ledger_of_stages: str, tmp_path: Path, scale: float, tally: Tally
) -> None:
    """I14: from a fifth of the run on, flat."""
    documents = max(1000, int(30_000 * scale))
    with staged(tmp_path, ledger_of_stages, documents=documents) as stage:
        stage.deadline_s, before = 1200.0, stage.run_id
        stage.scene()
        child = stage.start()
        done = f"SELECT count(*) FROM document WHERE run_id > {before}"
        taken: list[tuple[int, int]] = []
        for part in range(1, 5):
            assert wait_until(lambda part=part: stage.value(done) >= part * documents / 5, 600), stage.told()
            taken.append(taken_by(child.pid or 0))
        assert stage.wait(child) == 0, stage.told()
        found = stage.violations()
    assert found == []
    (first_kib, first_open), (last_kib, last_open) = taken[0], taken[-1]
    tally.figure(
        "memory and descriptors of a long run",
        f"{first_kib // 1024} MiB and {first_open} after a fifth of {documents:,}, "
        f"{last_kib // 1024} MiB and {last_open} after four",
    )
    assert last_kib < first_kib * 1.1 + 10_240
    assert last_open <= first_open + 4


def taken_by(pid: int) -> tuple[int, int]:
    """Resident memory in KiB, and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(resident), len(os.listdir(f"/proc/{pid}/fd"))
