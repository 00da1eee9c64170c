"""Connections to the ledger: each failure becomes an error that says what to do next, and never a password."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from schemas import tables
from schemas.errors import ConfigurationError, FarthingError, LedgerUnavailable
from tasks.ledger.connection import (
    Ledger,
    LedgerFull,
    PassingFailure,
    PermissionRefused,
    PoisonValue,
    Role,
    explain,
    opened,
)
from tasks.ledger.rows import append, driver
from tasks.ledger.upgrades import upgrade
from tests.ledgers import lane_ledger, sql, value


async def failure(url: str, role: Role = Role.LANE) -> FarthingError:
    """What opening this ledger raises; it never shows the password."""
    with pytest.raises(FarthingError) as caught:
        async with opened(SecretStr(url), role):
            pass
    password = make_url(url).password
    assert password is None or password not in str(caught.value)
    error = caught.value  # a traceback must not quote what the driver said
    assert error.__suppress_context__ or error.__context__ is None
    return caught.value


def changed(url: str, **parts: object) -> str:
    return make_url(url).set(**parts).render_as_string(hide_password=False)


async def test_a_refused_port_is_a_passing_failure_that_says_what_to_start(ledger_url: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = changed(ledger_url, port=closed.getsockname()[1])
        error = await failure(url)
        assert isinstance(error, PassingFailure)
        assert "cannot be reached: start it, or set FARTHING_DATABASE_URL" in str(error)
        with pytest.raises(PassingFailure, match="cannot be reached"):
            upgrade(SecretStr(url))


async def test_a_wrong_password_says_which_setting_to_check(ledger_url: str) -> None:
    error = await failure(changed(ledger_url, password="not-the-password"))
    assert type(error) is LedgerUnavailable
    assert "refuses this user or password: check FARTHING_DATABASE_URL" in str(error)


async def test_a_missing_database_says_how_to_create_it(ledger_url: str) -> None:
    error = await failure(changed(ledger_url, database="nowhere"))
    assert "create it with `createdb nowhere`" in str(error)


@pytest.mark.parametrize("role", Role)
async def test_a_database_that_was_not_migrated_says_what_to_run(role: Role, database_url: str) -> None:
    error = await failure(database_url, role)
    assert type(error) is LedgerUnavailable
    assert "run `farthing db upgrade`" in str(error)


@pytest.mark.parametrize("role", Role)
async def test_a_newer_ledger_asks_for_a_newer_farthing(role: Role, ledger_url: str) -> None:
    sql(ledger_url, "UPDATE ledger_version SET version_num = '9999'")
    assert "is at version 9999, this Farthing knows" in str(await failure(ledger_url, role))


async def test_an_older_ledger_asks_for_an_upgrade(ledger_url: str) -> None:
    sql(ledger_url, "UPDATE ledger_version SET version_num = '0000'")
    assert "run `farthing db upgrade`" in str(await failure(ledger_url))


@pytest.mark.parametrize("url", ["mysql://me:secret@host/x", "postgresql:/me:secret", "secret"])
async def test_a_url_that_is_none_is_a_configuration_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with opened(SecretStr(url), Role.LANE):
            pass
    assert "secret" not in str(caught.value)


async def test_a_connection_that_the_server_cut_is_a_passing_failure_and_the_next_one_works(ledger_url: str) -> None:
    async def be_cut() -> None:
        async with ledger.transaction() as connection:
            cut(ledger_url)
            await connection.execute(text("SELECT 1"))

    async with lane_ledger(ledger_url) as ledger:
        with pytest.raises(PassingFailure):
            await be_cut()
        await touch(ledger)


async def test_a_connection_cut_in_the_middle_of_a_copy_is_a_passing_failure(ledger_url: str) -> None:
    """COPY goes past SQLAlchemy, and so do its errors."""

    def rows() -> Iterator[tuple[object, ...]]:
        yield (1, 0, "red")
        cut(ledger_url)
        for number in range(1, 100_000):
            yield (1, number, "red")

    async def be_cut() -> None:
        async with ledger.transaction() as connection:
            await append(connection, tables.label, ("run_id", "document_no", "label"), rows())

    async with lane_ledger(ledger_url) as ledger:
        with pytest.raises(PassingFailure):
            await be_cut()
        await touch(ledger)


def cut(url: str) -> None:
    """End every other connection to this database."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    sql(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")


async def test_idle_connections_that_the_server_cut_do_not_fail_for_ever(ledger_url: str) -> None:
    async with lane_ledger(ledger_url) as ledger:
        await asyncio.gather(*(touch(ledger) for _ in range(4)))
        cut(ledger_url)
        with pytest.raises(PassingFailure):
            await touch(ledger)
        await asyncio.gather(*(touch(ledger) for _ in range(4)))


