"""lane: one lane of a run, wherever a worker of Prefect's is. The flow that opened the run starts it, not people."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from schemas.requests import LaneRequest
from tasks.final_states import Final, lane_final
from tasks.steps import work_elsewhere


@flow(name="lane", flow_run_name="run-{asked.run_id}-lane-{asked.number}", retries=0, persist_result=False)
async def lane(asked: LaneRequest) -> Final:
    """Work on a run until nothing is left for this lane, or something makes it drain.

    Keys, database and provider come from the environment of the worker. Completed where nothing was left; else
    Unfinished, with the reason.
    """
    return lane_final(await work_elsewhere(asked, shown_as=flow_run.id))
