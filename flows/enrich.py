"""enrich: open the run → lanes (each primes its tiers, then claims shards) → settle → report.

Prefect starts, schedules, shows and cancels; the truth is in Postgres. Running it again resumes the run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from prefect import flow

from schemas.engines import Engine
from schemas.jobs import When
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks.announcements import announced
from tasks.artifacts import show_report, shown_progress
from tasks.enrichment import paused_if_cut_short
from tasks.final_states import Final, final
from tasks.logs import configure, follow_in_prefect
from tasks.prefect_server import guard_temporary_server
from tasks.steps import open_run, settle_run, work_lanes
from tasks.telemetry import traced


@flow(name="enrich", flow_run_name="enrich-{job}", retries=0, persist_result=False)
async def enrich(
    job: str,
    partitions: list[str] | None = None,
    limit: int | None = None,
    budget: str | None = None,
    lanes: int = 1,
    root: str = ".",
    when: When | None = None,
    finish_by: str | None = None,
    lanes_on: Engine | None = None,
    sample: int | None = None,
) -> Final:
    """Run a job over a selection of its input, or resume the run of it that did not finish.

    `budget` is like "25 USD" and overrides the job's, `when` is now or off-peak and does, too. `finish_by`, like
    08:30+08:00, waits for off-peak prices as far as there is time. `lanes_on` is processes, workers, dask or ray
    (default: FARTHING_LANES_ON). `sample` asks only so many documents, drawn at random: `farthing estimate` says
    what follows from them. Keys and database come from the environment of whatever works (DEEPSEEK_API_KEY,
    FARTHING_DATABASE_URL), never from parameters. Ends with the run's outcome: Completed only where `farthing run`
    would exit with 0.
    """
    request = RunRequest(
        job=job,
        partitions=tuple(partitions or ()),
        limit=limit,
        budget=budget,
        lanes=lanes,
        root=Path(root),
        when=when,
        finish_by=finish_by,
        lanes_on=lanes_on,
        sample=sample,
    ).settled(datetime.now(UTC))
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    guard_temporary_server()
    run = await open_run(request)
    async with (
        traced(settings, run),
        announced(run, settings),
        shown_progress(run, settings),
        paused_if_cut_short(settings, run),
    ):
        ended = await work_lanes(request, run)
        outcome = await settle_run(run, ended)
    await show_report(run, settings)
    return final(outcome)
