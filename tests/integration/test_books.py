"""The books: an export closes what was unknown, once; a closed month stays what it was, and says what came late."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from pydantic import SecretStr
from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.pool import NullPool

import farthing
from sandbox.postgres import Server, create_database, drop_database
from schemas.attempts import RunId, Usage
from schemas.errors import ConfigurationError
from schemas.money import Currency
from schemas.months import Month
from schemas.reconciliation import Closing, Correction, Reconciliation, Status, reconcile
from schemas.statements import Bucket, Statement
from schemas.whatif import Scenario, reprice
from tasks.failpoints import KILLED, VARIABLE
from tasks.ledger import books, connection
from tasks.ledger.books import Bookable, Ours, Scope
from tasks.ledger.connection import Ledger, PermissionRefused, Role, opened
from tasks.ledger.proof import prove
from tasks.ledger.spend import audit, list_runs, progress
from tasks.ledger.upgrades import upgrade
from tasks.ledger.whatif import find_past
from tasks.statements import load_statement
from tests.integration.test_spend import PRO_COST
from tests.ledgers import AT, BOOK, COST, RESERVED, USAGE, lane_ledger, run_everything, sql, value

ROOT = Path(__file__).parents[2]
SEPTEMBER = Scope(None, Month(date(2026, 9, 1)), Currency.USD, is_simulated=False)
RUN = Scope(1, None, Currency.USD, is_simulated=False)
FLASH, PRO = ("deepseek-flash", (3_000, 150_000, 600_000)), ("deepseek-v4-pro", (22_000, 660_000, 1_980_000))
#: What `run_everything` booked: five attempts of flash and one of pro. Two more of flash are unknown.
KNOWN = [*5 * [(FLASH, USAGE)], (PRO, USAGE)]
LOST = Usage(128, 701, 7)
LOST_COST = 128 * 3_000 + 701 * 150_000 + 7 * 600_000


def export(path: Path, used: Sequence[tuple[tuple[str, tuple[int, int, int]], Usage]]) -> Statement:
    """What the console would export of these attempts, all of one hour."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["user_id", "start_time_iso", "end_time_iso", "model", "type", "price", "amount"])
    for (model, prices), tokens in used:
        counts = (tokens.hit, tokens.miss, tokens.output)
        for bucket, price, amount in zip(Bucket, prices, counts, strict=True):
            per_token = format(Decimal(price).scaleb(-12), "f")
            hour = ["2026-09-26T00:00:00Z", "2026-09-26T01:00:00Z"]
            writer.writerow(["account", *hour, model, bucket.value, per_token, amount])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("amount-2026-09.csv", text.getvalue())
    return load_statement([path])


#: As it could be written before attempts were closed by an export.
OLD_CORRECTION = """
    INSERT INTO cost_adjustment (run_id, document_no, attempt_no, amount, evidence) VALUES (1, 4, 1, 5, 'by hand')
"""
#: A reply to the lost attempt of document 4.
LATE_REPLY = """
    INSERT INTO attempt_outcome
    SELECT run_id, 4, 1, signal, verdict, http_status, finish_reason, sent_at, completed_at, hit, miss, output,
           reasoning, price_id, cost
    FROM attempt_outcome WHERE document_no = 0
"""
#: The lane of document 4 has not ended, so that nobody can say yet what became of its attempt.
UNHEARD = """
    DELETE FROM attempt_unknown WHERE document_no = 4;
    UPDATE lane SET ended_at = NULL
    WHERE lane_id = (SELECT lane_id FROM attempt_intent WHERE document_no = 4 AND attempt_no = 1)
"""


@pytest.fixture
async def happened(ledger: Ledger) -> None:
    """The usual run, in September by the provider's clock, whatever this machine's says."""
    await run_everything(ledger)


def judge(statement: Statement, scope: Scope = RUN) -> Callable[[Ours], Sequence[Bookable]]:
    return lambda ours: compare(ours, statement, scope).bookable


