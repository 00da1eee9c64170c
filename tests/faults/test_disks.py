"""A full disk under Postgres: nothing is sent meanwhile, nothing that was paid for is lost, and the run goes on.

The real thing needs a small file system of its own, and so the right to mount one. What Postgres then says (53100)
can be had anywhere, from a trigger: that is every commit's, and the real disks are `make faults`'s.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.upgrades import upgrade
from tests.faults.hurtable import HurtablePostgres, hurtable
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

DOCUMENTS = 120
#: A lane waits for a disk as long as for a server that is away; here that must not end within the test.
PATIENT = LeaseTimes(beat_every_s=0.2, fence_after_s=40.0, grace_s=1.0, dead_after_s=60.0)
NO_SPACE = "No space left on device"
#: What Postgres says of a table that cannot grow. Statement by statement, so that the lane's own work brings it out.
REFUSE = f"""
    CREATE FUNCTION farthing.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'could not extend file: {NO_SPACE}' USING ERRCODE = '53100';
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON farthing.attempt_intent EXECUTE FUNCTION farthing.refuse();
    CREATE TRIGGER refuse BEFORE INSERT ON farthing.attempt_outcome EXECUTE FUNCTION farthing.refuse();
"""
ALLOW = "DROP FUNCTION farthing.refuse() CASCADE"


@dataclass(frozen=True)
class Disk:
    """How a disk is made full, whether Postgres has noticed, and how there is space again."""

    fill: Callable[[], None]
    is_full: Callable[[], bool]
    free: Callable[[], None]


@contextmanager
def set_up(url: str, root: Path) -> Iterator[Stage]:
    with staged(root, url, documents=DOCUMENTS, time_scale=1, reply=0.2) as made:
        made.times = PATIENT
        made.remember_baseline()
        yield made


def work_until_full(stage: Stage, disk: Disk) -> None:
    """A run meets a full disk in its middle, waits, and ends by itself once there is space."""
    stage.scene()
    before = stage.run_id
    intents = f"SELECT count(*) FROM attempt_intent WHERE run_id > {before}"
    child = stage.start()
    assert wait_until(lambda: stage.value(intents) > 20), stage.told()
    disk.fill()
    assert wait_until(disk.is_full), stage.told()
    time.sleep(1.0)  # until whatever was in flight is here, and has nowhere to go
    disk.free()
    assert stage.wait(child) == 0, stage.told()
    found = stage.violations()
    assert found == [], f"{found}\n{stage.told()}"
    assert stage.value(f"SELECT count(*) FROM attempt_unknown WHERE run_id > {before}") == 0


def stop_while_full(stage: Stage, disk: Disk) -> None:
    """An impatient user ends the run while the disk is full: the replies wait in files, and nobody pays again."""
    stage.scene()
    before = stage.run_id
    intents = f"SELECT count(*) FROM attempt_intent WHERE run_id > {before}"
    child = stage.start()
    assert wait_until(lambda: stage.value(intents) > 20), stage.told()
    disk.fill()
    assert wait_until(disk.is_full), stage.told()
    time.sleep(1.0)
    os.kill(child.pid or 0, signal.SIGTERM)
    assert wait_until(lambda: list((stage.root / "farthing" / "spill").glob("*.jsonl")) != [])
    os.kill(child.pid or 0, signal.SIGTERM)
    stage.wait(child)
    disk.free()
    stage.resume()
    found = stage.violations()
    assert found == [], f"{found}\n{stage.told()}"
    assert list((stage.root / "farthing" / "spill").iterdir()) == []


@pytest.fixture(scope="module")
def refusing(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage whose tables can be made to refuse."""
    root = tmp_path_factory.mktemp("refusing")
    name = f"refusing_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with set_up(url, root) as made:
        yield made
    drop_database(postgres, name)


@pytest.mark.parametrize("befall", [work_until_full, pytest.param(stop_while_full, marks=pytest.mark.long)])
def test_what_postgres_says_of_a_full_disk_makes_a_run_wait_and_loses_nothing(
    befall: Callable[..., None], refusing: Stage, tally: Tally
) -> None:
    def execute(statement: str) -> None:
        with psycopg.connect(refusing.database_url, autocommit=True) as connection:
            connection.execute(statement)

    befall(refusing, Disk(lambda: execute(REFUSE), lambda: True, lambda: execute(ALLOW)))
    tally.count("disk full, as Postgres tells it")


