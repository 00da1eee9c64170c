"""The steps of a run as Prefect shows them: open, lanes and their shards, settle. Each unpacks, calls, returns."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectConcurrentFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner

from schemas.attempts import RunId
from schemas.errors import FarthingError, Unforeseen
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import enrichment
from tasks.lanes import INTERRUPTED, Ended
from tasks.ledger import runs
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.runs import Run
from tasks.logs import configure, follow_in_prefect

log = structlog.get_logger("farthing.steps")

LANE_DIED = "a lane's process died and nobody finished its shards: run the same command to go on"
PREFECT_GONE = "Prefect's server went away: look after it, and run the same command to go on"


@contextmanager
def fit_to_be_stored() -> Iterator[None]:
    """Prefect logs and stores what ends a task, with all that led to it: no word of that is anybody else's (G15)."""
    try:
        yield
    except (FarthingError, Unforeseen) as error:
        raise error from None
    except Exception as error:
        raise Unforeseen.of(error) from None


@task(name="open", cache_policy=NO_CACHE, persist_result=False)
async def open_run(request: RunRequest) -> Run:
    """Check everything, then resume or open the run."""
    with fit_to_be_stored():
        return await enrichment.open_run(request, Settings())


async def work_lanes(request: RunRequest, run: Run) -> list[Ended]:
    """Work on the run in this process or, with more lanes, in that many others."""
    if request.lanes == 1:
        return [await work_lane(request, run, 1)]
    async with get_client() as client:
        api = {PREFECT_API_URL: str(client.api_url)}  # else each process would start a server of its own
    with ExitStack() as stack:
        stack.enter_context(temporary_settings(api))
        stack.enter_context(enrichment.pausing_on_signals(Settings(), run))
        lanes = [_start_lane(stack, request, run, number) for number in range(1, request.lanes + 1)]
        ended = await asyncio.gather(*(asyncio.to_thread(_await_lane, lane) for lane in lanes))
    failures = [end for end in ended if isinstance(end, Exception)]
    if len(failures) == len(ended):
        raise failures[0]
    return [end if isinstance(end, Ended) else Ended("lane_died", LANE_DIED) for end in ended]


def _start_lane(
    stack: ExitStack, request: RunRequest, run: Run, lane_no: int
) -> PrefectConcurrentFuture[Coroutine[Any, Any, Ended]]:
    """A lane in a process of its own. A pool each: a pool that loses one process ends all of its others."""
    runner = stack.enter_context(ProcessPoolTaskRunner(max_workers=1, initializer=ignore_interrupts))
    return runner.submit(work_lane, {"request": request, "run": run, "lane_no": lane_no})


def _await_lane(lane: PrefectConcurrentFuture[Coroutine[Any, Any, Ended]]) -> Ended | Exception:
    """How the lane ended, or what ended it: its shards are taken over by the others."""
    try:
        return cast(Ended, lane.result())
    except Exception as error:
        log.warning("a lane's process ended", error=type(error).__name__)
        return error


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the one that started the lanes answers, by pausing the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@task(name="lane", task_run_name="lane-{lane_no}", cache_policy=NO_CACHE, persist_result=False)
async def work_lane(request: RunRequest, run: Run, lane_no: int) -> Ended:
    """Work on the run in this process until nothing is left, or something makes the lane drain."""
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    with fit_to_be_stored():
        return await enrichment.work_lane(request, settings, run, show_as_task_run)


@task(name="settle", cache_policy=NO_CACHE, persist_result=False)
async def settle_run(run: Run, ended: list[Ended]) -> dict[str, Any]:
    """Finish the run if all its shards ended, else pause it; returns the outcome."""
    with fit_to_be_stored():
        settings = Settings()
        settled = await enrichment.settle_run(settings, run, ended)
        return outcome(settled, ended, await enrichment.find_excess(settings, settled))


async def settle_unseen(run_id: int, settings: Settings) -> dict[str, Any]:
    """The outcome of a run whose Prefect server went away before it was told of one: what the ledger says."""
    ended = [Ended("prefect", PREFECT_GONE)]
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        run = await runs.find_run(ledger, RunId(run_id))
    settled = await enrichment.settle_run(settings, run, ended)
    return outcome(settled, ended, await enrichment.find_excess(settings, settled))


def outcome(run: Run, ended: list[Ended], excess: str | None) -> dict[str, Any]:
    """What the flow returns: plain values, since Prefect hands them on. `excess` is `enrichment.find_excess`'s."""
    advice = [end.advice for end in ended if end.advice and run.state != "done"]
    if run.state == "paused" and run.reason == runs.OPERATOR:
        advice = [f"`farthing pause` stopped this run: {INTERRUPTED}"]
    if run.state == "done" and excess:
        advice = [f"{excess}: `farthing audit {run.run_id}` says why"]
    return {
        "run_id": run.run_id,
        "state": run.state,
        "reason": run.reason,
        "advice": advice[0] if advice else "",
    }


async def show_as_task_run(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Await `work` inside a task run of that name. It takes no parameters: Prefect would hash and store them."""

    @task(name="shard", task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    async def shard() -> None:
        with fit_to_be_stored():
            await work()

    await shard()