def compare(ours: Ours, statement: Statement, scope: Scope = RUN) -> Reconciliation:
    """With an export that is known to have all of its hour, of an account that nobody else uses."""
    return reconcile(
        ours.booked,
        ours.unsettled,
        statement,
        BOOK,
        scope.currency,
        ours.days,
        is_complete=True,
        is_alone=True,
        shared=ours.shared,
    )


async def close(url: str, statement: Statement, scope: Scope = RUN) -> tuple[Bookable, ...]:
    """Find what is proved, agree, and book it."""
    async with opened(SecretStr(url), Role.BOOKKEEPER) as ledger:
        agreed = tuple(judge(statement, scope)(await books.find_ours(ledger, scope)))
        await books.book_closings(ledger, scope, agreed, judge(statement, scope))
        return agreed


@dataclass(frozen=True)
class Seen:
    """What an auditor and a proof find."""

    cost_pico: int
    unknown_pico: int
    unknown_attempts: int
    is_proved: bool


async def look(url: str) -> Seen:
    async with opened(SecretStr(url), Role.LANE) as ledger:
        found, proof = await audit(ledger, run=1), await prove(ledger, RunId(1), BOOK)
        shown, listed = await progress(ledger, 1), (await list_runs(ledger))[0]
    for each in (shown, listed):
        assert (each.cost_pico, each.unknown_pico) == (found.cost_pico, found.unknown_pico)
    costs = found.token_costs
    assert costs.hit_pico + costs.miss_pico + costs.output_pico == found.cost_pico
    return Seen(found.cost_pico, found.unknown_pico, found.unknown_attempts, proof.proved)


@pytest.mark.usefixtures("happened")
async def test_what_the_export_has_beyond_the_known_closes_the_unknown_to_the_pico(
    ledger_url: str, tmp_path: Path
) -> None:
    statement = export(tmp_path / "usage_data_2026-09.zip", [*KNOWN, (FLASH, LOST)])
    known = 5 * COST + PRO_COST
    assert await look(ledger_url) == Seen(known, 2 * RESERVED, 2, True)
    both = "attempt_intent LEFT JOIN attempt_outcome USING (run_id, document_no, attempt_no)"
    rows = f"SELECT * FROM {both} ORDER BY 1, 2, 3"
    before = sql(ledger_url, rows)
    closings = await close(ledger_url, statement)
    assert all(isinstance(each, Closing) for each in closings)
    assert sql(ledger_url, "SELECT document_no, attempt_no FROM cost_adjustment ORDER BY 1") == [(2, 1), (4, 1)]
    assert sum(each.amount_pico for each in closings) == LOST_COST
    assert await look(ledger_url) == Seen(known + LOST_COST, 0, 0, True)
    assert sql(ledger_url, rows) == before
    for view in ("document_cost", "document_spend", "tier_cost", "job_cost_by_day WHERE day = '2026-09-26'"):
        assert value(ledger_url, f"SELECT sum(cost_pico) FROM {view}") == known + LOST_COST
    row = sql(ledger_url, "SELECT evidence, adjusted_by, billed_on FROM cost_adjustment ORDER BY adjustment_id")[0]
    assert row[0].startswith("usage_data_2026-09.zip (sha256:")
    assert "128 hit, 701 miss and 7 output tokens beyond the known, shared by 2 attempts in proportion" in row[0]
    assert row[1:] == ("farthing", date(2026, 9, 26))


@pytest.mark.usefixtures("happened")
async def test_who_reconciles_twice_or_at_once_books_once(ledger_url: str, tmp_path: Path) -> None:
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    async with opened(SecretStr(ledger_url), Role.BOOKKEEPER, pool_size=10) as ledger:
        prove = judge(statement)
        agreed = prove(await books.find_ours(ledger, RUN))
        booking = [books.book_closings(ledger, RUN, agreed, prove) for _ in range(5)]
        came = await asyncio.gather(*booking, return_exceptions=True)
    refused = [str(each) for each in came if isinstance(each, ConfigurationError)]
    assert (came.count(None), ["nothing was booked; run it again" in each for each in refused]) == (1, 4 * [True])
    assert value(ledger_url, "SELECT count(*) FROM cost_adjustment") == 2
    assert await close(ledger_url, statement) == ()
    assert await look(ledger_url) == Seen(5 * COST + PRO_COST + LOST_COST, 0, 0, True)


