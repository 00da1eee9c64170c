"""A run from the outside: opened after everything was checked, worked on by lanes, settled with its report.

Whatever can be wrong with a job, a setting, a price or the input is found in `open_run`, before any money moves.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from pydantic import SecretStr

from schemas.announcements import exceeds, spell_dead_letters
from schemas.attempts import RunId
from schemas.balance import Balance
from schemas.ceilings import MOST_IN_FLIGHT
from schemas.documents import Manifest
from schemas.errors import (
    ConfigurationError,
    FarthingError,
    InputChanged,
    LedgerUnavailable,
    ProviderStopped,
    RunUnsettled,
    UnknownPrice,
)
from schemas.estimates import design_of
from schemas.finish_by import off_peak_between
from schemas.jobs import Job, When
from schemas.money import Currency
from schemas.off_peak import guard_of, tariff_of
from schemas.pricing import Price, PriceBook, load_price_book
from schemas.requests import LaneRequest, RunRequest
from schemas.samples import pick
from schemas.settings import Settings
from tasks import spill, telemetry
from tasks.bulkhead import Bulkhead
from tasks.completions import Completions, utc_now
from tasks.jobs import find_place, load_asked
from tasks.lanes import ADVICE, GOODBYE_S, INTERRUPTED, Ended, Lane, LanePlan, Show, show_nothing
from tasks.ledger import backfills, balances, leases, runs, spend
from tasks.ledger.backfills import Backfill
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tasks.ledger.runs import Opening, Run
from tasks.spill import Spill

log = structlog.get_logger("farthing.runs")

#: At its start and its end a run takes over at once from lanes whose session is gone; a lane that has just
#: registered gets so long to open its own.
GONE_AFTER_S = 2.0
SPARE_DESCRIPTORS = 256
#: A run that has ended waits no longer than so for what its account holds.
BALANCE_WITHIN_S = 5.0
#: Why a lane that was started elsewhere does not begin. It would spoil the run, or pay for another one.
_NOT_HERE = "this machine is not set up as the one that opened the run: {}; nothing was claimed, set it right"
#: Connections of one lane: its heartbeat, two writers, and what shards and grants look up.
LANE_CONNECTIONS = 6


@dataclass(frozen=True, slots=True)
class Provider:
    """What the provider says before a run: the price card that holds, and its clock against ours.

    `balance` is what the account held then, None where there is no page that says so.
    """

    currency: Currency
    clock_offset: timedelta
    balance: Balance | None = None


async def open_run(request: RunRequest, settings: Settings, times: LeaseTimes = USUAL_TIMES) -> Run:
    """Check everything, then resume or open the run. Raises ConfigurationError, UnknownPrice and the like: exit 2."""
    telemetry.require(settings)
    job = load_asked(request)
    book = load_price_book(settings.prices)
    async with (
        completions_for(job, settings) as completions,
        lane_ledger(settings, times.once_within_s) as ledger,
        Bulkhead() as bulkhead,
    ):
        provider, asked_at = await ask_provider(completions, job, request, settings), time.monotonic()
        check_prices(job, book, provider.currency, utc_now() + provider.clock_offset, request.hours(job))
        check_due(job, book, provider.currency, utc_now() + provider.clock_offset, request)
        manifest = await plan(bulkhead, job, request)
        opening = Opening(
            job=job,
            manifest=manifest,
            selection=request.selection(job),
            currency=provider.currency,
            cap=request.cap(job).pico,
            is_simulated=settings.sandbox,
            keeps_cap=request.budget is None,
        )
        if request.backfill is not None:
            opening = part_of(await backfills.find_backfill(ledger, request.backfill), opening)
        run = await runs.open_run(ledger, opening)
        if provider.balance is not None:
            ago_s = time.monotonic() - asked_at
            await balances.note(
                ledger,
                run.run_id,
                "start",
                run.currency,
                provider.balance,
                settings.provider_digest,
                settings.key_digest,
                ago_s,
            )
        await leases.bury_superseded(ledger, run.job)
        await spill.load(ledger, run.run_id, spill_of(settings))
        if buried := await leases.bury_dead(ledger, run.run_id, grace_s=GONE_AFTER_S):
            log.info("took over from lanes that died", run=run.run_id, lanes=buried)
        if job.input.label and job.measure and not await runs.has_labels(ledger, run.run_id):
            await runs.add_labels(ledger, run.run_id, read_labels(bulkhead, job, manifest, request.root))
        return run


async def plan(bulkhead: Bulkhead, job: Job, request: RunRequest) -> Manifest:
    """What the run is bound to: all of the selection, or the sample of it that was asked for."""
    manifest = await bulkhead.plan(
        job.input,
        shard_rows=job.shard_rows,
        partitions=request.partitions,
        limit=request.limit,
        root=request.root,
    )
    if request.sample is None:
        return manifest
    design = design_of(job, request.sample, is_even=request.is_even)
    return pick(manifest, await bulkhead.draw(job.input, manifest, design, root=request.root))


def part_of(backfill: Backfill, opening: Opening) -> Opening:
    """A run of this backfill: it draws on its budget, whose cap was settled when that was opened."""
    job = opening.job
    if backfill.budget_name != job.budget_name:
        job = replace(job, budget_name=backfill.budget_name, budget=backfill.declared)
    return replace(opening, job=job, keeps_cap=True, backfill_id=backfill.backfill_id, reuses=backfill.reuses)


async def read_labels(
    bulkhead: Bulkhead, job: Job, manifest: Manifest, root: Path
) -> AsyncIterator[list[tuple[int, str]]]:
    """What experts say of the documents, in blocks. Raises ConfigurationError where a file does not tell."""
    try:
        async with aclosing(bulkhead.read_labels(job.input, manifest, root=root)) as blocks:
            async for block in blocks:
                yield [(number, label) for number, label in block if label is not None]
    except InputChanged as error:
        raise ConfigurationError(str(error)) from None


async def work_lane(
    request: RunRequest,
    settings: Settings,
    run: Run,
    show: Show = show_nothing,
    times: LeaseTimes = USUAL_TIMES,
    shown_as: str | None = None,
    *,
    is_elsewhere: bool = False,
) -> Ended:
    """Work on the run in this process until nothing is left or something makes the lane drain.

    `shown_as` is what the lane is called by whoever started it elsewhere, and looks for it in the ledger.
    """
    job, book = load_asked(request), load_price_book(settings.prices)
    async with (
        completions_for(job, settings) as completions,
        lane_ledger(settings, times.answer_within_s, pool_size=LANE_CONNECTIONS) as ledger,
        Bulkhead() as bulkhead,
    ):
        provider = await ask_provider(completions, job, request, settings)
        plan = LanePlan(
            job=job,
            run=run,
            book=book,
            price_ids=await runs.register_prices(ledger, usable_prices(job, book, provider.currency)),
            root=request.root,
            lanes=max(request.lanes, run.sharing),
            scale=settings.time_scale,
            clock_offset=provider.clock_offset,
            show=show,
            times=times,
            when=request.hours(job),
            due=request.due(utc_now() + provider.clock_offset),
            is_elsewhere=is_elsewhere,
        )
        allow_descriptors(plan)
        lane_id = await leases.register(ledger, run.run_id)
        if shown_as is not None:
            detail = {"lane": lane_id, "shown_as": shown_as}
            await runs.note(ledger, run.run_id, leases.SHOWN_AS, detail, key=f"{leases.SHOWN_AS} {lane_id}")
        if plan.when is When.OFF_PEAK:  # the view off_peak_saving goes by this
            await runs.note(ledger, run.run_id, "off_peak", {"lane": lane_id}, key=f"off_peak {lane_id}")
        kept = await Spill.of(ledger, spill_of(settings), run.run_id, lane_id)
        async with telemetry.measured(settings, run, lane_id) as recorder:
            lane = Lane(ledger, lane_id, completions, bulkhead, plan, kept, recorder)
            with draining_on_signals(lane):
                return await lane.run_shards()


async def ask_lanes(request: RunRequest, settings: Settings, run: Run) -> list[LaneRequest]:
    """What lanes that work elsewhere are told."""
    async with lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        mark = await runs.find_mark(ledger, run.run_id)
    asked = LaneRequest(
        run=request,
        run_id=run.run_id,
        mark=mark,
        prices=load_price_book(settings.prices).digest,
        provider=settings.provider_digest,
        number=1,
    )
    return [asked.model_copy(update={"number": number}) for number in range(1, request.lanes + 1)]


async def work_elsewhere(
    asked: LaneRequest, settings: Settings, show: Show = show_nothing, shown_as: str | None = None
) -> Ended:
    """As `work_lane`, on another machine than the one that opened the run, or again after a process was killed.

    Raises ConfigurationError where this machine has another job, input, price book, provider or ledger: nothing is
    claimed.
    """
    telemetry.require(settings)
    run = await _join_run(asked, settings)
    if run.state != "running":
        return Ended(run.state, ADVICE.get(run.state, ""))
    return await work_lane(asked.run, settings, run, show, shown_as=shown_as, is_elsewhere=True)


async def _join_run(asked: LaneRequest, settings: Settings) -> Run:
    """The run, once it is certain that this machine may work on it, and what earlier lanes left here is recorded."""
    job = load_asked(asked.run)
    async with lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger, Bulkhead() as bulkhead:
        run = await runs.find_run(ledger, RunId(asked.run_id))
        if run.job != job.name or await runs.find_mark(ledger, run.run_id) != asked.mark:
            raise ConfigurationError(_NOT_HERE.format("its FARTHING_DATABASE_URL names another ledger"))
        if run.is_simulated != settings.sandbox:
            raise ConfigurationError(_NOT_HERE.format("one of the two uses the sandbox, the other does not"))
        if settings.provider_digest != asked.provider:
            raise ConfigurationError(_NOT_HERE.format("its DEEPSEEK_BASE_URL names another provider"))
        if load_price_book(settings.prices).digest != asked.prices:
            raise ConfigurationError(_NOT_HERE.format("its price book is another (FARTHING_PRICES, or release)"))
        if not await runs.is_of(ledger, run.run_id, job):
            raise ConfigurationError(_NOT_HERE.format(f"its files of the job {job.name} are others"))
        there = set(await bulkhead.list_files(job.input, root=asked.run.root))
        if missing := [path for path in await runs.list_paths(ledger, run.run_id) if path not in there]:
            raise ConfigurationError(_NOT_HERE.format(f"{len(missing)} files are not there, like {missing[0]}"))
        await spill.load(ledger, run.run_id, spill_of(settings))
        return run


async def settle_run(settings: Settings, run: Run, ended: list[Ended], times: LeaseTimes = USUAL_TIMES) -> Run:
    """Finish the run if all its shards ended; else pause it, with the first reason that a lane gave.

    A run that another start still works on goes on: this one's lanes may have been taken for dead, or interrupted.
    Raises RunUnsettled where Postgres is away.
    """
    reasons = [end for end in ended if not end.is_done]
    try:
        async with lane_ledger(settings, times.once_within_s) as ledger:
            await leases.bury_dead(ledger, run.run_id, grace_s=GONE_AFTER_S)
            is_over = await runs.settle(ledger, run.run_id) is not None
            if not is_over and not await leases.has_living(ledger, run.run_id):
                reason = reasons[0].reason if reasons else "unfinished"
                await runs.change_state(ledger, run.run_id, "paused", reason)
            settled = await runs.find_run(ledger, run.run_id)
            with suppress(LedgerUnavailable):  # only the reading that follows would be slower
                if is_over:
                    await runs.refresh_sums(ledger, run.job)
                else:
                    await runs.refresh_statistics(ledger, run.documents)
            await note_balance(ledger, settled, settings)
            return settled
    except LedgerUnavailable as error:
        advice = next((end.advice for end in reasons if end.advice), INTERRUPTED)
        raise RunUnsettled(f"run {run.run_id} ended and its end is not on the ledger: {error}\n{advice}") from None


async def note_balance(ledger: Ledger, run: Run, settings: Settings) -> None:
    """Note what the account holds at the end of a run, where a page says so. Nobody knows: that is noted, too."""
    if settings.currency is not None or settings.api_key is None:
        return
    found = None
    with suppress(FarthingError, TimeoutError):
        async with (
            asyncio.timeout(BALANCE_WITHIN_S),
            Completions(settings.base_url, settings.api_key.get_secret_value(), ceiling=1) as completions,
        ):
            found = await completions.balance(run.currency)
    with suppress(FarthingError):  # a run does not fail for want of a coarse alarm
        whose = (settings.provider_digest, settings.key_digest)
        await balances.note(ledger, run.run_id, "end", run.currency, found, *whose)


async def find_excess(settings: Settings, run: Run) -> str | None:
    """In words, by how much a run that is done has more dead letters than its job tolerates. None: it has not."""
    if run.state != "done":
        return None
    async with lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        found = await spend.progress(ledger, run.run_id)
    is_too_much = exceeds(found.dead_letters, found.documents, run.tolerance)
    return spell_dead_letters(found.dead_letters, found.documents, run.tolerance) if is_too_much else None


@asynccontextmanager
async def paused_if_cut_short(settings: Settings, run: Run) -> AsyncIterator[None]:
    """What ends the block early leaves the run paused, not `running` with nobody at work."""
    try:
        yield
    except BaseException as error:
        is_interrupted = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
        with suppress(LedgerUnavailable, TimeoutError):  # whoever resumes it finds out all the same
            async with asyncio.timeout(GOODBYE_S):
                await settle_run(settings, run, [Ended(runs.INTERRUPTED if is_interrupted else "failed")])
        raise


def spill_of(settings: Settings) -> Path:
    """Where lanes keep replies that Postgres could not take."""
    return settings.home / "spill"


def lane_ledger(settings: Settings, within_s: float, *, pool_size: int = 4) -> AbstractAsyncContextManager[Ledger]:
    """The ledger as lanes use it; `within_s` is how many seconds a transaction may take.

    Raises ConfigurationError where no database is set, and LedgerUnavailable.
    """
    return opened(require_database(settings), Role.LANE, pool_size=pool_size, answer_within_s=within_s)


def require_database(settings: Settings) -> SecretStr:
    """Raises ConfigurationError where no database is set."""
    if settings.database_url is None:
        raise ConfigurationError(
            "no database: set FARTHING_DATABASE_URL=postgresql://USER:PASSWORD@HOST:PORT/DATABASE and run "
            "`farthing db upgrade`, or use --sandbox for one on this machine"
        )
    return settings.database_url


@asynccontextmanager
async def completions_for(job: Job, settings: Settings) -> AsyncIterator[Completions]:
    """The door to the model. Raises ConfigurationError where the key is missing."""
    if settings.api_key is None:
        raise ConfigurationError(
            "no API key: set DEEPSEEK_API_KEY, or use --sandbox for an emulated DeepSeek that costs nothing"
        )
    async with Completions(
        settings.base_url,
        settings.api_key.get_secret_value(),
        ceiling=MOST_IN_FLIGHT * len(job.ladder),  # the limiters bind, and what they allow may be changed
        send_attempt_key=settings.sandbox,
    ) as completions:
        yield completions


async def ask_provider(completions: Completions, job: Job, request: RunRequest, settings: Settings) -> Provider:
    """Which price card holds, and what time it is there. Raises ConfigurationError or ProviderStopped."""
    offset = await completions.clock_offset()
    budget, balance = request.cap(job), None
    if settings.currency is not None:
        currency = settings.currency
    else:
        balance = await completions.balance()
        currency = balance.currency
        if not balance.is_available:
            raise ProviderStopped("the account has no balance: top it up, then run the same command")
    if currency is not budget.currency:
        raise ConfigurationError(
            f"the budget is in {budget.currency} and the account is billed in {currency}; sums are never converted: "
            f"write the budget in {currency}"
        )
    return Provider(currency, offset, balance)


def check_prices(job: Job, book: PriceBook, currency: Currency, now: datetime, when: When = When.NOW) -> None:
    """Raises UnknownPrice where a tier has no price from now until its deadline, or nobody knows the peak hours."""
    for tier in job.ladder:
        try:
            book.dearest(tier.model, currency, now, now + timedelta(seconds=tier.deadline_s))
        except UnknownPrice as error:
            raise UnknownPrice(f"{find_place(job, tier.model)}: {tier.name}: {error}") from None
    if when is When.OFF_PEAK:
        tariff_of(job, book, currency).decide(now, guard_of(job))


def check_due(job: Job, book: PriceBook, currency: Currency, now: datetime, request: RunRequest) -> None:
    """Raises ConfigurationError where the run is late already, UnknownPrice where hours until then are unknown."""
    if (due := request.due(now)) is None:
        return
    if job.promise is not None:
        raise ConfigurationError(
            "--finish-by cannot tell how much is left of a run with a promise, whose documents end together at its "
            "end: leave it out, or use --off-peak"
        )
    if due <= now:
        raise ConfigurationError(f"--finish-by {request.finish_by} is past: name a later instant, or leave it out")
    off_peak_between(tariff_of(job, book, currency), guard_of(job), now, due)


def usable_prices(job: Job, book: PriceBook, currency: Currency) -> Iterator[Price]:
    """Every price row an attempt of this job may be reserved or booked by."""
    models = {book.canonical(tier.model) for tier in job.ladder}
    deepseek = {model for model in book.models if model.startswith("deepseek-")}
    for price in book.rows():
        if price.currency is currency and price.model in models | deepseek:
            yield price


def allow_descriptors(plan: LanePlan) -> None:
    """Raise the soft limit of open files: each attempt in flight is a socket, and 1,024 is a common default.

    To the most that the run may ever be allowed, since a process cannot know what an operator will say.
    """
    wanted = MOST_IN_FLIGHT * len(plan.job.ladder) + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def draining_on_signals(lane: Lane) -> Iterator[None]:
    """SIGINT and SIGTERM drain the lane; a second one gives up on what is in flight (it becomes unknown)."""
    with on_signals(lane.interrupt):
        yield


def terminate_lanes() -> None:
    """SIGTERM to the lanes that this process started, which answer as in `draining_on_signals`."""
    for lane in multiprocessing.active_children():
        lane.terminate()


@contextmanager
def pausing_on_signals(
    settings: Settings, run: Run, hand_on: Callable[[], object] = terminate_lanes
) -> Iterator[None]:
    """SIGINT and SIGTERM pause the run; its lanes, in other processes, see it within a heartbeat and drain.

    A second one is handed on to them, and so is the first where Postgres is away.
    """
    pausing: list[asyncio.Task[None]] = []

    async def pause() -> None:
        try:
            async with lane_ledger(settings, USUAL_TIMES.answer_within_s) as ledger:
                await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
        except LedgerUnavailable:
            hand_on()

    def stop() -> None:
        if pausing:
            hand_on()
        else:
            pausing.append(asyncio.get_running_loop().create_task(pause()))

    with on_signals(stop):
        yield


@contextmanager
def on_signals(answer: Callable[[], object]) -> Iterator[None]:
    """Answer SIGINT and SIGTERM in the event loop while the block lasts. Only a main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, answer)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
