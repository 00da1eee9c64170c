"""Connections to the ledger: how they are made, as which role, and what their failures mean.

A lane works as `farthing_lane`, an audit as `farthing_auditor`, who books an export or closes a month as
`farthing_bookkeeper`; only `upgrades` is the owner. SQLAlchemy keeps the pool and the transactions; COPY goes to the
psycopg connection underneath, which is the fast way in and out.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import psycopg
from pydantic import SecretStr
from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from schemas.errors import ConfigurationError, FarthingError, LedgerUnavailable
from schemas.tables import SCHEMA
from tasks.failpoints import reach
from tasks.ledger.rows import create_incoming

#: Class 08 is a broken connection, 57P0x a server going down or coming up, 40001/40P01 a lost race: try again.
#: None means that the client saw the connection break before any code came.
#: 25P03 is the server ending a transaction that we left idle.
_PASSING = ("08", "57P01", "57P02", "57P03", "57P05", "25P03", "40001", "40P01", "55P03")
#: A value that Postgres refuses: the row's fault, not the server's.
_POISON = ("22", "23514", "54")


#: A peer that vanished without a word is noticed in half a minute, on both sides: a lane that waits for it would
#: miss its heartbeat, and the server would keep the locks of a lane that is gone.
CONNECT: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_SESSION = (
    "tcp_keepalives_idle TO 10",
    "tcp_keepalives_interval TO 5",
    "tcp_keepalives_count TO 3",
    "tcp_user_timeout TO 30000",
    "idle_in_transaction_session_timeout TO '20s'",  # a lane that was stopped in mid-transaction blocks nobody
)
#: Each file in `versions` there begins with the version that it brings; and what a ledger says of its own.
MIGRATIONS = Path(__file__).parents[2] / "migrations"
VERSION = "SELECT version_num FROM farthing.ledger_version"
#: A ledger that goes through fewer rows in a second is stuck.
ROWS_PER_S = 1_000
#: A server that does not wait for its disk would forget what we reported (G3).
_DURABLE = """
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""


#: What SQLAlchemy calls our engines in its log, where DEBUG quotes each row that comes back: answers, too.
_LOGGED_AS = "farthing"


def _quotes_no_row(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


class Role(StrEnum):
    """Whose rights a connection has (migrations/roles.py)."""

    LANE = "farthing_lane"
    AUDITOR = "farthing_auditor"
    BOOKKEEPER = "farthing_bookkeeper"


class Ledger:
    """A pool of connections to one ledger, all in one role. Open it with `opened`; close it by leaving.

    A transaction that takes longer than `answer_within_s` seconds is given up, with its connection: TCP notices a
    peer that vanished, but not one that takes what it is sent and is silent, like a stopped server or a pooler that
    lost its own. None: for a person who waits, and may press Ctrl-C.
    """

    def __init__(self, engine: AsyncEngine, url: URL, answer_within_s: float | None) -> None:
        self.engine = engine
        self.url = url
        self.answer_within_s = answer_within_s

    @asynccontextmanager
    async def transaction(self, step: str | None = None, *, rows: int = 0) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed, and so durable, when the block ends without an error.

        One that writes says which `step` it is, so that the fault harness can end the process around its COMMIT. One
        that goes through many `rows` has the time that they may take. Raises LedgerUnavailable and PoisonValue.
        """
        within_s = None if self.answer_within_s is None else self.answer_within_s + rows / ROWS_PER_S
        try:
            async with asyncio.timeout(within_s), self._transaction(step) as connection:
                yield connection
        except TimeoutError:
            raise PassingFailure(f"Postgres has not answered for {within_s:.0f} s: it may be stuck") from None

    @asynccontextmanager
    async def _transaction(self, step: str | None) -> AsyncIterator[AsyncConnection]:
        with cancellation_kept():
            try:
                async with self.engine.begin() as connection:
                    yield connection
                    if step is not None:
                        reach(f"{step}.before_commit")
                if step is not None:
                    reach(f"{step}.after_commit")
            except (DBAPIError, psycopg.Error, OSError) as error:  # psycopg's own come from COPY
                raise explain(error, self.url) from None  # its text may quote a row (G15)
            except PoolTimeout:
                raise PassingFailure("every connection to Postgres is busy: it may be slow or stuck") from None


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """A task that is cancelled in the block leaves it by CancelledError, whatever else comes of it.

    A connection that breaks while a cancelled COPY is undone raises its own error in place of the cancellation. It
    looks like any other, so whoever has patience with Postgres would ask again for ever, and nobody cancels twice.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from None


class PassingFailure(LedgerUnavailable):
    """The server is away or lost a race; the same statement may succeed later."""


class PermissionRefused(LedgerUnavailable):
    """This login lacks a right that the question needs."""


class PoisonValue(FarthingError):
    """Postgres refuses a value in these rows; the others can be saved."""


class LedgerFull(LedgerUnavailable):
    """The server's disk is full (53100): nothing can be recorded, so nothing may be sent."""


@asynccontextmanager
async def opened(
    database_url: SecretStr, role: Role, *, pool_size: int = 4, answer_within_s: float | None = None
) -> AsyncIterator[Ledger]:
    """A ledger in `role`. Raises LedgerUnavailable where it is away, not migrated, or newer than this code."""
    url = parse_url(database_url)
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,
        logging_name=_LOGGED_AS,
        connect_args=CONNECT,
    )
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOGGED_AS}").addFilter(_quotes_no_row)
    event.listen(engine.sync_engine, "connect", _work_as(role))
    ledger = Ledger(engine, url, answer_within_s)
    try:
        async with ledger.transaction() as connection:
            await connection.run_sync(_require_newest_version)
        yield ledger
    finally:
        await engine.dispose()