@pytest.mark.usefixtures("happened")
async def test_what_is_booked_is_judged_by_one_snapshot_however_long_that_takes(
    ledger_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that comes while we read is not taken for what the export has of another attempt."""
    monkeypatch.setattr(connection, "_SESSION", ("idle_in_transaction_session_timeout TO '500ms'",))
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    came = []

    def reply(reading: Connection, _: object, statement: str, *__: object) -> None:
        if "FROM unsettled" in statement and not came:
            came.append(sql(ledger_url, LATE_REPLY))
            reading.exec_driver_sql("SELECT pg_sleep(1)")

    async with opened(SecretStr(ledger_url), Role.BOOKKEEPER) as ledger:
        agreed = judge(statement)(await books.find_ours(ledger, RUN))
        event.listen(ledger.engine.sync_engine, "after_cursor_execute", reply)
        await books.book_closings(ledger, RUN, agreed, judge(statement))
    assert (len(came), value(ledger_url, "SELECT count(*) FROM cost_adjustment")) == (1, 2)


BOOKS = """
import asyncio, sys
from pathlib import Path
from tests.integration.test_books import SEPTEMBER, close, freeze
from tasks.statements import load_statement
url, step, *files = sys.argv[1:]
work = close(url, load_statement([Path(files[0])])) if step == "book_closings" else freeze(url)
asyncio.run(work)
"""


@pytest.mark.usefixtures("happened")
@pytest.mark.parametrize("step", ["book_closings", "close_month"])
async def test_killed_around_its_commit_it_is_done_once(step: str, ledger_url: str, tmp_path: Path) -> None:
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    if step == "close_month":
        await close(ledger_url, statement)
    table = {"book_closings": "cost_adjustment", "close_month": "month_close"}[step]
    rows = {"book_closings": 2, "close_month": 1}[step]
    for side, found in (("before", 0), ("after", rows)):
        done = subprocess.run(
            [sys.executable, "-c", BOOKS, ledger_url, step, str(tmp_path / "e.zip")],
            cwd=ROOT,
            env=os.environ | {VARIABLE: f"{step}.{side}_commit"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == KILLED, done.stderr
        assert value(ledger_url, f"SELECT count(*) FROM {table}") == found
    assert (await look(ledger_url)).is_proved


@pytest.mark.usefixtures("happened")
async def test_a_reply_that_comes_late_overrides_what_an_export_told_and_the_others_shares_are_corrected(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    """It says more than its share was: the other attempt's was too much by that. Nothing that is booked changes."""
    lost = Usage(640 + 9, 100 + 701, 5 + 7)  # the late reply's tokens, and the other's
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, lost)])
    await close(ledger_url, statement)
    rows = sql(ledger_url, "SELECT * FROM cost_adjustment ORDER BY adjustment_id")
    shares = dict(sql(ledger_url, "SELECT document_no, amount FROM cost_adjustment"))
    sql(ledger_url, LATE_REPLY)
    found = await audit(ledger, run=1)
    assert (found.cost_pico, found.unknown_pico) == (6 * COST + PRO_COST + shares[2], 0)
    off = compare(await books.find_ours(ledger, RUN), statement)
    assert (off.is_clean, off.doubtful, len(off.corrections)) == (False, (), 1)
    (correction,) = await close(ledger_url, statement)
    assert isinstance(correction, Correction)
    right = 9 * 3_000 + 701 * 150_000 + 7 * 600_000
    assert correction.amount_pico == right - shares[2] != 0
    assert sql(ledger_url, "SELECT * FROM cost_adjustment ORDER BY adjustment_id")[:2] == rows
    assert "since a late reply overrode a share" in value(
        ledger_url, "SELECT evidence FROM cost_adjustment WHERE corrected_price_id IS NOT NULL"
    )
    for scope in (RUN, SEPTEMBER):
        after = compare(await books.find_ours(ledger, scope), statement, scope)
        assert (after.is_clean, after.theirs_pico - after.ours_pico, after.bookable) == (True, 0, ())
    found = await audit(ledger, run=1)
    assert found.cost_pico + found.adjusted_pico == 6 * COST + PRO_COST + right
    assert (await prove(ledger, RunId(1), BOOK)).evidence["G7"].violations == ()
    assert await close(ledger_url, statement) == ()


