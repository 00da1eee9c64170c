"""What a run's page in Prefect shows: its progress while it works, its costs and its report when it ends.

Prefect only shows: if its server is away, the run goes on and the log says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from urllib.parse import quote

import structlog
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)

from schemas.attempts import RunId
from schemas.inert import escape_markdown
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from schemas.promises import Promise
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import report
from tasks.calibration_report import calibration_markdown
from tasks.comparison_report import comparison_markdown
from tasks.comparisons import Field, conclude
from tasks.enrichment import require_database
from tasks.ledger import spend
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.proof import Proof
from tasks.ledger.runs import Run
from tasks.pages import find_page, publish_page
from tasks.pilots import recall_calibration
from tasks.steps import fit_to_be_stored

log = structlog.get_logger("farthing.artifacts")

#: An update costs Prefect's server 12 ms of CPU (design: prefect.md), so not too often.
EVERY_S = 5.0
#: A run that has ended does not hang on its report; `farthing audit` has it, too.
REPORT_WITHIN_S = 120.0
LAST_LOOK_S = 10.0


@asynccontextmanager
async def shown_progress(run: Run, settings: Settings) -> AsyncIterator[None]:
    """Keep a progress artifact up to date while the block lasts, and have it say at last how the run ended."""
    over = asyncio.Event()
    showing = asyncio.create_task(_show_progress(run, settings, over))
    try:
        yield
    finally:
        over.set()
        try:
            await asyncio.wait([showing], timeout=LAST_LOOK_S)
        finally:
            showing.cancel()


async def show_report(run: Run, settings: Settings) -> None:
    """Publish the tables of costs and escalations, and the report, of a run that has ended."""
    url = require_database(settings)
    try:
        async with opened(url, Role.AUDITOR, pool_size=1, answer_within_s=REPORT_WITHIN_S) as ledger:
            audit = await spend.audit(ledger, run=run.run_id, top=0)  # Prefect's pages name no document
        for name, part in (("cost", report.tiers(audit)), ("escalations", report.escalations(audit))):
            if part.rows:
                rows = report.cells(part.columns, part.rows)
                await acreate_table_artifact(rows, key=f"run-{run.run_id}-{name}", description=part.title)
        await acreate_markdown_artifact(
            "\n\n".join([*await leave_page(settings, run=run.run_id), report.markdown(audit)]),
            key=f"run-{run.run_id}-report",
            description=f"Report of run {run.run_id}",
        )
    except Exception as error:
        log.warning("prefect shows no report", run=run.run_id, error=type(error).__name__)


async def show_audit(audit: spend.Audit, proofs: list[Proof], settings: Settings) -> None:
    """Publish the report of a job's audit, with what was proved."""
    proved = [escape_markdown(f"Run {found.run}: {report.proof_line(found)}") for found in proofs]
    try:
        await acreate_markdown_artifact(
            "\n\n".join([*await leave_page(settings, tuple(proofs), job=audit.job), report.markdown(audit), *proved]),
            key=f"audit-{audit.job}".replace("_", "-"),
            description=escape_markdown(f"Audit of {audit.job}"),
        )
    except Exception as error:
        log.warning("prefect shows no audit", job=audit.job, error=type(error).__name__)


async def show_calibration(request: RunRequest, run_id: RunId, promise: Promise, settings: Settings) -> None:
    """Publish what follows from a pilot that is done. It is all that its flow is for, so the flow fails without."""
    with fit_to_be_stored():
        found = await recall_calibration(request, settings, run_id, promise)
        await acreate_markdown_artifact(
            calibration_markdown(found),
            key=f"run-{run_id}-calibration",
            description=f"What the pilot, run {run_id}, says",
        )


async def show_comparison(field: Field, settings: Settings) -> None:
    """Publish what variants come to that have all been asked. It is all that its flow is for."""
    with fit_to_be_stored():
        found = await conclude(field, settings)
        await acreate_markdown_artifact(
            comparison_markdown(found),
            key=f"compare-{found.job}".replace("_", "-"),
            description=escape_markdown(f"Variants of {found.job}, compared"),
        )


async def leave_page(
    settings: Settings, proofs: tuple[Proof, ...] = (), *, run: int | None = None, job: str | None = None
) -> list[str]:
    """Leave the report page where reports are kept, and say where, in markdown; nothing where none are kept.

    It names no document, since whoever sees Prefect's pages may see it.
    """
    if settings.reports is None:
        return []
    url, book = require_database(settings), load_price_book(settings.prices)
    try:
        page = await find_page(url, book, run=run, job=job, top=0, answer_within_s=REPORT_WITHIN_S)
        name = f"job-{job}.html" if run is None else f"run-{run}.html"
        place = publish_page(replace(page, proofs=page.proofs or proofs), name, settings)
    except Exception as error:
        log.warning("no report page was left", run=run, job=job, error=type(error).__name__)
        return []
    if settings.reports_url:
        return [f"[The report page]({quote(place, safe=':/?=&%')})"]
    return [f"The report page: {escape_markdown(place)}"]


async def show_backfill(backfill_id: int, settings: Settings) -> None:
    """Publish the table of a backfill's partitions, once it has ended."""
    url = require_database(settings)
    try:
        async with opened(url, Role.AUDITOR, pool_size=1, answer_within_s=REPORT_WITHIN_S) as ledger:
            found = await spend.list_backfill(ledger, backfill_id)
        currency = Currency(found[0].currency) if found else Currency.USD
        await acreate_table_artifact(
            report.partition_rows(spend.by_partition(found), currency),
            key=f"backfill-{backfill_id}",
            description="Partitions of this backfill",
        )
    except Exception as error:
        log.warning("prefect shows no partitions", backfill=backfill_id, error=type(error).__name__)


async def _show_progress(run: Run, settings: Settings, over: asyncio.Event) -> None:
    """Look now and then, and once more when it is over."""
    try:
        async with opened(require_database(settings), Role.AUDITOR, pool_size=1) as ledger:
            artifact_id = await acreate_progress_artifact(
                0.0, key=f"run-{run.run_id}", description=escape_markdown(run.job)
            )
            while not over.is_set():
                await aupdate_progress_artifact(artifact_id, *await _progress(ledger, run))
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), EVERY_S)
            await aupdate_progress_artifact(artifact_id, *await _progress(ledger, run))
    except Exception as error:
        log.warning("prefect shows no progress", run=run.run_id, error=type(error).__name__)


async def _progress(ledger: Ledger, run: Run) -> tuple[float, str]:
    """Percent done, and the line that says the rest."""
    now = await spend.progress(ledger, run.run_id)
    spent = Money(now.cost_pico, run.currency)
    words = [f"{now.done:,} of {now.documents:,} documents", f"{spent} spent"]
    if now.state != "running":
        words.append(now.waiting_because or now.state)
    elif now.lanes:  # else its lanes are on their way
        words.append(f"{now.in_flight} in flight")
        words += [f"waiting: {now.waiting_because}"] if now.waiting_because else []
    return 100 * now.done / max(1, now.documents), escape_markdown(" · ".join(words))