class SmallDisk:
    """A file system of so many bytes in memory, which can be filled to the last one."""

    def __init__(self, place: Path, size: int) -> None:
        self.place = place
        arguments = ("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place))
        mounted = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"no right to mount a small disk here: {mounted.stderr.strip()}")

    def fill(self) -> None:
        """To the last block, whatever Postgres takes meanwhile."""
        with (self.place / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass

    def free(self) -> None:
        (self.place / "ballast").unlink()

    def close(self) -> None:
        subprocess.run(("umount", "--lazy", str(self.place)), check=True)


@pytest.fixture
def disks() -> Iterator[tuple[SmallDisk, SmallDisk]]:
    """For a cluster, and for its write-ahead log; outside of pytest's folders, which are closed to its account."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    with tempfile.TemporaryDirectory(prefix="farthing-disks-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        made = []
        for name, size in (("data", 160 << 20), ("wal", 80 << 20)):
            (Path(folder) / name).mkdir()
            made.append(disk := SmallDisk(Path(folder) / name, size))
            stack.callback(disk.close)
        yield made[0], made[1]


@pytest.fixture
def server(disks: tuple[SmallDisk, SmallDisk]) -> Iterator[HurtablePostgres]:
    """A Postgres on those disks."""
    data, wal = disks
    with hurtable(data.place / "home") as server:
        upgrade(SecretStr(server.server.url))
        with psycopg.connect(server.server.url, autocommit=True) as connection:
            for setting in ("max_wal_size", "min_wal_size"):
                connection.execute(f"ALTER SYSTEM SET {setting} = '32MB'")
        server.end(signal.SIGINT)
        log, own = server.server.data / "pg_wal", wal.place / "pg_wal"
        subprocess.run(("cp", "--archive", str(log), str(own)), check=True)
        shutil.rmtree(log)
        log.symlink_to(own)
        server.revive()
        yield server


@pytest.mark.long
@pytest.mark.parametrize("befall", [work_until_full, stop_while_full])
def test_a_full_data_disk_makes_a_run_wait_and_loses_nothing(
    befall: Callable[..., None],
    disks: tuple[SmallDisk, SmallDisk],
    server: HurtablePostgres,
    tmp_path: Path,
    tally: Tally,
) -> None:
    with set_up(server.server.url, tmp_path) as stage:
        befall(stage, Disk(disks[0].fill, lambda: NO_SPACE in said_by(server), disks[0].free))
    tally.count("data disk full")


@pytest.mark.long
@pytest.mark.parametrize("befall", [work_until_full, stop_while_full])
def test_a_full_log_disk_ends_postgres_and_loses_nothing(
    befall: Callable[..., None],
    disks: tuple[SmallDisk, SmallDisk],
    server: HurtablePostgres,
    tmp_path: Path,
    tally: Tally,
) -> None:
    """Postgres cannot even wait without space for its write-ahead log: it panics, and does not come up before."""

    def free() -> None:
        disks[1].free()
        server.revive()

    def fill() -> None:
        disks[1].fill()
        use_up_log(server)

    with set_up(server.server.url, tmp_path) as stage:
        befall(stage, Disk(fill, lambda: "PANIC" in said_by(server) and NO_SPACE in said_by(server), free))
    tally.count("log disk full, and Postgres panics")


def use_up_log(server: HurtablePostgres) -> None:
    """Let the log go on to segments that there is no space for."""
    try:
        with psycopg.connect(server.server.url, autocommit=True) as connection:
            for _ in range(200):
                connection.execute("SELECT pg_logical_emit_message(true, 'chaos', repeat('x', 1000000))")
    except psycopg.OperationalError:
        return
    raise AssertionError("the write-ahead log still has space")


def said_by(server: HurtablePostgres) -> str:
    """Postgres's own log, and that of the start before."""
    return "".join(path.read_text(errors="replace") for path in server.server.data.parent.glob("log*"))
