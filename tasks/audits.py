"""The steps of an audit as Prefect shows them: a job's figures, and a proof of each of its latest runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from schemas.errors import LedgerMismatch
from schemas.pricing import load_price_book
from schemas.settings import Settings
from tasks.enrichment import require_database
from tasks.ledger import proof, spend
from tasks.ledger.connection import Role, opened
from tasks.ledger.proof import Proof
from tasks.ledger.spend import Audit
from tasks.steps import fit_to_be_stored


@task(name="add up", cache_policy=NO_CACHE, persist_result=False)
async def add_up(job: str) -> Audit:
    """What all runs of the job cost, by the ledger's views. Raises ConfigurationError where it never ran."""
    with fit_to_be_stored():
        async with opened(require_database(Settings()), Role.AUDITOR, pool_size=1) as ledger:
            return await spend.audit(ledger, job=job, top=0)  # Prefect's pages name no document


@task(name="prove", cache_policy=NO_CACHE, persist_result=False)
async def prove_runs(job: str, days: int) -> list[Proof]:
    """A proof of each run of the job that was opened in the last `days`, newest first, from the rows themselves."""
    since = datetime.now(UTC) - timedelta(days=days)
    with fit_to_be_stored():
        settings = Settings()
        async with opened(require_database(settings), Role.LANE, pool_size=1) as ledger:
            recent = [run for run in await spend.list_runs(ledger, job) if run.opened_at >= since]
            return [await proof.prove(ledger, run.run, load_price_book(settings.prices)) for run in recent]


def verdict(audit: Audit, proofs: list[Proof]) -> dict[str, Any]:
    """What the flow returns: plain values, since Prefect hands them on. Raises LedgerMismatch."""
    if broken := [found.run for found in proofs if not found.proved]:
        raise LedgerMismatch(f"the ledger does not prove {_runs(broken)}: see `farthing verify {broken[0]}`")
    return {
        "job": audit.job,
        "cost_pico": audit.cost_pico,
        "unknown_pico": audit.unknown_pico,
        "currency": audit.currency,
        "proved": [found.run for found in proofs],
    }


def _runs(numbers: list[int]) -> str:
    return f"run {numbers[0]}" if len(numbers) == 1 else f"runs {', '.join(map(str, numbers))}"