@pytest.mark.usefixtures("happened")
async def test_when_replies_came_for_all_of_them_nothing_is_left_of_the_shares(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    """The second one late, too, after the first was corrected for: its correction is taken back."""
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, Usage(2 * 640, 2 * 100, 2 * 5))])
    await close(ledger_url, statement)
    sql(ledger_url, LATE_REPLY)
    await close(ledger_url, statement)
    sql(ledger_url, "DELETE FROM attempt_outcome WHERE document_no = 2 AND attempt_no = 1")
    sql(ledger_url, LATE_REPLY.replace("4, 1", "2, 1"))
    await close(ledger_url, statement)
    after = compare(await books.find_ours(ledger, RUN), statement)
    assert (after.is_clean, after.theirs_pico - after.ours_pico, after.bookable) == (True, 0, ())
    found = await audit(ledger, run=1)
    assert (found.cost_pico, found.adjusted_pico) == (7 * COST + PRO_COST, 0)


@pytest.mark.usefixtures("happened")
async def test_what_the_export_cannot_explain_is_not_corrected(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    """The reply that came late says more than the export has of all of them."""
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    await close(ledger_url, statement)
    sql(ledger_url, LATE_REPLY)
    again = compare(await books.find_ours(ledger, RUN), statement)
    assert (again.is_clean, again.bookable, again.doubtful) == (False, (), (date(2026, 9, 26),))


@pytest.mark.usefixtures("happened")
async def test_a_changed_correction_is_named(ledger: Ledger, ledger_url: str, tmp_path: Path) -> None:
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, Usage(2 * 640, 2 * 100, 2 * 5 + 1))])
    await close(ledger_url, statement)
    sql(ledger_url, LATE_REPLY)
    assert len(await close(ledger_url, statement)) == 1
    sql(ledger_url, "UPDATE cost_adjustment SET amount = amount - 1 WHERE corrected_price_id IS NOT NULL")
    (named,) = (await prove(ledger, RunId(1), BOOK)).evidence["G7"].violations
    assert named.startswith("cost_adjustment 3 of run 1: ")


@pytest.mark.usefixtures("happened")
def test_only_what_corrects_an_export_has_negative_tokens(ledger_url: str) -> None:
    row = """INSERT INTO cost_adjustment (run_id, amount, evidence, hit, miss, output, billed_on, corrected_price_id)
             VALUES (1, -5, 'e', 0, -1, 0, '2026-09-26', {})"""
    with pytest.raises(psycopg.errors.CheckViolation):
        sql(ledger_url, row.format("NULL"))
    sql(ledger_url, row.format("1"))


