"""audit: what a job has cost so far, and a proof of its latest runs → report. Made to be scheduled, like weekly."""

from __future__ import annotations

from typing import Any

from prefect import flow

from schemas.settings import Settings
from tasks.artifacts import show_audit
from tasks.audits import add_up, prove_runs, verdict
from tasks.logs import configure, follow_in_prefect
from tasks.prefect_server import guard_temporary_server


@flow(name="audit", flow_run_name="audit-{job}", retries=0, persist_result=False)
async def audit(job: str, days: int = 7) -> dict[str, Any]:
    """Publish what all runs of a job cost, and prove those that were opened in the last `days`.

    Nothing is sent, and nothing is written to the ledger. Raises LedgerMismatch, by which the flow run fails, where
    a run does not prove. Returns the job's cost in pico units of its currency, and the runs that were proved.
    """
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    guard_temporary_server()
    found = await add_up(job)
    proofs = await prove_runs(job, days)
    await show_audit(found, proofs, settings)
    return verdict(found, proofs)
