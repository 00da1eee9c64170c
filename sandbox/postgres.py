"""Who uses the embedded Postgres, and therefore when it starts and when it stops.

It is a real server (`sandbox.cluster`) on 127.0.0.1, started by the first command that needs it and stopped by
the last one that leaves, counted by the operating system instead of by us:

- `lock`, held alone, for the length of one transition: a start, a stop, a reset, an arrival, a departure. Four
  commands at once make one server, and nobody arrives while the last one is stopping it.
- `users`, held shared by every user for as long as it uses the server. Whoever leaves tries to hold it alone;
  if that works, nobody else is there. A killed process lets go without being asked; a server that it leaves
  running is the next command's to use and to stop.
- `keep`, a mark that `up` leaves and `down` removes: the server then outlives its users.

Layout of `home/postgres`: the three files above and `server/` with data, password, port and log. When the
caller is root and the account it lends to Postgres cannot reach `home`, `server/` lies under /var/lib/farthing
instead and the file `elsewhere` says so. No directory that existed before is ever opened up.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql

from sandbox.binaries import Account, account, programs
from sandbox.cluster import HOST, USER, Cluster, Postmaster, delete
from sandbox.errors import SandboxError

DATABASE = "farthing"
#: Where root keeps the data of a home that the Postgres account cannot reach.
ELSEWHERE = Path("/var/lib/farthing")


@dataclass(frozen=True, slots=True)
class Server:
    """A running embedded Postgres. Its address holds the superuser's password, so it does not print itself."""

    url: str = field(repr=False)
    port: int
    pid: int
    data: Path


@contextmanager
def running(home: Path, *, throwaway: bool = False, durable: bool = True) -> Iterator[Server]:
    """Use the Postgres of `home`: started if it is not running, stopped when its last user leaves.

    May be nested, and entered again to revive a server that died: the address stays the same while its port is
    free. With `throwaway` the last one to leave deletes the data too. Unless `durable`, a server that this starts
    does not survive a power cut: it never waits for the disk.

    Raises:
        SandboxError: it is not installed, cannot run on this machine, or does not start.
    """
    folder = _folder(home)
    with closing(_Lock(folder / "users")) as users:
        with _transition(folder):
            users.share()
            server = _started(folder, durable)
        try:
            yield server
        finally:
            if folder.exists():  # else someone deleted the home under us, and Postgres notices by itself
                _leave(folder, users, throwaway)


def up(home: Path) -> Server:
    """Start the Postgres of `home` and keep it up until `down`, whoever comes and goes.

    Raises:
        SandboxError: as `running`.
    """
    folder = _folder(home)
    with _transition(folder):
        server = _started(folder)
        (folder / "keep").touch()
    return server


def down(home: Path, *, force: bool = True) -> None:
    """Stop the Postgres of `home`, by `force` even under a user's feet. Fine if it is not running.

    Raises:
        SandboxError: somebody uses it.
    """
    folder = _folder(home)
    with _transition(folder):
        _refuse_if_used(folder, force)
        (folder / "keep").unlink(missing_ok=True)
        if cluster := _existing(folder):
            cluster.stop()


def reset(home: Path, *, force: bool = True) -> None:
    """Stop the Postgres of `home` and delete its data, by `force` even under a user's feet. Fine if there is none.

    Raises:
        SandboxError: somebody uses it.
    """
    folder = _folder(home)
    with _transition(folder):
        _refuse_if_used(folder, force)
        (folder / "keep").unlink(missing_ok=True)
        _delete(folder)


def users(home: Path) -> list[int]:
    """The processes that use the Postgres of `home` right now. Changes nothing; empty where the system cannot say."""
    path = home.resolve() / "postgres" / "users"
    try:
        file, locks = path.stat(), Path("/proc/locks").read_text()
    except OSError:
        return []
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    fields = (line.split() for line in locks.splitlines())
    return sorted({int(pid) for _, _, _, _, pid, where, *_ in fields if where == place and pid.isdecimal()})


def status(home: Path) -> Server | None:
    """The Postgres of `home` if it runs and answers. Changes nothing and waits for nobody."""
    folder = home.resolve() / "postgres"
    with _advice(folder):
        cluster = _existing(folder)
        live = cluster.postmaster() if cluster else None
        if cluster is None or live is None or not cluster.answers(live):
            return None
        return _server(cluster, live)


def create_database(server: Server, name: str, *, template: str = "template1") -> str:
    """Make a fresh database, a copy of `template`, and return its URL.

    Raises:
        psycopg.errors.DuplicateDatabase: there is one of that name.
    """
    # By files, in a third of the time that it takes by WAL: a template of nobody is on disk.
    copied = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    statement = copied.format(sql.Identifier(name), sql.Identifier(template))
    with closing(psycopg.connect(_to(server.url, "postgres"), autocommit=True)) as connection:
        connection.execute(statement)
    return _to(server.url, name)


