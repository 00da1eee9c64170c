"""compare: a job and variants of it, each asked the same sample → what the differences are worth.

Running it again goes on, and asks nothing that was answered; the truth is in Postgres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from schemas.jobs import When
from schemas.requests import USUAL_PILOT, CompareRequest, RunRequest
from schemas.settings import Settings
from tasks.announcements import announced
from tasks.artifacts import show_comparison, show_report, shown_progress
from tasks.enrichment import paused_if_cut_short
from tasks.final_states import Final, final
from tasks.logs import configure, follow_in_prefect
from tasks.prefect_server import guard_temporary_server
from tasks.steps import cap_entrant, draw_field, open_run, settle_run, work_lanes
from tasks.telemetry import traced


@flow(name="compare", flow_run_name="compare-{job}", retries=0, persist_result=False)
async def compare(
    job: str,
    variants: list[str] | None = None,
    against: list[int] | None = None,
    sample: int = USUAL_PILOT,
    partitions: list[str] | None = None,
    limit: int | None = None,
    budget: str | None = None,
    root: str = ".",
    when: When | None = None,
) -> Final:
    """Have a job and variants of it answer one sample of its input, one after the other, and publish the differences.

    `variants` are files: other prompts, or YAML with the keys of the job that they change. `against` are runs of the
    job that were paid for. `budget` is like "2 USD" and caps all of it (default: the job's). The rest: as in enrich.
    """
    request = CompareRequest(
        job=job,
        variants=tuple(variants or ()),
        against=tuple(against or ()),
        sample=sample,
        partitions=tuple(partitions or ()),
        limit=limit,
        budget=budget,
        root=Path(root),
        when=when,
    )
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    guard_temporary_server()
    field = await draw_field(request)
    outcome: dict[str, Any] = {"run_id": None, "state": "done", "reason": None, "advice": ""}
    for entrant in field.missing:
        outcome = await _ask(await cap_entrant(field, entrant), settings)
        if outcome["state"] != "done":
            return final(outcome)
    await show_comparison(field, settings)
    return final(outcome | {"advice": ""})  # a variant that fails too often is what was asked for


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
