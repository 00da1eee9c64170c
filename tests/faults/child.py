"""One `farthing run` in a process of its own, without Prefect and its seconds: open, work one lane, settle.

Exit codes are the command line's: 0 done, 3 paused, 2 refused; 1 is a crash, and its traceback is in the log.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.errors import FarthingError
from schemas.requests import BackfillRequest, RunRequest
from schemas.settings import Settings
from tasks import backfills, enrichment, steering
from tasks.backfills import BackfillWork, PartitionEnded
from tasks.completions import Completions, utc_now
from tasks.documents import orders
from tasks.failpoints import VARIABLE
from tasks.ledger import leases, runs
from tasks.ledger.connection import Role, opened
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tasks.ledger.runs import Run
from tests.forked_readers import forked_readers

API_KEY = "sk-sandbox-canary-5b1e"
#: When a clock that is set in mid-run jumps, in seconds of the child's life: it is at work by then.
JUMP_AFTER_S = 1.5
#: Signals that make a child tell where it is: its threads', and its tasks', stacks go to its log.
STACKS, TASKS = signal.SIGUSR1, signal.SIGUSR2


@dataclass(frozen=True)
class Order:
    """What a child is to do. `run_id` skips the planning, as a lane on another machine does.

    `spoils` changes the input once the run is open, as a careless user would; `steers` its limit and its cap, as an
    operator would from elsewhere; `backfills` makes a backfill of it, with one partition. `serve` is what the
    processes that read do, forked; None: they are started, as for a user. `time_scale` is how fast the provider's
    world runs for the lane: at 0 it waits for nothing. `limits` are the process's resources (`resource.RLIMIT_…`),
    for good; `clock_jump_s` is by how much this machine's clock is set, in mid-run or, after 0 s, before all else.
    """

    root: Path
    database_url: str
    base_url: str
    log: Path
    failpoint: str | None = None
    run_id: int | None = None
    spoils: bool = False
    steers: bool = False
    backfills: bool = False
    limits: Mapping[int, int] = field(default_factory=dict)
    clock_jump_s: float = 0.0
    clock_jump_after_s: float = JUMP_AFTER_S
    serve: Callable[[int, int], None] | None = orders.serve
    request: dict[str, Any] = field(default_factory=dict)
    times: LeaseTimes = USUAL_TIMES
    time_scale: float = 0.0


def obey(order: Order) -> None:
    """The body of the child process. Never returns: its parent's tear-down is not for the child."""
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(log, standard)
    faulthandler.register(STACKS)
    if order.clock_jump_s:
        _jump(order.clock_jump_s, order.clock_jump_after_s)
    if order.failpoint is not None:
        os.environ[VARIABLE] = order.failpoint
    os._exit(_run(order))


def _run(order: Order) -> int:
    try:
        with forked_readers(order.serve) if order.serve else nullcontext():
            return asyncio.run(_enrich(order))
    except FarthingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except asyncio.CancelledError:
        return 130
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


async def _enrich(order: Order) -> int:
    asyncio.get_running_loop().add_signal_handler(TASKS, _tell_tasks)
    _limit(order.limits)
    settings = Settings(
        database_url=SecretStr(order.database_url),
        DEEPSEEK_API_KEY=SecretStr(API_KEY),
        DEEPSEEK_BASE_URL=order.base_url,
        home=order.root / "farthing",
        sandbox=True,
        time_scale=order.time_scale,
    )
    if order.backfills:
        return await _backfill(order, settings)
    request = RunRequest(job="colours", root=order.root, **order.request)
    run = await _open(order, request, settings)
    if order.spoils:
        with (order.root / "documents.parquet").open("ab") as file:
            file.write(b"spoiled")
    if order.steers:
        await _steer(order, run)
    ended = await enrichment.work_lane(request, settings, run, show=_show, times=order.times)
    print(f"lane ended: {ended.reason} {ended.advice}", file=sys.stderr, flush=True)
    settled = await enrichment.settle_run(settings, run, [ended], order.times)
    return 0 if settled.state == "done" else 3


async def _backfill(order: Order, settings: Settings) -> int:
    asked = BackfillRequest(job="colours", root=order.root, changed=True)  # each scene has another prompt
    async with backfills.begun(asked, settings) as (plan, opened):
        if opened is None:
            return 0
        async with backfills.coordinator_ledger(settings) as ledger:
            due = [each.partition for each in plan.due]
            work = BackfillWork(
                ledger, settings, opened, asked, due, lambda: Here(settings, order.times), order.times
            )
            await work.run()
    return 0 if work.backfill.state == "done" else 3


@dataclass(frozen=True)
class Here:
    """A worker that is this process."""

    settings: Settings
    times: LeaseTimes

    async def work(self, request: RunRequest) -> PartitionEnded:
        return await backfills.work_partition(request, self.settings, self.times)


async def _steer(order: Order, run: Run) -> None:
    async with opened(SecretStr(order.database_url), Role.LANE) as ledger:
        await steering.limit(ledger, run.run_id, ["3"])
        await steering.cap(ledger, run.run_id, "2 USD")


def _jump(seconds: float, after_s: float) -> None:
    """Set the clock by so much, as an administrator or a time server does."""
    at = time.monotonic() + after_s

    def now() -> datetime:
        return utc_now() + timedelta(seconds=seconds if time.monotonic() >= at else 0)

    known = Completions.__init__.__kwdefaults__
    assert known is not None
    known["now"] = now


def _limit(limits: Mapping[int, int]) -> None:
    """What the process may have from here on. Nobody raises it again: the hard limits fall, too."""
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def _tell_tasks() -> None:
    """Where every task is, for whoever wonders why this child does not end."""
    for task in asyncio.all_tasks():
        task.print_stack(limit=20, file=sys.stderr)
    sys.stderr.flush()


async def _show(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """A lane that got so far has to outlive Postgres, so the harness wants to know."""
    print(f"lane working on {name}", file=sys.stderr, flush=True)
    await work()


async def _open(order: Order, request: RunRequest, settings: Settings) -> Run:
    if order.run_id is None:
        return await enrichment.open_run(request, settings, order.times)
    async with opened(SecretStr(order.database_url), Role.LANE) as ledger:
        await leases.bury_dead(ledger, RunId(order.run_id), grace_s=0)
        await runs.change_state(ledger, RunId(order.run_id), "running")
        return await runs.find_run(ledger, RunId(order.run_id))