@pytest.mark.usefixtures("happened")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("amount = amount + 1", "tokens at"),
        ("output = output + 1", "tokens at"),
        ("amount = amount * 100, miss = miss * 100, hit = hit * 100, output = output * 100", "above the bound of"),
        ("attempt_no = 2", "was never declared unknown"),
        ("evidence = ''", "it has no evidence"),
    ],
)
async def test_a_changed_closing_is_named(
    change: str, named: str, ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    await close(ledger_url, export(tmp_path / "e.zip", [*KNOWN, (FLASH, Usage(1, 5_000, 900))]))
    sql(ledger_url, f"UPDATE cost_adjustment SET {change} WHERE document_no = 4")
    violations = (await prove(ledger, RunId(1), BOOK)).evidence["G7"].violations
    assert [each for each in violations if each.startswith("cost_adjustment") and named in each] != []


@pytest.mark.usefixtures("happened")
async def test_only_the_bookkeeper_books_and_not_who_or_when(ledger: Ledger, ledger_url: str, tmp_path: Path) -> None:
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    with pytest.raises(PermissionRefused):
        await books.book_closings(ledger, RUN, judge(statement)(await books.find_ours(ledger, RUN)), judge(statement))
    with psycopg.connect(ledger_url, autocommit=True, options="-c search_path=farthing") as connection:
        connection.execute("SET ROLE farthing_bookkeeper")
        for attack in (
            "INSERT INTO cost_adjustment (run_id, amount, evidence, adjusted_by) VALUES (1, 1, 'x', 'somebody else')",
            "INSERT INTO cost_adjustment (run_id, amount, evidence, adjusted_at) VALUES (1, 1, 'x', '2020-01-01')",
            "UPDATE cost_adjustment SET amount = 0",
            "DELETE FROM cost_adjustment",
            "UPDATE month_close SET cost = 0",
            "INSERT INTO attempt_outcome SELECT * FROM attempt_outcome",
            "SELECT FROM document",
            "SELECT FROM answer",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(attack)


# --- months ------------------------------------------------------------------------------------------------------


async def freeze(url: str, *, with_unknown: bool = False) -> object:
    async with opened(SecretStr(url), Role.BOOKKEEPER) as ledger:
        return await books.close_month(ledger, SEPTEMBER, with_unknown=with_unknown)


@pytest.mark.usefixtures("happened")
async def test_a_closed_month_stays_what_it_was_and_what_comes_late_is_shown(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"2 attempts of 2026-09 may have been billed.*reconcile 2026-09"):
        await freeze(ledger_url)
    await freeze(ledger_url, with_unknown=True)
    with pytest.raises(ConfigurationError, match=r"was closed by farthing on .*farthing verify 2026-09"):
        await freeze(ledger_url, with_unknown=True)
    checked = await books.find_checked_month(ledger, SEPTEMBER)
    assert (checked.differences, checked.late) == ((), ())
    was = checked.closed.books
    assert (was.cost_pico, was.rows, was.unknown_pico) == (5 * COST + PRO_COST, 6, 2 * RESERVED)
    await close(ledger_url, export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)]), SEPTEMBER)
    checked = await books.find_checked_month(ledger, SEPTEMBER)
    assert checked.differences == ()
    assert [(each.run, each.rows, each.cost_pico) for each in checked.late] == [(1, 2, LOST_COST)]
    assert checked.closed.books == was


@pytest.mark.usefixtures("happened")
async def test_another_price_book_moves_no_closed_month_and_prices_it_in_a_column_of_its_own(
    ledger: Ledger, ledger_url: str
) -> None:
    await freeze(ledger_url, with_unknown=True)
    past = await find_past(ledger, 1, BOOK)
    again = reprice(past, Scenario(prices_at=AT.replace(month=8, day=20)), BOOK)
    assert again.cost_pico != past.cost_pico == 5 * COST + PRO_COST
    assert reprice(past, Scenario(), BOOK).cost_pico == past.cost_pico
    sql(
        ledger_url,
        "INSERT INTO price (name, model, currency, band, valid_from, hit_pico, miss_pico, output_pico)"
        " VALUES ('later', 'deepseek-flash', 'USD', 'flat', '2026-09-01', 1, 1, 1)",
    )
    checked = await books.find_checked_month(ledger, SEPTEMBER)
    assert (checked.differences, checked.late) == ((), ())