def drop_database(server: Server, name: str) -> None:
    """Delete a database and cut off whoever is still connected to it. Fine if there is none."""
    statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with closing(psycopg.connect(_to(server.url, "postgres"), autocommit=True)) as connection:
        connection.execute(statement)


class _Lock:
    """An flock on a file that is never deleted. The system releases it when its process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def share(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def hold_alone(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def is_last(self) -> bool:
        """Whether nobody else holds it. Gives up this holder's own share either way."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child may still have the file open
        os.close(self._descriptor)


@contextmanager
def _transition(folder: Path) -> Iterator[None]:
    """The right to change anything about the server, and the place where an OSError gets its advice."""
    with _advice(folder), closing(_Lock(folder / "lock")) as lock:
        lock.hold_alone()
        yield


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as problem:
        raise SandboxError(
            f"{problem.filename or folder} belongs to another user: run as that user, or set FARTHING_HOME elsewhere."
        ) from problem
    except OSError as problem:
        where = problem.filename or folder
        raise SandboxError(f"The embedded Postgres cannot use {where}: {problem.strerror or problem}.") from problem


def _folder(home: Path) -> Path:
    """The folder of the locks, made if there is none. Others may pass through it, and find only private things."""
    folder = home.resolve() / "postgres"
    with _advice(folder):
        _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Make a folder that is passable from its first moment: two commands at once must judge it alike."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    scratch.chmod(0o711)
    try:
        scratch.rename(folder)
    except OSError:  # another command was first, and is using it
        scratch.rmdir()
        if not folder.exists():
            raise


def _refuse_if_used(folder: Path, force: bool) -> None:
    if force:
        return
    with closing(_Lock(folder / "users")) as users:
        if not users.is_last():
            raise SandboxError(f"the Postgres of {folder.parent} is in use; end what uses it first")


def _started(folder: Path, durable: bool = True) -> Server:
    runner = account(_data(folder))
    place = _place(folder, runner)
    _make(place)
    cluster = Cluster(place, programs(runner, place), durable)
    server = _server(cluster, cluster.start())
    _ensure_database(server)
    return server


def _server(cluster: Cluster, live: Postmaster) -> Server:
    url = f"postgresql://{USER}:{cluster.password}@{HOST}:{live.port}/{DATABASE}"
    return Server(url, live.port, live.pid, cluster.data)


def _existing(folder: Path) -> Cluster | None:
    """The cluster of this home if its data was ever made."""
    data = _data(folder)
    if not data.exists():
        return None
    return Cluster(data.parent, programs(account(data), data.parent))


def _leave(folder: Path, users: _Lock, throwaway: bool) -> None:
    with _transition(folder):
        if not users.is_last() or (folder / "keep").exists():
            return
        if throwaway:
            _delete(folder)
        elif cluster := _existing(folder):
            cluster.stop()


def _delete(folder: Path) -> None:
    """Stop the server and delete all but the locks: whoever waits for one must not wait for a deleted file."""
    if cluster := _existing(folder):
        cluster.stop()
    delete(_data(folder).parent)
    (folder / "elsewhere").unlink(missing_ok=True)


def _data(folder: Path) -> Path:
    """Where the data is, or would be if the Postgres account can reach this home."""
    pointer = folder / "elsewhere"
    return (_outside(folder) if pointer.exists() else folder / "server") / "data"


def _place(folder: Path, runner: Account) -> Path:
    """The directory of the server's files: in the home, unless the account that runs it is shut out of there."""
    data = _data(folder)
    if data.exists() or runner.can_enter(folder):
        return data.parent
    outside = _outside_of(folder)
    _make(ELSEWHERE)
    (folder / "elsewhere").write_text(f"{outside}\n")
    return outside


def _outside(folder: Path) -> Path:
    """What `elsewhere` says, if it says what this home would write: root follows no foreign pointer."""
    said, expected = Path((folder / "elsewhere").read_text().strip()), _outside_of(folder)
    if said != expected:
        raise SandboxError(
            f"{folder} was moved or copied; its Postgres is still in {said}. Rename that to {expected} and write "
            f"the new name into {folder / 'elsewhere'}, or delete this file to start anew."
        )
    return expected


def _outside_of(folder: Path) -> Path:
    return ELSEWHERE / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _to(url: str, database: str) -> str:
    return urlsplit(url)._replace(path="/" + quote(database, safe="")).geturl()


def _ensure_database(server: Server) -> None:
    """Make the database `farthing` if a starter died before it could, and prove that the server is ours."""
    try:
        with closing(psycopg.connect(_to(server.url, "postgres"), autocommit=True)) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if not known:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    except psycopg.OperationalError as problem:
        raise SandboxError(f"The embedded Postgres runs and refuses us: {problem}") from None
