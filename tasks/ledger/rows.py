"""Appending rows: COPY into a temporary table, then one INSERT that skips what is already there.

Skipping makes every append safe to repeat, which is what one does when the answer to a COMMIT was lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import psycopg
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables

#: The tables that a lane appends to in bulk; each connection has an `incoming_…` twin of each.
BULK_TABLES: tuple[Table, ...] = (
    tables.attempt_intent,
    tables.attempt_outcome,
    tables.attempt_unknown,
    tables.answer,
    tables.document,
    tables.held,
    tables.shard,
    tables.duplicate,
    tables.label,
)


def create_incoming(connection: Any) -> None:
    """Make the temporary twins on a fresh connection; they last as long as it does."""
    with connection.cursor() as cursor:
        for table in BULK_TABLES:
            cursor.execute(
                f"CREATE TEMP TABLE incoming_{table.name} (LIKE {tables.SCHEMA}.{table.name} INCLUDING DEFAULTS)"
                " ON COMMIT DELETE ROWS"
            )


async def append(
    connection: AsyncConnection, table: Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> int:
    """Append rows, and those brought before, to one of BULK_TABLES; returns how many were not there before."""
    names = ", ".join(columns)
    await bring(connection, table, columns, rows)
    postgres = await driver(connection)
    async with postgres.cursor() as cursor:
        await cursor.execute(
            f"INSERT INTO {tables.SCHEMA}.{table.name} ({names})"  # noqa: S608 (names come from our own tables)
            f" SELECT {names} FROM incoming_{table.name} ON CONFLICT DO NOTHING"
        )
        return cursor.rowcount


async def bring(
    connection: AsyncConnection, table: Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Bring rows to Postgres, for `append` to take over in the same transaction."""
    postgres = await driver(connection)
    async with (
        postgres.cursor() as cursor,
        cursor.copy(f"COPY incoming_{table.name} ({', '.join(columns)}) FROM STDIN") as copy,
    ):
        for row in rows:
            await copy.write_row(row)


async def driver(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """The psycopg connection under an open transaction, for COPY."""
    raw = await connection.get_raw_connection()
    reached = raw.driver_connection
    assert isinstance(reached, psycopg.AsyncConnection)
    return reached


def as_json(value: object) -> str | None:
    """JSON text for a jsonb column; None stays null. What orjson cannot write is for Postgres to judge."""
    if value is None:
        return None
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # a lone surrogate, which Postgres refuses for this row alone, or an integer over 64 bits
        return json.dumps(value)


def storable(value: str) -> str:
    """Text that Postgres accepts: NUL becomes U+FFFD, a lone surrogate a question mark."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