@pytest.mark.usefixtures("happened")
@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("UPDATE attempt_outcome SET cost = cost + 1 WHERE document_no = 0", "run 1: closed with 6 rows of"),
        ("UPDATE attempt_outcome SET hit = hit - 1, miss = miss + 1 WHERE document_no = 0", "run 1: closed with"),
        ("DELETE FROM attempt_outcome WHERE document_no = 0", "5 rows of"),
        ("UPDATE price SET hit_pico = 1", "run 1: closed with"),
        ("UPDATE month_close SET runs = jsonb_set(runs, '{0,cost_pico}', '1')", "month 2026-09: its digest is"),
    ],
)
async def test_what_was_changed_in_a_closed_month_is_named(
    tampering: str, named: str, ledger: Ledger, ledger_url: str
) -> None:
    await freeze(ledger_url, with_unknown=True)
    sql(ledger_url, tampering)
    checked = await books.find_checked_month(ledger, SEPTEMBER)
    assert [each for each in checked.differences if named in each] != []


@pytest.mark.usefixtures("happened")
async def test_a_month_that_is_not_over_or_under_work_is_not_closed(ledger: Ledger, ledger_url: str) -> None:
    ahead = Scope(None, Month(date(2126, 9, 1)), Currency.USD, is_simulated=False)
    async with opened(SecretStr(ledger_url), Role.BOOKKEEPER) as bookkeeper:
        with pytest.raises(ConfigurationError, match="2126-09 is not over before 2126-10-01 00:00 UTC"):
            await books.close_month(bookkeeper, ahead, with_unknown=True)
    sql(ledger_url, UNHEARD)
    with pytest.raises(ConfigurationError, match="a run is not done with attempts of 2026-09"):
        await freeze(ledger_url, with_unknown=True)


@pytest.mark.usefixtures("happened")
async def test_an_attempt_under_way_is_left_alone(ledger: Ledger, ledger_url: str, tmp_path: Path) -> None:
    statement = export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    sql(ledger_url, "UPDATE run SET state = 'paused'")  # replies may wait in a file, until it is resumed
    assert judge(statement)(await books.find_ours(ledger, RUN)) == ()
    sql(ledger_url, "UPDATE run SET state = 'done'")
    assert len(judge(statement)(await books.find_ours(ledger, RUN))) == 2
    sql(ledger_url, UNHEARD)
    ours = await books.find_ours(ledger, RUN)
    found = compare(ours, statement)
    assert found.closings == ()  # what the other one was billed, nobody can tell from what this one may be
    assert {why: left[0].document_no for why, left in found.left.items()} == {
        next(why for why in found.left if "resume it, or let it end" in why): 4,
        "others that stay unknown may have been billed on that day, too": 2,
    }
    assert {each.status for each in found.matches if each.key.model == PRO[0]} == {Status.MATCHED}


@pytest.mark.usefixtures("happened")
async def test_a_reply_that_is_being_recorded_is_waited_for_and_in_the_closed_month(
    ledger: Ledger, ledger_url: str
) -> None:
    """It is stamped before the close and committed after: it must not be in none of both."""
    options = "-c search_path=farthing"
    with psycopg.connect(ledger_url, options=options) as lane:
        lane.execute(LATE_REPLY)
        closing = asyncio.create_task(freeze(ledger_url, with_unknown=True))
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'farthing.attempt_outcome'::regclass"
        )
        while not closing.done() and not value(ledger_url, waiting):
            await asyncio.sleep(0.02)
        lane.commit()
    await closing
    checked = await books.find_checked_month(ledger, SEPTEMBER)
    assert (checked.differences, checked.late, checked.closed.books.rows) == ((), (), 7)


