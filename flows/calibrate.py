"""calibrate: a pilot that the first and the last tier answer → which policy is cheapest for the job.

Running it again resumes the pilot, or asks nothing that was answered; the truth is in Postgres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from schemas.attempts import RunId
from schemas.engines import Engine
from schemas.jobs import When
from schemas.promises import Promise
from schemas.requests import USUAL_PILOT, RunRequest
from schemas.settings import Settings
from tasks.announcements import announced
from tasks.artifacts import show_calibration, show_report, shown_progress
from tasks.enrichment import paused_if_cut_short
from tasks.final_states import Final, final
from tasks.logs import configure, follow_in_prefect
from tasks.prefect_server import guard_temporary_server
from tasks.steps import open_run, recall_pilot, settle_run, work_lanes
from tasks.telemetry import traced


@flow(name="calibrate", flow_run_name="calibrate-{job}", retries=0, persist_result=False)
async def calibrate(
    job: str,
    target: str = "0.95",
    delta: str = "0.05",
    sample: int = USUAL_PILOT,
    partitions: list[str] | None = None,
    limit: int | None = None,
    budget: str | None = None,
    lanes: int = 1,
    root: str = ".",
    when: When | None = None,
    lanes_on: Engine | None = None,
) -> Final:
    """Have the first and the last tier of a job answer a sample of its input, and publish what follows from it.

    `target` is the share of answers that should be the last tier's, `delta` how likely a promise of that may fail.
    `budget` is like "2 USD" and caps the pilot (default: the job's budget). The rest is as in enrich.
    """
    promise = Promise.parse(target, delta)
    request = RunRequest(
        job=job,
        partitions=tuple(partitions or ()),
        limit=limit,
        budget=budget,
        lanes=lanes,
        root=Path(root),
        when=when,
        lanes_on=lanes_on,
        sample=sample,
        is_pilot=True,
    )
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    guard_temporary_server()
    outcome = await recall_pilot(request) or await _ask(request, settings)
    if outcome["state"] == "done":
        await show_calibration(request, RunId(outcome["run_id"]), promise, settings)
    return final(outcome)


async def _ask(request: RunRequest, settings: Settings) -> dict[str, Any]:
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
    return outcome
