"""Pilots: what the ledger has of one, as what follows from it. Nothing is sent in here."""

from __future__ import annotations

from schemas.attempts import RunId
from schemas.calibrations import Calibration, calibrate
from schemas.errors import InputChanged
from schemas.jobs import Job
from schemas.promises import Promise
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import enrichment, samples
from tasks.jobs import load_asked
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_sample
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.pilots import find_pilot
from tasks.samples import DrawnSample


async def find_calibration(
    ledger: Ledger, job: Job, drawn: DrawnSample, run_id: RunId, promise: Promise
) -> Calibration:
    """What the pilot that was drawn says by its run, which is done."""
    return calibrate(job, await find_pilot(ledger, run_id, job, drawn.sample.documents), promise)


async def find_done(request: RunRequest, settings: Settings) -> RunId | None:
    """The run that has asked what this request would, and is done. None: there is none."""
    job = load_asked(request)
    drawn = await samples.draw(job, request, settings)
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        return await find_sample(ledger, drawn.opening)


async def recall_calibration(request: RunRequest, settings: Settings, run_id: RunId, promise: Promise) -> Calibration:
    """The same for whoever knows only what was asked for: draws again. Raises InputChanged where that is another."""
    job = load_asked(request)
    drawn = await samples.draw(job, request, settings)
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        if await find_sample(ledger, drawn.opening) != run_id:
            raise InputChanged(f"the input changed since run {run_id} asked its documents: calibrate again")
        return await find_calibration(ledger, job, drawn, run_id, promise)