async def touch(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        await connection.execute(text("SELECT pg_sleep(0.01)"))


async def test_a_busy_pool_is_a_passing_failure(ledger_url: str) -> None:
    async with lane_ledger(ledger_url, pool_size=1) as ledger:
        ledger.engine.pool._timeout = 0.05
        async with ledger.transaction():
            with pytest.raises(PassingFailure, match="every connection to Postgres is busy"):
                await touch(ledger)


async def test_a_lanes_session_waits_for_the_disk_and_blocks_nobody_when_it_stops(ledger_url: str) -> None:
    sql(ledger_url, "ALTER DATABASE " + str(make_url(ledger_url).database) + " SET synchronous_commit = off")
    async with lane_ledger(ledger_url) as ledger, ledger.transaction() as connection:
        shown = [
            (await connection.execute(text(f"SHOW {name}"))).scalar_one()
            for name in ("role", "synchronous_commit", "idle_in_transaction_session_timeout", "timezone")
        ]
    assert shown == ["farthing_lane", "on", "20s", "UTC"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("53100", LedgerFull),
        ("57P01", PassingFailure),
        ("57P03", PassingFailure),
        ("25P03", PassingFailure),
        ("08006", PassingFailure),
        ("40001", PassingFailure),
        ("40P01", PassingFailure),
        ("22P05", PoisonValue),
        ("23514", PoisonValue),
        ("54000", PoisonValue),
        ("22023", LedgerUnavailable),
        ("42501", PermissionRefused),
        ("XX000", LedgerUnavailable),
    ],
)
async def test_what_postgres_raises_becomes_the_error_that_the_code_means(
    code: str, kind: type[FarthingError], ledger_url: str
) -> None:
    """Raised by the server itself, on the way that every statement takes."""
    secret = "what a row said"
    async with lane_ledger(ledger_url) as ledger:
        with pytest.raises(FarthingError) as caught:
            async with ledger.transaction() as connection:
                await connection.execute(
                    text(f"DO $$ BEGIN RAISE EXCEPTION '{secret}' USING ERRCODE = '{code}'; END $$")
                )
        assert type(caught.value) is kind
        assert secret not in str(caught.value)
        await touch(ledger)


def test_an_error_that_no_code_explains_keeps_its_name_and_nothing_else() -> None:
    error = explain(OSError("the password is 123"), make_url("postgresql://me:123@host:1/x"))
    assert isinstance(error, PassingFailure)
    assert "123" not in str(error)


async def test_too_few_descriptors_are_not_blamed_on_postgres(ledger_url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with lane_ledger(ledger_url) as ledger:
        await ledger.engine.dispose()  # so that it has to connect again
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(PassingFailure, match=r"may open no more files.*ulimit -n"):
                await touch(ledger)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_an_upgrade_reports_its_version(ledger_url: str) -> None:
    assert upgrade(SecretStr(ledger_url)) == value(ledger_url, "SELECT version_num FROM ledger_version")


async def test_a_cancellation_is_not_lost_when_the_connection_breaks_under_it(ledger_url: str) -> None:
    """In mid-COPY the driver's own error takes its place; a writer with patience would then go on for ever."""
    async with lane_ledger(ledger_url) as ledger:

        async def copy() -> None:
            async with ledger.transaction() as connection:
                postgres = await driver(connection)
                await postgres.execute("SELECT pg_sleep(60)")  # like COPY, not through SQLAlchemy

        copying = asyncio.create_task(copy())
        here = "datname = current_database()"  # other tests sleep on this server, too
        sleeping = f"FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' AND state = 'active' AND {here}"
        while not value(ledger_url, f"SELECT count(*) {sleeping}"):
            await asyncio.sleep(0.01)
        value(ledger_url, f"SELECT count(pg_terminate_backend(pid)) {sleeping}")  # before the loop sees it
        copying.cancel()
        await asyncio.wait({copying})
        assert copying.cancelled()


async def test_a_time_limit_around_a_transaction_still_ends_in_its_own_error(ledger_url: str) -> None:
    async with lane_ledger(ledger_url) as ledger:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), ledger.transaction() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        async with ledger.transaction() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1


async def test_what_gets_no_answer_is_given_up_with_its_connection_and_may_be_asked_again(ledger_url: str) -> None:
    async with lane_ledger(ledger_url, pool_size=1, answer_within_s=0.5) as ledger:
        with pytest.raises(PassingFailure, match="Postgres has not answered for 0 s"):
            async with ledger.transaction() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        async with ledger.transaction() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1


async def test_what_goes_through_many_rows_has_the_time_that_they_may_take(ledger_url: str) -> None:
    async with (
        lane_ledger(ledger_url, answer_within_s=0.5) as ledger,
        ledger.transaction(rows=10_000) as connection,
    ):
        assert (await connection.execute(text("SELECT 1 FROM pg_sleep(1)"))).scalar_one() == 1


async def test_not_even_at_debug_does_a_log_quote_a_row_or_a_parameter(
    ledger_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "sqlalchemy"):
        async with opened(SecretStr(ledger_url), Role.LANE) as ledger, ledger.transaction() as connection:
            assert (await connection.execute(text("SELECT 'ro' || 'w'"))).scalar() == "row"
            await connection.execute(text("SELECT CAST(:given AS text)"), {"given": "canary"})
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "SELECT 'ro' || 'w'" in said
    assert "('row',)" not in said
    assert "canary" not in said
