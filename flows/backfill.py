"""backfill: which partitions are due, and at what price → one run for each, bounded → report.

Running it again, by Prefect or by hand, goes on with what is left; the truth is in Postgres.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from schemas.backfills import Drift
from schemas.engines import Engine
from schemas.jobs import When
from schemas.requests import BackfillRequest
from schemas.settings import Settings
from tasks.announcements import announced_backfill
from tasks.artifacts import show_backfill
from tasks.backfills import begun, outcome
from tasks.final_states import Final, final
from tasks.logs import configure, follow_in_prefect
from tasks.partitions import work_partitions
from tasks.prefect_server import guard_temporary_server
from tasks.steps import fit_to_be_stored, require_engine


@flow(name="backfill", flow_run_name="backfill-{job}", retries=0, persist_result=False)
async def backfill(
    job: str,
    first: str | None = None,
    last: str | None = None,
    partitions: list[str] | None = None,
    changed: bool = False,
    dead: bool = False,
    if_cheaper_than: str | None = None,
    parallel: int = 2,
    lanes_on: Engine | None = None,
    budget: str | None = None,
    when: When | None = None,
    when_model_changes: Drift = Drift.PAUSE,
    root: str = ".",
) -> Final:
    """Run the partitions of a job's input that never ran or did not finish, or go on with the same backfill.

    `partitions` are names or globs, and `first` and `last` bound them, like 2026-01-01. `changed` runs those again
    whose text, prompt or model changed, `dead` those with dead letters; what can be reused costs nothing. Nothing
    starts where more than `if_cheaper_than` or `budget` is expected, both like "25 USD". `lanes_on` is processes,
    workers, dask or ray (default: FARTHING_LANES_ON). Returns the outcome.
    """
    request = BackfillRequest(
        job=job,
        first=first,
        last=last,
        partitions=tuple(partitions or ()),
        changed=changed,
        dead=dead,
        if_cheaper_than=if_cheaper_than,
        parallel=parallel,
        lanes_on=lanes_on,
        budget=budget,
        when=when,
        when_model_changes=when_model_changes,
        root=Path(root),
    )
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    guard_temporary_server()
    with fit_to_be_stored():
        await require_engine(request.engine(settings))
        async with begun(request, settings) as (plan, opened):
            if opened is None:
                return final(outcome(plan))
            async with announced_backfill(opened.backfill_id, settings):
                work = await work_partitions(request, plan, opened)
    await show_backfill(opened.backfill_id, settings)
    return final(outcome(plan, work))
