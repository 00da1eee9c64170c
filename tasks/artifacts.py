"""What a run's page in Prefect shows: its progress while it works, its costs and its report when it ends.

Prefect only shows: if its server is away, the run goes on and the log says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)

from schemas.inert import escape_markdown, plain
from schemas.money import Currency, Money
from schemas.settings import Settings
from tasks import report
from tasks.enrichment import require_database
from tasks.ledger import spend
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.proof import Proof
from tasks.ledger.runs import Run

log = structlog.get_logger("farthing.artifacts")

#: An update costs Prefect's server 12 ms of CPU (design: prefect.md), so not too often.
EVERY_S = 5.0
#: A run that has ended does not hang on its report; `farthing audit` has it, too.
REPORT_WITHIN_S = 120.0


@asynccontextmanager
async def shown_progress(run: Run, settings: Settings) -> AsyncIterator[None]:
    """Keep a progress artifact up to date while the block lasts."""
    showing = asyncio.create_task(_show_progress(run, settings))
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def show_report(run: Run, settings: Settings) -> None:
    """Publish the cost table and the report of a run that has ended."""
    url = require_database(settings)
    try:
        async with opened(url, Role.AUDITOR, pool_size=1, answer_within_s=REPORT_WITHIN_S) as ledger:
            audit = await spend.audit(ledger, run=run.run_id, top=0)  # Prefect's pages name no document
        await acreate_table_artifact(_cost_rows(audit), key=f"run-{run.run_id}-cost", description="Cost by tier")
        await acreate_markdown_artifact(
            report.markdown(audit), key=f"run-{run.run_id}-report", description=f"Report of run {run.run_id}"
        )
    except Exception as error:
        log.warning("prefect shows no report", run=run.run_id, error=type(error).__name__)


async def show_audit(audit: spend.Audit, proofs: list[Proof]) -> None:
    """Publish the report of a job's audit, with what was proved."""
    proved = [escape_markdown(f"Run {found.run}: {report.proof_line(found)}") for found in proofs]
    try:
        await acreate_markdown_artifact(
            "\n\n".join([report.markdown(audit), *proved]),
            key=f"audit-{audit.job}".replace("_", "-"),
            description=escape_markdown(f"Audit of {audit.job}"),
        )
    except Exception as error:
        log.warning("prefect shows no audit", job=audit.job, error=type(error).__name__)


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


async def _show_progress(run: Run, settings: Settings) -> None:
    async with opened(require_database(settings), Role.AUDITOR, pool_size=1) as ledger:
        try:
            artifact_id = await acreate_progress_artifact(
                0.0, key=f"run-{run.run_id}", description=escape_markdown(run.job)
            )
            while True:
                await aupdate_progress_artifact(artifact_id, *await _progress(ledger, run))
                await asyncio.sleep(EVERY_S)
        except Exception as error:
            log.warning("prefect shows no progress", run=run.run_id, error=type(error).__name__)


async def _progress(ledger: Ledger, run: Run) -> tuple[float, str]:
    """Percent done, and the line that says the rest."""
    now = await spend.progress(ledger, run.run_id)
    spent = Money(now.cost_pico, run.currency)
    words = [f"{now.done:,} of {now.documents:,} documents", f"{spent} spent", f"{now.in_flight} in flight"]
    if now.waiting_because:
        words.append(f"waiting: {now.waiting_because}")
    return 100 * now.done / max(1, now.documents), escape_markdown(" · ".join(words))


def _cost_rows(audit: spend.Audit) -> list[dict[str, object]]:
    """One row per tier; sums as text, since Prefect's table would print integers of pico units."""
    currency = Currency(audit.currency or Currency.USD)
    return [
        {
            "tier": plain(name),
            "attempts": tier.attempts,
            "results": tier.results,
            "cost": str(Money(tier.cost_pico, currency)),
            "at most, of unknown": str(Money(tier.unknown_pico, currency)),
        }
        for name, tier in audit.tiers.items()
    ]