@pytest.mark.usefixtures("happened")
async def test_of_a_ledger_in_two_currencies_a_month_is_named_with_one(ledger: Ledger, ledger_url: str) -> None:
    kept = value(
        ledger_url,
        "SELECT string_agg(column_name, ', ') FROM information_schema.columns WHERE table_schema = 'farthing'"
        " AND table_name = 'run' AND column_name NOT IN ('run_id', 'currency')",
    )
    sql(ledger_url, f"INSERT INTO run (currency, {kept}) SELECT 'CNY', {kept} FROM run")
    month = SEPTEMBER.month

    async def find(stated: Currency | None) -> Scope:
        return await books.find_scope(ledger, None, month, stated, is_simulated=False, has_export=False)

    with pytest.raises(ConfigurationError, match=r"real runs in CNY, USD: say --currency C"):
        await find(None)
    assert await find(Currency.USD) == SEPTEMBER
    assert (await find(Currency.CNY)).currency is Currency.CNY


#: Another run took the place of this one, whose lane died with an attempt in flight.
SUPERSEDED = f"""
    {UNHEARD};
    UPDATE lane SET heartbeat_at = now() - interval '1 hour' WHERE ended_at IS NULL;
    UPDATE shard SET state = 'leased', lane_id = (SELECT lane_id FROM lane WHERE ended_at IS NULL) WHERE shard_no = 1;
    UPDATE run SET state = 'superseded'
"""


def test_what_a_superseded_run_left_open_is_closed_with_the_rest(
    ledger_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def happen() -> None:
        async with lane_ledger(ledger_url) as ledger:
            await run_everything(ledger)

    asyncio.run(happen())
    sql(ledger_url, SUPERSEDED)
    export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)])
    monkeypatch.setenv("FARTHING_DATABASE_URL", ledger_url)
    for options, left, closed in (([], 2, 0), (["--close", "--yes"], 0, 2)):
        command = ["reconcile", "1", str(tmp_path / "e.zip"), "--complete", "--alone", "--json"]
        monkeypatch.setattr(sys, "argv", ["farthing", *command, *options])
        with pytest.raises(SystemExit):
            farthing.main()
        told = json.loads(capsys.readouterr().out)
        assert (sum(each["attempts"] for each in told["left"]), told["closed"]["attempts"]) == (left, closed)
    assert told["off_pico"] == 0


def at_version(url: str, version: str) -> None:
    """An empty database with the tables of that migration."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(ROOT / "migrations"))
        command.upgrade(config, version)


def test_a_correction_that_names_an_attempt_from_before_is_no_obstacle_to_an_upgrade(postgres: Server) -> None:
    name = f"before_{uuid.uuid4().hex}"
    url = create_database(postgres, name)
    at_version(url, "0009")
    sql(url, OLD_CORRECTION)
    sql(url, OLD_CORRECTION)
    upgrade(SecretStr(url))
    assert value(url, "SELECT sum(amount) FROM cost_adjustment") == 10
    with pytest.raises(psycopg.errors.CheckViolation):
        sql(url, OLD_CORRECTION)
    drop_database(postgres, name)


@pytest.mark.usefixtures("happened")
async def test_such_a_correction_stays_one_beside_the_cost(ledger: Ledger, ledger_url: str, tmp_path: Path) -> None:
    sql(ledger_url, "ALTER TABLE cost_adjustment DROP CONSTRAINT cost_adjustment_check")
    sql(ledger_url, OLD_CORRECTION)
    sql(ledger_url, OLD_CORRECTION)
    known = 5 * COST + PRO_COST
    assert await look(ledger_url) == Seen(known, 2 * RESERVED, 2, True)
    await close(ledger_url, export(tmp_path / "e.zip", [*KNOWN, (FLASH, LOST)]))
    assert await look(ledger_url) == Seen(known + LOST_COST, 0, 0, True)
    assert value(ledger_url, "SELECT adjusted_pico FROM run_cost") == 10
    sources = "SELECT source, count(*)::int FROM booked GROUP BY source ORDER BY source"
    assert sql(ledger_url, sources) == [("correction", 2), ("export", 2), ("reply", 6)]
    assert (await audit(ledger, run=1)).cost_pico == known + LOST_COST