async def find_version(ledger: Ledger) -> str:
    """The version of an open ledger, which is this code's."""
    async with ledger.transaction() as connection:
        return str((await connection.execute(text(VERSION))).scalar_one())


def parse_url(database_url: SecretStr) -> URL:
    """The SQLAlchemy URL for psycopg. The error of a bad one does not repeat it: it may hold a password."""
    try:
        url = make_url(database_url.get_secret_value())
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "FARTHING_DATABASE_URL is not a database URL; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigurationError(
            f"FARTHING_DATABASE_URL names {url.get_backend_name()}; the ledger needs postgresql://"
        )
    return url.set(drivername="postgresql+psycopg")


def explain(error: Exception, url: URL) -> FarthingError:
    """The error a caller can act on. Messages name host and database, never the password or a row's values."""
    place = f"{url.host or 'localhost'}:{url.port or 5432}/{url.database}"
    original = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(original, "sqlstate", None)
    match code:
        case "42P01" | "3F000" | "42703" | "22023":  # 22023: SET ROLE, and there is no such role
            return LedgerUnavailable(f"the ledger at {place} lacks tables of this version: run `farthing db upgrade`")
        case None if isinstance(original, psycopg.DataError):
            return PoisonValue("psycopg refused a value")
        case str() if code.startswith(_POISON):
            return PoisonValue(f"Postgres refused a value ({code})")
        case "53100":
            return LedgerFull(f"the disk of Postgres at {place} is full: free space there, then run the same command")
        case str() if code.startswith(_PASSING):
            return PassingFailure(f"Postgres at {place} interrupted us ({code}): check that it is up")
        case "42501":
            return PermissionRefused(_explain_permission(place))
        case None if (refusal := _read_refusal(original)) is not None:
            return LedgerUnavailable(refusal.format(place=place, database=url.database))
        case None if _has_no_descriptor_left():
            return PassingFailure(
                "this process may open no more files, so that Postgres cannot be reached: raise `ulimit -n`, "
                "or lower the job's concurrency"
            )
        case None if isinstance(original, psycopg.OperationalError | psycopg.InterfaceError | OSError):
            return PassingFailure(
                f"Postgres at {place} cannot be reached: start it, or set FARTHING_DATABASE_URL, "
                "or use --sandbox for one on this machine"
            )
        case _:
            return LedgerUnavailable(f"Postgres at {place} failed with {code or type(original).__name__}")


def _has_no_descriptor_left() -> bool:
    """Whether this process may open no more files, which libpq does not tell from a server that is away."""
    try:
        os.close(os.dup(2))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


_NO_DATABASE = "there is no database at {place}: create it with `createdb {database}`"
_NO_LOGIN = "Postgres at {place} refuses this user or password: check FARTHING_DATABASE_URL"
#: libpq gives no code for a connection that the server refuses, only its words. In another language than English
#: they are not recognised, and the failure counts as passing.
_REFUSALS = (
    (re.compile(r'database ".*" does not exist'), _NO_DATABASE),
    (re.compile(r"authentication failed|no password supplied|no pg_hba.conf entry"), _NO_LOGIN),
    (re.compile(r'role ".*" (does not exist|is not permitted to log in)'), _NO_LOGIN),
)


def _read_refusal(error: object) -> str | None:
    """What a server that is up means by refusing a connection for good; None where it does not."""
    said = str(error) if isinstance(error, psycopg.OperationalError) else ""
    return next((means for words, means in _REFUSALS if words.search(said)), None)


def _explain_permission(place: str) -> str:
    return (
        f"this login may not do that at {place}. To migrate it needs CREATEROLE and CREATE on the database; to run "
        "it needs TEMPORARY there, and membership: GRANT farthing_lane, farthing_auditor TO <login>; to book an "
        "export or close a month, farthing_bookkeeper too"
    )


def _work_as(role: Role) -> Callable[[Any, object], None]:
    def set_role(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET ROLE {role.value}")
            for setting in (f"search_path TO {SCHEMA}", "timezone TO 'UTC'", *_SESSION):
                cursor.execute(f"SET {setting}")
            cursor.execute(_DURABLE)
        if role is Role.LANE:
            create_incoming(connection)
        connection.commit()

    return set_role


def _require_newest_version(connection: Connection) -> None:
    newest = max(file.name.partition("_")[0] for file in MIGRATIONS.glob("versions/[0-9]*.py"))
    found = connection.execute(text(f"SELECT to_regclass('{SCHEMA}.ledger_version') IS NOT NULL")).scalar()
    current = connection.execute(text(VERSION)).scalar() if found else None
    if current == newest:
        return
    if current is not None and current > newest:
        raise LedgerUnavailable(f"the ledger is at version {current}, this Farthing knows {newest}: update Farthing")
    raise LedgerUnavailable(
        f"the ledger is at version {current or 'none'} and needs {newest}: run `farthing db upgrade`"
    )
