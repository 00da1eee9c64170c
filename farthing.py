"""The command line: alone responsible for what a person or a script types, prints and gets as an exit code.

    0 done · 1 finished with more dead letters than the job tolerates · 2 wrong configuration or usage, nothing spent
    3 paused, resumable · 4 the ledger does not prove

With --json, stdout holds one JSON object and all that is for people goes to stderr. Heavy libraries are imported
inside the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, TypeAlias, TypeVar, cast

import typer

from schemas.engines import Engine
from schemas.errors import ConfigurationError, FarthingError, LedgerMismatch, LedgerUnavailable, RunPaused, Unforeseen
from schemas.inert import plain_lines

if TYPE_CHECKING:
    from decimal import Decimal

    from prefect import State
    from pydantic import SecretStr, ValidationError
    from rich.console import RenderableType

    from sandbox.service import Option
    from schemas.attempts import RunId
    from schemas.estimates import Estimate, History, Size
    from schemas.jobs import Job, When
    from schemas.money import Currency
    from schemas.months import Checked, Closed, Month
    from schemas.price_files import Machine
    from schemas.pricing import Price, PriceBook
    from schemas.projections import Polled
    from schemas.promises import Promise
    from schemas.public_prices import PublicMap
    from schemas.requests import BackfillRequest, CompareRequest, RunRequest
    from schemas.settings import Settings
    from schemas.spending import Side
    from tasks.backfills import Plan
    from tasks.bookkeeping import Outcome
    from tasks.comparisons import Field
    from tasks.ledger.books import Scope
    from tasks.ledger.connection import Ledger, Role
    from tasks.ledger.proof import Proof
    from tasks.ledger.spend import Audit, BackfillRun, Progress, RunSummary
    from tasks.live import View
    from tasks.pages import Page
    from tasks.samples import DrawnSample
    from tasks.steering import Capped, Limited, Steered
    from tasks.whatif import Comparison

T = TypeVar("T")
#: What begins the flow that a request asks for.
Begin: TypeAlias = "Callable[[RunRequest], Callable[[], Awaitable[State[Any]]]]"

ROOT = Path(".")
CORPUS = Path("data/licences")
#: The jobs whose documents, and whose simulated answers, the sandbox brings along.
#: Where Prefect's server went away, or somebody cancelled there a run that no worker of Prefect's has.
UNSEEN = "Prefect's server does not know how this ended: its page stays incomplete, the ledger does not"
SHIPPED = ("licences", "obligations")
#: How many documents a sample has where nobody says.
USUAL_SAMPLE = 50
#: Exit codes that no error carries: a run that can be resumed, and a bug (EX_SOFTWARE in sysexits.h).
PAUSED, CRASHED, INTERRUPTED = 3, 70, 130
#: An off-peak instant that the price book will always know.
PRICED = datetime(2026, 12, 1, 12, tzinfo=UTC)

_NAKED: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}
_OPEN: dict[str, Any] = _NAKED | {"no_args_is_help": False}
app = typer.Typer(
    name="farthing",
    help="Run big batches of documents through DeepSeek: the cheap model first, the strong one when it must, "
    "and every call on a ledger. `farthing demo` shows it on this machine, without a key.",
    pretty_exceptions_enable=False,
    **_NAKED,
)
db = typer.Typer(name="db", help="The ledger's tables in Postgres.", **_NAKED)
sandbox = typer.Typer(name="sandbox", help="A DeepSeek and a Postgres on this machine.", **_NAKED)
app.add_typer(db)
app.add_typer(sandbox)

JobName = Annotated[str, typer.Argument(metavar="JOB", help="A name under jobs/, or the path of a job file.")]
Target = Annotated[str | None, typer.Argument(metavar="[JOB|RUN]", help="A job's name or a run's number.")]
UnfinishedRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's number, or a job's name where it has one run under way.")
]
Partitions = Annotated[
    list[str] | None, typer.Option("--partition", "-p", metavar="P", help="Only this slice; may be repeated.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N documents.")]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SUM",
        help='A hard cap, like "5 USD" or "30 CNY"; a bare number is USD. A shared one: for all. Default: '
        "the job's, and for a run that is resumed the one it had.",
    ),
]
OffPeak = Annotated[
    bool | None,
    typer.Option(
        "--off-peak/--now",
        help="Make attempts at off-peak prices only, and wait meanwhile; or at any hour. Default: what the job says.",
        show_default=False,
    ),
]
FinishByTime = Annotated[
    str | None,
    typer.Option(
        "--finish-by",
        metavar="TIME",
        help="Off-peak, but done by then: peak prices only as needed. 08:30+08:00, or 2026-12-01T08:30+08:00.",
    ),
]
Lanes = Annotated[int, typer.Option("--lanes", min=1, max=64, metavar="N", help="Processes that share the work.")]
LanesOn = Annotated[
    str | None,
    typer.Option(
        "--lanes-on",
        metavar="processes|workers|dask|ray",
        help="Where the lanes work: here, with Prefect's workers, on a Dask or a Ray cluster. Default: what "
        "FARTHING_LANES_ON says, else processes.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No live view.")]
Force = Annotated[bool, typer.Option("--force", help="Also while a run uses them.")]
InCurrency = Annotated[
    str | None,
    typer.Option("--currency", metavar="C", help="Of a month: USD or CNY, where the ledger has runs in both."),
]
InSandbox = Annotated[bool, typer.Option("--sandbox", help="Use the DeepSeek and the Postgres of this machine.")]


def main() -> NoReturn:
    """The console script: run the command; an error raised on purpose becomes its lines and its exit code."""
    from sandbox.errors import SandboxError

    try:
        exit_code = app(_spell_out(sys.argv[1:]), standalone_mode=False)
    except typer.Abort:
        _fail("nothing was done", 1)
    except typer.TyperException as error:
        _refuse(error)
    except FarthingError as error:
        _fail(str(error), error.exit_code)
    except SandboxError as error:
        _fail(str(error), ConfigurationError.exit_code)
    except Exception as error:  # a bug: told apart from every result a run can have
        _fail_unexpectedly(error)
    if exit_code == INTERRUPTED:  # typer's own, and silent
        _fail("interrupted before anything was begun", INTERRUPTED)
    sys.exit(exit_code if isinstance(exit_code, int) else 0)


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the number that --sample has where none follows."""
    spelt: list[str] = []
    for place, argument in enumerate(arguments):
        spelt.append(argument)
        if argument == "--sample" and not "".join(arguments[place + 1 : place + 2]).isdecimal():
            spelt.append(str(USUAL_SAMPLE))
    return spelt


def _fail_unexpectedly(error: Exception) -> NoReturn:
    """One line that says what and where. An exception's own words may quote a document or a key, so they are not."""
    bug = error if isinstance(error, Unforeseen) else Unforeseen.of(error)
    _fail(f"{bug}: please report this as a bug of Farthing; what was recorded is safe", CRASHED)


def _refuse(error: typer.TyperException) -> NoReturn:
    """Wrong usage: one line about it and where to read more, or the whole help where nothing was asked for."""
    message = error.format_message()
    if message.startswith("Usage:"):
        tell(message)
        sys.exit(error.exit_code)
    _fail(f"{message} (see --help)", error.exit_code)


def _fail(message: str, exit_code: int) -> NoReturn:
    """Say what is wrong: for people line by line, for scripts as one object."""
    for line in message.splitlines():
        tell(f"error: {line}")
    if "--json" in sys.argv:
        print_json({"error": message, "exit_code": exit_code})
    sys.exit(exit_code)


def tell(text: str) -> None:
    """A line for people, on stderr: stdout holds only what was asked for."""
    print(plain_lines(text), file=sys.stderr, flush=True)


def show(*parts: RenderableType) -> None:
    """What was asked for, for people: on stdout, as wide as the terminal, or in a pipe as a wide one."""
    from rich.console import Console
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=120)
    for part in parts:
        text = Text(plain_lines(part)) if isinstance(part, str) else part
        console.print(text, highlight=False, markup=False, emoji=False)


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run in an event loop of its own."""
    import asyncio

    return asyncio.run(work)


def print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"farthing {installed('farthing')}")
        raise typer.Exit


# Runs


@app.command()
def demo(
    limit: Limit = None,
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="licences or obligations.")] = SHIPPED[0],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a real job on this machine: no account, key or container."""
    if job not in SHIPPED:
        raise ConfigurationError(f"the demo runs {' or '.join(SHIPPED)}; for others: farthing run {job} --sandbox")
    _run(_request(job, None, limit, None, 1), is_in_sandbox=True, is_quiet=quiet, as_json=as_json, is_demo=True)


@app.command()
def run(
    job: JobName,
    partition: Partitions = None,
    limit: Limit = None,
    budget: Budget = None,
    in_sandbox: InSandbox = False,
    lanes: Lanes = 1,
    lanes_on: LanesOn = None,
    off_peak: OffPeak = None,
    finish_by: FinishByTime = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a job, or resume the run of it that did not finish."""
    request = _request(job, partition, limit, budget, lanes, lanes_on, off_peak, finish_by)
    _run(request, is_in_sandbox=in_sandbox, is_quiet=quiet, as_json=as_json)


def _request(
    job: str,
    partitions: Sequence[str] | None,
    limit: int | None,
    budget: str | None,
    lanes: int,
    lanes_on: str | None = None,
    off_peak: bool | None = None,
    finish_by: str | None = None,
    sample: int | None = None,
    is_pilot: bool = False,
) -> RunRequest:
    """What was asked for, as a value. Raises ConfigurationError where it makes no sense."""
    from pydantic import ValidationError

    from schemas.requests import USUAL_PILOT, RunRequest

    asked = {
        "limit": limit,
        "budget": budget,
        "lanes": lanes,
        "lanes_on": lanes_on,
        "when": _hours(off_peak),
        "finish_by": finish_by,
        "sample": USUAL_PILOT if is_pilot and sample is None else sample,
        "is_pilot": is_pilot,
    }
    try:
        return RunRequest(job=job, partitions=tuple(partitions or ()), **asked)
    except ValidationError as error:
        raise ConfigurationError(*_explain(error, "--")) from None


def _run(request: RunRequest, *, is_in_sandbox: bool, is_quiet: bool, as_json: bool, is_demo: bool = False) -> None:
    """Check, run and report; leaves with the run's exit code."""
    job = _load_job(request.job, is_in_sandbox)
    with ExitStack() as stack:
        stack.enter_context(_stdout_kept())
        view = stack.enter_context(_view(job.name, is_quiet))
        settings = _settings()
        if is_in_sandbox:
            settings = stack.enter_context(_sandbox(settings, view.phase))
        outcome = _resumably(lambda: _enrich(request, job, settings, view), lambda: view.has_seen_run)
        view.phase("proving the ledger")
        audit, proof = _resumably(lambda: wait_for(_conclude(_database(settings), outcome["run_id"])), lambda: True)
    _report(outcome, audit, proof, as_json=as_json, is_demo=is_demo)
    raise typer.Exit(_exit_code(audit, proof, job))


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """What else is printed meanwhile goes to stderr, also by processes that are started now: engines tell there."""
    if sys.stdout is None:  # it was closed before we began, and its number may be a socket's by now
        with redirect_stdout(sys.stderr):
            yield
        return
    _flush(sys.stdout)
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush(sys.stdout)  # what somebody who had kept it has written
        os.dup2(kept, 1)
        os.close(kept)


def _flush(stream: TextIO) -> None:
    """Whoever read it may be gone, which the first line of the outcome will tell."""
    with suppress(OSError, ValueError):
        stream.flush()


@app.command()
def backfill(
    job: JobName,
    first: Annotated[
        str | None, typer.Option("--from", metavar="P", help="The first partition, like 2026-01-01.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="P", help="The last partition, itself included.")
    ] = None,
    partition: Annotated[
        list[str] | None,
        typer.Option("--partition", "-p", metavar="P", help="Only this slice, or those of a glob; may be repeated."),
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Those too whose text, prompt or model changed since.")
    ] = False,
    dead: Annotated[
        bool, typer.Option("--dead", help="Those too that have dead letters, to try them again.")
    ] = False,
    if_cheaper_than: Annotated[
        str | None, typer.Option("--if-cheaper-than", metavar="SUM", help="Start nothing if more is expected.")
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=64, metavar="N", help="Partitions that are run at a time.")
    ] = 2,
    lanes_on: LanesOn = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SUM", help="A hard cap on all runs together. Default: the job's."),
    ] = None,
    off_peak: OffPeak = None,
    when_model_changes: Annotated[
        str,
        typer.Option(
            "--when-model-changes", metavar="pause|go-on", help="What to do if the provider begins to serve another."
        ),
    ] = "pause",
    in_sandbox: InSandbox = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before money is spent.")] = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what is due and what it may cost; run nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run partitions that never ran or did not finish, each as a run of its own; or go on with the same backfill."""
    request = _backfill_request(
        job=job,
        first=first,
        last=last,
        partitions=tuple(partition or ()),
        changed=changed,
        dead=dead,
        if_cheaper_than=if_cheaper_than,
        parallel=parallel,
        lanes_on=lanes_on,
        budget=budget,
        when=_hours(off_peak),
        when_model_changes=when_model_changes,
    )
    loaded = _load_job(job, in_sandbox)
    if only_list:
        return _tell_plan(_list_partitions(request, loaded, in_sandbox), as_json)
    _backfill(request, loaded, is_in_sandbox=in_sandbox, is_agreed=yes, is_quiet=quiet, as_json=as_json)


def _backfill_request(**asked: Any) -> BackfillRequest:
    """What was asked for, as a value. Raises ConfigurationError where it makes no sense."""
    from pydantic import ValidationError

    from schemas.requests import BackfillRequest

    try:
        return BackfillRequest(**asked)
    except ValidationError as error:
        raise ConfigurationError(*_explain(error, "--")) from None


def _hours(off_peak: bool | None) -> When | None:
    from schemas.jobs import When

    return None if off_peak is None else When.OFF_PEAK if off_peak else When.NOW


def _list_partitions(request: BackfillRequest, job: Job, in_sandbox: bool) -> Plan:
    """How the partitions stand, by the ledger if there is one. Nothing is sent, and no key is needed."""
    from schemas.pricing import load_price_book
    from tasks import backfills

    settings = _settings()
    has_ledger = settings.database_url is not None or _has_sandbox_ledger(settings)
    is_sandbox = in_sandbox or settings.sandbox
    is_simulated = is_sandbox or settings.database_url is None
    now = _now(settings, in_sandbox)

    async def plan(ledger: Ledger | None) -> Plan:
        return await backfills.plan(
            request,
            job,
            ledger,
            load_price_book(settings.prices),
            now,
            is_simulated=is_simulated,
            is_stand_in=is_simulated and not is_sandbox,
        )

    return _ask(plan, in_sandbox, as_lane=True) if has_ledger else wait_for(plan(None))


def _tell_plan(plan: Plan, as_json: bool) -> None:
    from tasks import report

    if as_json:
        print_json(report.plan_json(plan))
    else:
        show(report.plan_table(plan))


def _backfill(
    request: BackfillRequest, job: Job, *, is_in_sandbox: bool, is_agreed: bool, is_quiet: bool, as_json: bool
) -> None:
    """Price, ask, run and report; leaves with the exit code of all runs together."""
    with ExitStack() as stack:
        with _view(job.name, is_quiet) as view:
            settings = _settings()
            if is_in_sandbox:
                settings = stack.enter_context(_sandbox(settings, view.phase))
            view.phase("looking at the partitions")
            plan = wait_for(_check_backfill(request, job, settings))
        if not as_json or not plan.due:
            _tell_plan(plan, as_json)
        if not plan.due:
            return tell("nothing is due")
        plan.refuse_dear()
        _agree(plan, is_agreed)
        with _stdout_kept(), _view(job.name, is_quiet) as view:
            outcome = _resumably(lambda: _run_backfill(request, settings, view), lambda: view.has_seen_run)
            view.phase("proving the ledger")
            found = _resumably(
                lambda: wait_for(_conclude_backfill(_database(settings), outcome["backfill_id"])), lambda: True
            )
    _report_backfill(outcome, job, *found, as_json=as_json)
    raise typer.Exit(_backfill_exit_code(outcome, job, *found))


async def _check_backfill(request: BackfillRequest, job: Job, settings: Settings) -> Plan:
    """All that can be wrong, another process at work included. The flow checks again, since others start it too."""
    from tasks import backfills
    from tasks.ledger.backfills import held

    async with (
        backfills.coordinator_ledger(settings) as ledger,
        held(ledger, job.name, is_simulated=settings.sandbox),
    ):
        return await backfills.check(request, job, settings, ledger)


def _agree(plan: Plan, is_agreed: bool) -> None:
    """Ask whether to spend. Raises ConfigurationError where nobody is there to ask."""
    if is_agreed:
        return
    what = f"{len(plan.due)} runs, {plan.expected} expected"
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"{what}, and nobody is here to ask whether to start: nothing was; say --yes if you mean it"
        )
    typer.confirm(f"{what}: start?", abort=True, err=True)


def _run_backfill(request: BackfillRequest, settings: Settings, view: View) -> dict[str, Any]:
    """The runs themselves, under Prefect. Prefect only shows: without it the ledger still has all that was done."""
    view.phase("starting Prefect")
    _prepare_prefect(settings)
    from httpx import TransportError  # Prefect's client; ours is httpx2

    from tasks.prefect_server import require_lasting_server, start_temporary_server

    if request.engine(settings) is Engine.WORKERS:
        require_lasting_server()
    server = start_temporary_server()
    from prefect.exceptions import UnfinishedRun

    from flows.backfill import backfill as flow  # meanwhile: both take seconds
    from tasks.backfills import settle_unseen
    from tasks.final_states import outcome_of
    from tasks.prefect_server import PREFECT_GONE

    if server is not None:
        server.wait()
    view.follow_backfill(_database(settings))
    asked = request.model_dump() | {"partitions": list(request.partitions), "root": str(request.root)}

    async def work() -> dict[str, Any]:
        return await outcome_of(await flow(**asked, return_state=True))

    try:
        return wait_for(work())
    except (TransportError, UnfinishedRun):
        found = wait_for(settle_unseen(request.job, settings, PREFECT_GONE))
        if found is None:
            raise RunPaused(PREFECT_GONE) from None
        tell(UNSEEN)
        return found


async def _conclude_backfill(url: SecretStr, backfill_id: int) -> tuple[list[BackfillRun], list[Proof]]:
    """What each run came to, and whether the ledger proves those."""
    from tasks.ledger import spend

    found = await _ask_at(url, lambda ledger: spend.list_backfill(ledger, backfill_id))
    return found, [await _ask_at(url, partial(_prove, run_id=each.run), as_lane=True) for each in found]


def _report_backfill(
    outcome: dict[str, Any], job: Job, found: list[BackfillRun], proofs: list[Proof], *, as_json: bool
) -> None:
    from tasks import report
    from tasks.ledger.spend import by_partition

    spent = by_partition(found)
    if as_json:
        print_json(report.backfill_json(job.name, outcome, spent, proofs, job.budget.currency))
    else:
        show(*report.backfill_report(outcome, spent, proofs, job.budget.currency))
    for partition, why in outcome["failed"].items():
        tell(f"{partition} failed: {why}")
    if outcome["advice"]:
        tell(outcome["advice"])


def _backfill_exit_code(outcome: dict[str, Any], job: Job, found: list[BackfillRun], proofs: list[Proof]) -> int:
    from schemas.announcements import exceeds
    from tasks.ledger.spend import by_partition

    if not all(proof.proved for proof in proofs):
        return LedgerMismatch.exit_code
    if outcome["state"] != "done":
        return PAUSED
    return int(any(exceeds(each.dead_letters, each.documents, job.tolerance) for each in by_partition(found)))


def _load_job(name: str, is_in_sandbox: bool = False) -> Job:
    """The job, checked before anything else happens. In the sandbox, a shipped job's documents are written first."""
    from tasks.jobs import load_job

    job = load_job(name, ROOT)
    if is_in_sandbox and job.name in SHIPPED and job.input.path.startswith(f"{CORPUS}/"):
        from sandbox.licences import write_corpus

        if not (ROOT / CORPUS / "corpus.json").exists():
            tell(f"writing the documents into {CORPUS} …")
        write_corpus(ROOT / CORPUS)
    elif is_in_sandbox:
        tell(f"the sandbox has no answer key for {job.name}: it makes up answers that fit the schema")
    return job


def _enrich(
    request: RunRequest,
    job: Job,
    settings: Settings,
    view: View,
    begin: Begin | None = None,
    selections: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The run itself, under Prefect, which is imported only when nothing is known to be wrong.

    Or what else `begin` does, whose runs are of these selections.
    """
    selections = selections or [request.selection(job)]
    view.phase("checking the job, the account and the ledger")
    _tell_unfinished(wait_for(_check(request, job, settings)), selections, job, settings)
    if job.promise is not None and request.sample is None:
        size, known = wait_for(_measure(job, request)), _find_history(job, settings.sandbox)
        _tell_promise(job, _compute(job, request, size, known, settings, _now(settings, settings.sandbox)))
    view.phase("starting Prefect")
    _prepare_prefect(settings)
    from tasks.prefect_server import require_lasting_server, start_temporary_server

    if request.engine(settings) is Engine.WORKERS:
        require_lasting_server()
    server = start_temporary_server()
    from tasks.final_states import outcome_of  # meanwhile: both take seconds

    flow_run = (begin or _begin_run)(request)
    if server is not None:
        server.wait()
    view.follow(_database(settings), budget=job.budget, selections=selections)

    async def flow() -> dict[str, Any]:
        return await outcome_of(await flow_run())

    return _despite_prefect(flow, settings, view)


def _begin_run(request: RunRequest) -> Callable[[], Awaitable[State[Any]]]:
    """What begins a run, under Prefect."""
    from flows.enrich import enrich

    asked = _asked_of_flow(request) | {"finish_by": request.finish_by, "sample": request.sample}
    return lambda: enrich(**asked, return_state=True)


def _begin_pilot(request: RunRequest, promise: Promise) -> Callable[[], Awaitable[State[Any]]]:
    """What begins a pilot, under Prefect."""
    from flows.calibrate import calibrate

    asked = _asked_of_flow(request) | {"target": str(promise.target), "delta": str(promise.delta)}
    return lambda: calibrate(**asked, sample=request.sample, return_state=True)


def _begin_comparison(request: RunRequest, asked: CompareRequest) -> Callable[[], Awaitable[State[Any]]]:
    """What begins a comparison, under Prefect; `request` is of the first that is to be asked."""
    from flows.compare import compare as flow

    lists = {name: list(getattr(asked, name)) for name in ("variants", "against", "partitions")}
    values = asked.model_dump() | lists | {"root": str(asked.root)}
    return lambda: flow(**values, return_state=True)


def _asked_of_flow(request: RunRequest) -> dict[str, Any]:
    return {
        "job": request.job,
        "partitions": list(request.partitions),
        "limit": request.limit,
        "budget": request.budget,
        "lanes": request.lanes,
        "root": str(request.root),
        "when": request.when,
        "lanes_on": request.lanes_on,
    }


def _despite_prefect(
    flow: Callable[[], Coroutine[Any, Any, dict[str, Any]]], settings: Settings, view: View
) -> dict[str, Any]:
    """The flow's outcome. Prefect only shows: a run that outlives its server is what the ledger says."""
    from httpx import TransportError  # Prefect's client; ours is httpx2
    from prefect.exceptions import UnfinishedRun

    from tasks.prefect_server import PREFECT_GONE
    from tasks.steps import settle_unseen

    try:
        return wait_for(flow())
    except (TransportError, UnfinishedRun):
        if view.run_id is None:
            raise RunPaused(PREFECT_GONE) from None
        tell(UNSEEN)
        return wait_for(settle_unseen(view.run_id, settings))


def _tell_unfinished(
    paused: list[tuple[int, dict[str, Any]]], selections: Sequence[Mapping[str, Any]], job: Job, settings: Settings
) -> None:
    """Name the newest run that this command does not resume, since it is about other documents."""
    from schemas.requests import spell_command

    for run, selection in paused:
        if selection not in selections:
            command = spell_command(job.name, selection, is_simulated=settings.sandbox)
            return tell(f"run {run} of {job.name} is unfinished and stays so: `{command}` goes on with that")


async def _check(request: RunRequest, job: Job, settings: Settings) -> list[tuple[int, dict[str, Any]]]:
    """All that can be wrong and is quick to know; returns the job's paused runs. The flow checks again."""
    from schemas.pricing import load_price_book
    from tasks import engines, enrichment
    from tasks.bulkhead import Bulkhead
    from tasks.ledger import spend
    from tasks.ledger.leases import USUAL_TIMES
    from tasks.report import calendar_warning

    engines.require(request.engine(settings))
    now = _now(settings, in_sandbox=settings.sandbox)
    book, currency = load_price_book(settings.prices), request.cap(job).currency
    enrichment.check_prices(job, book, currency, now, request.hours(job))
    if not settings.sandbox and (
        warning := calendar_warning(book, [(tier.model, currency) for tier in job.ladder], now)
    ):
        tell(warning)
    async with (
        enrichment.completions_for(job, settings) as completions,
        enrichment.lane_ledger(settings, USUAL_TIMES.answer_within_s, pool_size=1) as ledger,
        Bulkhead() as bulkhead,
    ):
        await enrichment.ask_provider(completions, job, request, settings)
        # The first file shows whether the columns are there; the flow looks into all of them.
        await bulkhead.plan(job.input, shard_rows=job.shard_rows, partitions=request.partitions, limit=1, root=ROOT)
        return await spend.list_paused(ledger, job.name, is_simulated=settings.sandbox)


def _prepare_prefect(settings: Settings) -> None:
    """Prefect reads these when it is imported. What a user has set stays; nothing is reported to anyone."""
    wanted = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",  # one that dies is noticed at once
        "PREFECT_CLIENT_MAX_RETRIES": "3",  # a server that is gone is waited for 2 + 4 + 8 s by each question, not 62
        # The live view has the terminal; Prefect's own pages still get every line.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
    if settings.sandbox:
        wanted["PREFECT_HOME"] = str((settings.home / "prefect").resolve())
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _resumably(work: Callable[[], T], is_begun: Callable[[], bool]) -> T:
    """What interrupts a run that has begun leaves it resumable, and says so: Ctrl-C outside a lane, Postgres away."""
    from asyncio import CancelledError

    try:
        return work()
    except (KeyboardInterrupt, CancelledError):
        tell("interrupted: what was recorded stays on the ledger; run the same command to go on")
        raise typer.Exit(PAUSED) from None
    except LedgerUnavailable as error:
        if not is_begun():
            raise
        raise RunPaused(str(error)) from None  # not 2, which promises that nothing was spent


def _report(outcome: dict[str, Any], audit: Audit, proof: Proof, *, as_json: bool, is_demo: bool) -> None:
    from tasks import report

    advice = outcome["advice"]
    if as_json:
        if advice:
            tell(advice)
        return print_json(audit.to_json() | {"proved": proof.proved, "advice": advice})
    show(*report.run_report(audit, proof))
    if advice:  # last, where it is seen: why the run paused or is no success, and what to do next
        tell(advice)
    if is_demo:
        show(report.next_commands(audit))


def _exit_code(audit: Audit, proof: Proof, job: Job) -> int:
    from schemas.announcements import exceeds

    if not proof.proved:
        return LedgerMismatch.exit_code
    if audit.state != "done":
        is_unpaid = audit.reason == "key" and not audit.cost_pico and not audit.unknown_pico
        return ConfigurationError.exit_code if is_unpaid else PAUSED
    return int(exceeds(audit.dead_letters, audit.documents, job.tolerance))


@app.command()
def estimate(
    job: JobName,
    partition: Partitions = None,
    limit: Limit = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            metavar="[N]",
            help="Ask so many documents first, drawn at random (50 without a number), 10 to 1000. It costs what they "
            "cost; the run that follows reuses their answers.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SUM",
            help="A hard cap on the sample. Default: the most that you are told, or the job's if that is less.",
        ),
    ] = None,
    off_peak: OffPeak = None,
    finish_by: FinishByTime = None,
    in_sandbox: InSandbox = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the sample is sent.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would cost, between which sums, and what that rests on. Nothing is sent without --sample."""
    from tasks import report

    if budget is not None and sample is None:
        raise ConfigurationError("--budget caps what a sample costs, and nothing is sent without --sample: add that")
    request = _request(job, partition, limit, budget, 1, None, off_peak, finish_by, sample)
    loaded = _load_job(job, in_sandbox)
    known: Polled | History | None
    if sample is None:
        settings = _settings()
        size, known = wait_for(_measure(loaded, request)), _find_history(loaded, in_sandbox)
    else:
        settings, size, known = _poll(request, loaded, in_sandbox, is_agreed=yes, is_quiet=quiet)
    found = _compute(loaded, request, size, known, settings, _now(settings, in_sandbox))
    _tell_promise(loaded, found)
    if as_json:
        print_json(report.estimate_json(found))
    else:
        show(report.estimate_table(found, loaded.budget))


def _compute(
    job: Job, request: RunRequest, size: Size, known: Polled | History | None, settings: Settings, now: datetime
) -> Estimate:
    from schemas.estimates import estimate as compute
    from schemas.pricing import load_price_book
    from schemas.work_hours import Asked

    asked = Asked(now, request.hours(job), request.due(now))
    return compute(job, size, load_price_book(settings.prices), asked, known)


def _tell_promise(job: Job, found: Estimate) -> None:
    """What a promise will take, before any money moves."""
    from schemas.estimates import forecast

    for line in forecast(job, found):
        tell(line)


async def _measure(job: Job, request: RunRequest) -> Size:
    from tasks import enrichment, samples
    from tasks.bulkhead import Bulkhead

    async with Bulkhead() as bulkhead:
        return await samples.measure(job, await enrichment.plan(bulkhead, job, request), bulkhead, ROOT)


def _find_history(job: Job, in_sandbox: bool) -> History | None:
    """What earlier runs say, where there is a ledger and it can be reached."""
    from tasks.ledger.history import find_history

    settings = _settings()
    if settings.database_url is None and not _has_sandbox_ledger(settings):
        return None
    is_simulated = in_sandbox or settings.sandbox or settings.database_url is None
    try:
        found = _ask(lambda ledger: find_history(ledger, job, is_simulated=is_simulated), in_sandbox)
        return found and replace(found, is_stand_in=is_simulated and not (in_sandbox or settings.sandbox))
    except FarthingError as error:
        tell(f"without the job's history: {error}")
        return None


def _poll(
    request: RunRequest, job: Job, is_in_sandbox: bool, *, is_agreed: bool, is_quiet: bool
) -> tuple[Settings, Size, Polled]:
    """What the documents of a sample took, which are asked unless that was done before. Raises RunPaused."""
    from tasks.ledger.history import find_polled

    with _asked(request, job, is_in_sandbox, is_agreed=is_agreed, is_quiet=is_quiet) as (settings, drawn, run_id):
        find = partial(find_polled, run_id=run_id, sample=drawn.sample)
        return settings, drawn.size, wait_for(_ask_at(_database(settings), find, as_lane=True))


@contextmanager
def _asked(
    request: RunRequest,
    job: Job,
    is_in_sandbox: bool,
    *,
    is_agreed: bool,
    is_quiet: bool,
    promise: Promise | None = None,
) -> Iterator[tuple[Settings, DrawnSample, RunId]]:
    """A sample, and the run that asked its documents, now or earlier. A pilot is for a promise. Raises RunPaused."""
    from tasks import samples
    from tasks.ledger.history import find_sample

    _check_cap(request, job)
    with ExitStack() as stack:
        stack.enter_context(_stdout_kept())
        settings = _settings()
        if is_in_sandbox:
            settings = stack.enter_context(_sandbox(settings, tell))
        url, now = _database(settings), _now(settings, is_in_sandbox)
        drawn = wait_for(samples.draw(job, request, settings))
        find = partial(find_sample, opening=drawn.opening)
        run_id = wait_for(_ask_at(url, find, as_lane=True))
        if run_id is None:
            capped = _agree_to_sample(request, job, drawn, settings, now, is_agreed=is_agreed or settings.sandbox)
            run_id = _ask_sample(capped, job, settings, is_quiet, promise)
            _require_same(run_id, wait_for(_ask_at(url, find, as_lane=True)))
        yield settings, drawn, run_id


def _check_cap(request: RunRequest, job: Job) -> None:
    """Raises ConfigurationError where --budget is no cap that this job's sample can have."""
    if request.budget is None:
        return
    if job.budget_name is not None:
        raise ConfigurationError(
            f"--budget would change {job.budget_name} for every job that shares it: leave it out, and the sample "
            f"draws on {job.budget_name} as a run does; `farthing run {job.name} --budget SUM` changes it for all"
        )
    if request.cap(job).currency is not job.budget.currency:
        raise ConfigurationError(
            f"--budget is in {request.cap(job).currency} and the job in {job.budget.currency}; "
            "sums are never converted"
        )


def _agree_to_sample(
    request: RunRequest, job: Job, drawn: DrawnSample, settings: Settings, now: datetime, *, is_agreed: bool
) -> RunRequest:
    """Ask whether to spend; the request with what was agreed to as its cap.

    Raises ConfigurationError where nobody is there to ask.
    """
    from schemas.estimates import bound_sample, expect_pilot
    from schemas.pricing import load_price_book
    from schemas.work_hours import Asked

    book = load_price_book(settings.prices)
    expected = _compute(job, request, drawn.asks, None, settings, now)
    cost = expected.cost
    if request.is_pilot:
        cost = expect_pilot(job, drawn.asks, book, Asked(now, request.hours(job), request.due(now)))
    capped = request.capped(job, bound_sample(job, expected, max(drawn.lengths), book))
    most = f"{capped.cap(job)} at most"
    if job.budget_name is not None:
        most = f"and no more than {job.budget_name}, the budget that this job shares, has left"
    what = f"{expected.to_send} documents will be asked, {cost} expected, {most}"
    _agree_to_ask(what, is_agreed)
    return capped


def _agree_to_ask(what: str, is_agreed: bool) -> None:
    """Ask whether to send documents. Raises ConfigurationError where nobody is there to ask."""
    if is_agreed:
        tell(what)
    elif sys.stdin.isatty():
        typer.confirm(f"{what}: ask them?", abort=True, err=True)
    else:
        raise ConfigurationError(
            f"{what}, and nobody is here to ask whether to: nothing was sent; say --yes if you do"
        )


def _require_same(asked: RunId, drawn: RunId | None) -> None:
    """Raises RunPaused where the run that was opened is not of the sample that was drawn."""
    if asked != drawn:
        raise RunPaused(
            f"the input or the job changed meanwhile: run {asked} asked other documents than were drawn, so nothing "
            "follows from it; its answers stay on the ledger: run the same command again"
        )


def _ask_sample(
    request: RunRequest, job: Job, settings: Settings, is_quiet: bool, promise: Promise | None = None
) -> RunId:
    """The number of the sample's run, once it is done. Raises RunPaused."""
    begin = None if promise is None else partial(_begin_pilot, promise=promise)
    with _view(job.name, is_quiet) as view:
        outcome = _resumably(lambda: _enrich(request, job, settings, view, begin), lambda: view.has_seen_run)
    if outcome["state"] != "done":
        raise RunPaused(f"the sample's run {outcome['run_id']} paused: {outcome['advice']}")
    return cast("RunId", outcome["run_id"])


@app.command()
def calibrate(
    job: JobName,
    target: Annotated[
        str, typer.Option("--target", metavar="SHARE", help="The share of answers that should be the last tier's.")
    ] = "0.95",
    delta: Annotated[
        str, typer.Option("--delta", metavar="RISK", help="How likely a promise of that may fail.")
    ] = "0.05",
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", metavar="N", help="Documents of the pilot, 10 to 1000. Default: 200.", show_default=False
        ),
    ] = None,
    partition: Partitions = None,
    limit: Limit = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SUM",
            help="A hard cap on the pilot. Default: the most that you are told, or the job's if that is less.",
        ),
    ] = None,
    off_peak: OffPeak = None,
    in_sandbox: InSandbox = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the pilot is sent.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Have the first and the last tier answer a sample, once, and say which policy is cheapest for the job."""
    from tasks import calibration_report
    from tasks.pilots import find_calibration

    promise = _promise(target, delta)
    request = _request(job, partition, limit, budget, 1, None, off_peak, None, sample, is_pilot=True)
    loaded = request.adapt(_load_job(job, in_sandbox))
    asked = _asked(request, loaded, in_sandbox, is_agreed=yes, is_quiet=quiet, promise=promise)
    with asked as (settings, drawn, run_id):
        find = partial(find_calibration, job=loaded, drawn=drawn, run_id=run_id, promise=promise)
        found = wait_for(_ask_at(_database(settings), find, as_lane=True))
    if as_json:
        print_json(calibration_report.calibration_json(found))
    else:
        show(*calibration_report.calibration_report(found))


def _promise(target: str, delta: str) -> Promise:
    """Raises ConfigurationError where that is none."""
    from schemas.promises import Promise

    try:
        return Promise.parse(target, delta)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigurationError(f"--target, --delta: {error}") from None


@app.command()
def compare(
    job: JobName,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="FILE",
            help="Another prompt, or YAML with those of the job's keys that it changes; may be repeated.",
        ),
    ] = None,
    against: Annotated[
        list[int] | None,
        typer.Option(
            "--against", metavar="RUN", help="A run of the job, by what it was answered and paid; may be repeated."
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", metavar="N", help="Documents, 10 to 1000. Default: 200.", show_default=False),
    ] = None,
    partition: Partitions = None,
    limit: Limit = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SUM",
            help="A hard cap on all of it. Default: the most that you are told, or the job's if that is less.",
        ),
    ] = None,
    off_peak: OffPeak = None,
    in_sandbox: InSandbox = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the sample is sent.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Have a job and variants of it answer one sample, once, and say what the differences are worth."""
    from schemas.requests import USUAL_PILOT
    from tasks import comparison_report, comparisons

    request = _compare_request(
        job=job,
        variants=tuple(variant or ()),
        against=tuple(against or ()),
        sample=USUAL_PILOT if sample is None else sample,
        partitions=tuple(partition or ()),
        limit=limit,
        budget=budget,
        when=_hours(off_peak),
    )
    loaded = _load_job(job, in_sandbox)
    _check_cap(request.runs()[0], loaded)
    with ExitStack() as stack:
        stack.enter_context(_stdout_kept())
        settings = _settings()
        if in_sandbox:
            settings = stack.enter_context(_sandbox(settings, tell))
        field = wait_for(comparisons.find_field(request, settings))
        if field.missing:
            agreed = _agree_to_compare(field, settings, _now(settings, in_sandbox), is_agreed=yes or settings.sandbox)
            field = _ask_field(field, agreed, settings, quiet)
        found = wait_for(comparisons.conclude(field, settings))
    if as_json:
        print_json(comparison_report.comparison_json(found))
    else:
        show(*comparison_report.comparison_report(found))


def _compare_request(**asked: Any) -> CompareRequest:
    """What was asked for, as a value. Raises ConfigurationError where it makes no sense."""
    from pydantic import ValidationError

    from schemas.requests import CompareRequest

    try:
        return CompareRequest(**asked)
    except ValidationError as error:
        raise ConfigurationError(*_explain(error, "--")) from None


def _agree_to_compare(field: Field, settings: Settings, now: datetime, *, is_agreed: bool) -> CompareRequest:
    """Ask whether to spend; the request with what was agreed to as its cap.

    Raises ConfigurationError where nobody is there to ask.
    """
    from schemas.estimates import bound_sample
    from schemas.money import Money
    from schemas.pricing import load_price_book

    book = load_price_book(settings.prices)
    cost, most = 0, field.spent
    for each in field.missing:
        expected = _compute(each.job, each.request, each.drawn.asks, None, settings, now)
        cost += expected.cost.pico
        most += bound_sample(each.job, expected, max(each.drawn.lengths), book).pico
    first = field.entrants[0]
    currency = first.job.budget.currency
    capped = first.request.capped(first.job, Money(most, currency))
    told = f"{capped.cap(first.job)} at most"
    if first.job.budget_name is not None:
        told = f"and no more than {first.job.budget_name}, the budget that this job shares, has left"
    names = ", ".join(each.name for each in field.missing)
    before = f", with {Money(field.spent, currency)} that were paid before" if field.spent else ""
    documents = f"{first.drawn.asks.to_send:,} documents will be asked for each of {len(field.missing)} ({names})"
    what = f"{documents}, {Money(cost, currency)} expected, {told}{before}"
    _agree_to_ask(what, is_agreed)
    return field.request.model_copy(update={"budget": capped.budget})


def _ask_field(field: Field, agreed: CompareRequest, settings: Settings, is_quiet: bool) -> Field:
    """The same once all of it was asked. Raises RunPaused."""
    from tasks.comparisons import look_again

    first = field.missing[0]
    selections = [each.request.selection(each.job) for each in field.missing]
    begin = partial(_begin_comparison, asked=agreed)
    with _view(first.job.name, is_quiet) as view:
        outcome = _resumably(
            lambda: _enrich(first.request, first.job, settings, view, begin, selections), lambda: view.has_seen_run
        )
    if outcome["state"] != "done":
        raise RunPaused(f"run {outcome['run_id']} of the comparison paused: {outcome['advice']}")
    field = wait_for(look_again(field, settings))
    if field.missing:
        raise RunPaused(
            f"{field.missing[0].name} was not asked the documents that were drawn: the input or the job changed "
            "meanwhile, or Prefect went away; its answers stay on the ledger: run the same command again"
        )
    return field


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The job's name: a-z, 0-9, - and _.")],
    as_json: AsJson = False,
) -> None:
    """Write a small job that works, to start from."""
    from tasks.jobs import write_new_job

    folder = write_new_job(name, ROOT)
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        return print_json({"job": name, "folder": str(folder), "files": files})
    show(
        f"{folder}: {', '.join(files)}\n\n"
        f"1. say where your documents are: {folder}/job.yaml, `input`\n"
        f"2. write the prompt and the answer: {folder}/prompt.md, {folder}/answer.py\n"
        f"3. farthing estimate {name}\n"
        f"4. farthing run {name} --limit 100 --sandbox     (emulated answers, costs nothing)\n"
        f"5. farthing run {name} --limit 100"
    )


# What the ledger says


@app.command()
def audit(
    target: Target = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="SIDE",
            help="Split it by job, run, day, tier, model, purpose or hours instead; may be repeated.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=0, max=1000, metavar="N", help="Name the N dearest documents.")
    ] = 5,
    distinct: Annotated[
        bool,
        typer.Option("--distinct", help="Count the different documents of several runs, however many there are."),
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the lines of --by, or all there are, as CSV.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="The same as Parquet, with exact decimals.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a report page: one file, with charts, for any browser."),
    ] = None,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run, a job or the whole ledger cost, and what for."""
    from tasks import report
    from tasks.ledger import spend

    run_id, job = _parse_target(target)
    sides = _parse_sides(by, is_export=bool(csv or parquet))

    async def read(ledger: Ledger) -> tuple[Audit | None, Sequence[RunSummary]]:
        listed = [] if run_id else await spend.list_runs(ledger, job=job)
        if target is None and len({(each.currency, each.is_simulated) for each in listed}) > 1:
            return None, listed  # sums of two currencies, or of real and simulated money, would mean nothing
        return await spend.audit(ledger, run=run_id, job=job, by=sides, top=top, distinct=distinct), listed

    page = None if html is None else _find_page(run_id, job, sides, top, distinct, in_sandbox)
    found, listed = _ask(read, in_sandbox) if page is None else (page.audit, page.runs)
    if found is None:
        _tell_unlike_runs(is_refused=bool(sides))
    else:
        _export(found, csv, parquet)
    if html is not None and page is not None:
        _write_page(page if by else page.without_lines(), html)
    if as_json:
        print_json((found.to_json() if found else {}) | {"run_list": [each.to_json() for each in listed]})
    elif found is not None and by:
        show(report.line_table(found))
    else:
        show(*(report.audit_report(found) if found else ()), *([] if run_id else [report.run_table(listed)]))


def _parse_sides(given: Sequence[str] | None, *, is_export: bool) -> tuple[Side, ...]:
    """What to split a spend by; for an export, where nobody says, everything."""
    from schemas.spending import Side

    wanted = dict.fromkeys(given or ())
    if unknown := [name for name in wanted if name not in set(Side)]:
        raise ConfigurationError(f"--by: a spend cannot be split by {unknown[0]!r}, only by {', '.join(Side)}")
    return tuple(map(Side, wanted)) or (tuple(Side) if is_export else ())


def _tell_unlike_runs(*, is_refused: bool) -> None:
    told = "this ledger holds real and simulated runs, or two currencies: audit a job or a run by itself"
    if is_refused:
        raise ConfigurationError(told)
    tell(told)


def _export(found: Audit, csv: Path | None, parquet: Path | None) -> None:
    if csv is None and parquet is None:
        return
    from tasks import exports

    for path, write in ((csv, exports.write_csv), (parquet, exports.write_parquet)):
        if path is not None:
            write(found, path)
            tell(f"{path}: {len(found.lines):,} lines, by {', '.join(found.by)}")


def _find_page(
    run_id: int | None, job: str | None, sides: Sequence[Side], top: int, distinct: bool, in_sandbox: bool
) -> Page:
    from schemas.pricing import load_price_book
    from tasks.pages import find_page

    book = load_price_book(_settings().prices)
    with _ledger_address(in_sandbox) as url:
        return wait_for(find_page(url, book, run=run_id, job=job, by=sides, top=top, distinct=distinct))


def _write_page(page: Page, path: Path) -> None:
    from tasks.pages import write_page

    size = write_page(page, path)
    tell(f"{path}: {size // 1000:,} kB; open it in a browser")


@app.command()
def whatif(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's number, or a job's name for its newest run.")],
    ladder: Annotated[
        str | None,
        typer.Option(
            "--ladder", metavar="A,B", help="These steps instead: tiers of the run, or models with a price."
        ),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option("--threshold", metavar="X", help="Escalate what is less sure than this, 0 to 1.")
    ] = None,
    off_peak: Annotated[bool, typer.Option("--off-peak", help="All of it at off-peak prices.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="No prompt token is cached.")] = False,
    prices: Annotated[
        str | None, typer.Option("--prices", metavar="DATE", help="At the cards of a day, like 2026-05-01.")
    ] = None,
    self_hosted: Annotated[
        str | None,
        typer.Option("--self-hosted", metavar="M", help="On this machine of the price files."),
    ] = None,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run would have cost otherwise, by its own attempts. Nothing is sent. Without options: the usual."""
    from schemas.pricing import load_machines, load_price_book
    from schemas.whatif import Scenario
    from tasks import whatif as comparing
    from tasks.ledger.whatif import find_past

    run_id, job = _parse_target(run)
    own = _settings().prices
    below, book = _parse_threshold(threshold), load_price_book(own)
    machines = [each.model_copy(update={"hosts": book.canonical(each.hosts)}) for each in load_machines(own)]
    scenario = Scenario(
        ladder=tuple(name.strip() for name in ladder.split(",")) if ladder else (),
        is_off_peak=off_peak,
        has_cache=not no_cache,
        prices_at=None if prices is None else _parse_day(prices),
        hosts={} if self_hosted is None else _find_hosts(self_hosted, machines),
    )

    async def read(ledger: Ledger) -> Comparison:
        number = run_id or await _find_newest(ledger, job)
        was = await find_past(ledger, number, book)
        if scenario.hosts and not {book.canonical(tier.model) for tier in was.tiers} & set(scenario.hosts):
            raise ConfigurationError(f"--self-hosted: {self_hosted} hosts no model of run {number}; name another")
        if scenario == Scenario() and below is None:
            return comparing.compare(was, book, machines)
        past = was if below is None else await find_past(ledger, number, book, below)
        return comparing.ask(was, past, scenario, book, machines)

    found = _ask(read, in_sandbox)
    if as_json:
        print_json(comparing.comparison_json(found))
    else:
        show(*comparing.comparison_report(found))


def _parse_threshold(given: str | None) -> Decimal | None:
    from decimal import Decimal, InvalidOperation

    if given is None:
        return None
    try:
        below = Decimal(given)
    except InvalidOperation:
        below = Decimal(-1)
    if not below.is_finite() or not 0 <= below <= 1:
        raise ConfigurationError(f"--threshold: {given!r} is no confidence; write a number from 0 to 1, like 0.85")
    return below


def _parse_day(given: str) -> datetime:
    """A day begins at midnight UTC; an instant is taken as it is."""
    return _parse_instant(f"{given}T00:00:00Z" if len(given) == len("2026-05-01") else given)


def _find_hosts(given: str, machines: Sequence[Machine]) -> dict[str, str]:
    """The model that a machine takes the place of. Raises ConfigurationError with the machines there are."""
    hosts = {machine.model: machine.hosts for machine in machines}
    if given not in hosts:
        raise ConfigurationError(
            f"--self-hosted: there is no machine {given!r}, only {', '.join(hosts)}; "
            "add yours to a price file of your own (README: Prices)"
        )
    return {hosts[given]: given}


@app.command()
def status(
    target: Target = None,
    in_sandbox: InSandbox = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, and why it waits when it waits."""
    from tasks import report
    from tasks.ledger import spend

    run_id, job = _parse_target(target)

    async def read(ledger: Ledger) -> Progress:
        return await spend.progress(ledger, run_id or await _find_newest(ledger, job), counts_open=True)

    progress = _ask(read, in_sandbox)
    if watch and progress.state == "running":
        with suppress(KeyboardInterrupt):  # one stops watching, the run goes on
            progress = _watch(progress, in_sandbox)
    if as_json:
        print_json(progress.to_json())
    else:
        show(report.progress_table(progress))


def _watch(seen: Progress, in_sandbox: bool) -> Progress:
    """Show a run until it no longer runs; returns how it was left."""
    with _ledger_address(in_sandbox) as url, _view(seen.job, is_quiet=False) as view:
        view.follow(url, seen.run)
        return view.wait() or seen


@app.command()
def pause(target: Target = None, in_sandbox: InSandbox = False, as_json: AsJson = False) -> None:
    """Let a run begin nothing more and finish what is in flight, from wherever. Default: the only one that runs."""
    from tasks import report, steering

    async def order(ledger: Ledger) -> Steered:
        return await steering.pause(ledger, await steering.find(ledger, *_parse_target(target), ("running",)))

    steered = _ask(order, in_sandbox, as_lane=True)
    _tell_steered(steered, report.paused_lines(steered), as_json)


@app.command()
def limit(
    target: UnfinishedRun,
    ceilings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[N|TIER=N …]", help="One number for every tier, as in a job file, or one per tier."),
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="As many as the job says, again.")] = False,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Say how many requests of a run may be in flight, over all its lanes, from now on and when it is resumed."""
    from tasks import report, steering

    if bool(ceilings) is reset:
        raise ConfigurationError(
            f"say how many may be in flight, like `farthing limit {target} 16` or flash=64 pro=8, or else --reset"
        )

    async def order(ledger: Ledger) -> Limited:
        return await steering.limit(ledger, await steering.find(ledger, *_parse_target(target)), ceilings or None)

    limited = _ask(order, in_sandbox, as_lane=True)
    _tell_steered(limited, report.limited_lines(limited), as_json)


@app.command()
def budget(
    target: UnfinishedRun,
    cap: Annotated[str, typer.Argument(metavar="SUM", help='Like "5 USD" or "30 CNY"; a bare number is USD.')],
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Give a run another hard cap, while it goes on or is paused. A shared budget: for all who name it."""
    from tasks import report, steering

    async def order(ledger: Ledger) -> Capped:
        return await steering.cap(ledger, await steering.find(ledger, *_parse_target(target)), cap)

    capped = _ask(order, in_sandbox, as_lane=True)
    _tell_steered(capped, report.capped_lines(capped), as_json)


def _tell_steered(steered: Steered, lines: str, as_json: bool) -> None:
    if as_json:
        print_json(steered.to_json())
    else:
        show(lines)


@app.command()
def verify(
    target: Annotated[
        str | None, typer.Argument(metavar="[JOB|RUN|MONTH]", help="A job's name, a run's number, or a closed month.")
    ] = None,
    currency: InCurrency = None,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Prove from its rows what the ledger claims about a run, or a job's newest one, or about a closed month."""
    from schemas.months import Month
    from tasks import report
    from tasks.ledger.connection import PermissionRefused

    if target is not None and (month := Month.find(target)) is not None:
        return _verify_month(month, currency, in_sandbox, as_json)
    if currency is not None:
        raise ConfigurationError("--currency is for a MONTH, like 2026-11: a run has its own")
    run_id, job = _parse_target(target)

    async def find_and_prove(ledger: Ledger) -> Proof:
        return await _prove(ledger, run_id or await _find_newest(ledger, job))

    try:
        proof = _ask(find_and_prove, in_sandbox, as_lane=True)
    except PermissionRefused:
        raise ConfigurationError(
            "verify reads the rows themselves, and this login may only read the views: use a login that is a member "
            "of farthing_lane, or GRANT farthing_lane TO this one; `farthing audit` needs no more than it has"
        ) from None
    if as_json:
        print_json(proof.to_json())
    else:
        show(report.proof_table(proof), report.proof_line(proof))
    raise typer.Exit(0 if proof.proved else LedgerMismatch.exit_code)


def _verify_month(month: Month, currency: str | None, in_sandbox: bool, as_json: bool) -> None:
    """Hold a closed month against its rows; leaves with the exit code."""
    from tasks import bookkeeping
    from tasks.ledger.books import find_checked_month

    stated = None if currency is None else _parse_currency(currency)[0]

    async def check(ledger: Ledger) -> Checked:
        return await find_checked_month(ledger, await _find_scope(ledger, None, month, stated, in_sandbox))

    checked = _ask(check, in_sandbox)
    if as_json:
        print_json(bookkeeping.checked_json(checked))
    else:
        show(*bookkeeping.checked_report(checked))
    raise typer.Exit(LedgerMismatch.exit_code if checked.differences else 0)


# The books


@app.command()
def reconcile(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|MONTH", help="A run's number, a job's name for its newest run, or like 2026-11."),
    ],
    exports: Annotated[
        list[Path],
        typer.Argument(metavar="EXPORT…", help="What the console's usage page exports: a ZIP, or its CSV files."),
    ],
    close: Annotated[
        bool,
        typer.Option(
            "--close",
            help="Book what unknown attempts were billed, one new row each. Superseded runs' dead lanes end first.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --close: do not ask.")] = False,
    key: Annotated[
        str | None, typer.Option("--key", metavar="NAME", help="Only what this API key used (api_key_name).")
    ] = None,
    complete: Annotated[
        bool,
        typer.Option("--complete", help="The export has all there is: what it does not have was not billed."),
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Nothing but this ledger used the account on these days.")
    ] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every line as CSV.")] = None,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Compare the ledger with the provider's own export, and close unknown attempts by it.

    By UTC day, model, kind of token, price and user_id, over the days of a run or all of a month: an export is a sum
    over all runs of those days. No row is ever changed; running it twice books nothing twice. It closes attempts
    where the export is split by requests' user_id, is of one --key, or of an account that this ledger used --alone.
    Exit code 4: lines differ by more than unknown attempts explain.
    """
    from schemas.months import Month
    from schemas.pricing import load_price_book
    from tasks import bookkeeping
    from tasks.ledger.connection import Role
    from tasks.statements import load_statement

    statement, month = load_statement(exports, key), Month.find(target)
    judge = bookkeeping.Judge(statement, load_price_book(_settings().prices), is_complete=complete, is_alone=alone)

    async def compare(ledger: Ledger) -> Outcome:
        run_id, job = (None, None) if month else _parse_target(target)
        run = None if month else run_id or await _find_newest(ledger, job)
        scope = await _find_scope(ledger, run, month, statement.currency, in_sandbox, has_export=True)
        return await bookkeeping.compare(ledger, scope, judge)

    if close:
        _bury_superseded(in_sandbox)
    outcome = _ask(compare, in_sandbox)
    if close and outcome.found.bookable and _agree_closing(outcome, yes):
        book = partial(bookkeeping.book, seen=outcome, judge=judge)
        outcome = _ask(book, in_sandbox, role=Role.BOOKKEEPER)
    if csv is not None:
        bookkeeping.write_lines(outcome.after, csv)
        tell(f"{csv}: {len(outcome.after.matches):,} lines")
    if as_json:
        print_json(bookkeeping.reconciliation_json(outcome))
    else:
        show(*bookkeeping.reconciliation_report(outcome))
    raise typer.Exit(0 if outcome.is_clean else LedgerMismatch.exit_code)


def _agree_closing(outcome: Outcome, is_agreed: bool) -> bool:
    """Ask whether to book. Raises ConfigurationError where nobody is there to ask."""
    from schemas.money import Money

    if is_agreed:
        return True
    found, currency = outcome.found, outcome.scope.currency
    parts = []
    if found.closings:
        runs = _list_runs(each.of.run for each in found.closings)
        parts += [f"{Money(found.closed_pico, currency)} for {len(found.closings)} unknown attempts of {runs}"]
    if found.corrections:
        runs = _list_runs(each.run for each in found.corrections)
        parts += [f"a correction of {found.corrected_pico:,} pico {currency} of {runs}"]
    what = f"{' and '.join(parts)}, for good"
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"this books {what}, and nobody is here to ask: nothing was; say --yes if you mean it"
        )
    return typer.confirm(f"book {what}?", err=True)


def _list_runs(runs: Iterable[int]) -> str:
    return f"run {', '.join(map(str, sorted(set(runs))))}"


@app.command("close")
def close_month(
    month: Annotated[str, typer.Argument(metavar="MONTH", help="A UTC month that is over, like 2026-10.")],
    with_unknown: Annotated[
        bool, typer.Option("--with-unknown", help="Although attempts are left that may have been billed.")
    ] = False,
    currency: InCurrency = None,
    in_sandbox: InSandbox = False,
    as_json: AsJson = False,
) -> None:
    """Close the books of a month: freeze what it came to, with a digest over its rows.

    Nothing moves booked cost, later prices least of all: `farthing whatif` prices it anew beside it. What is booked
    for a closed month later counts, and `farthing verify MONTH` shows it as late.
    """
    from schemas.months import Month
    from tasks import bookkeeping
    from tasks.ledger import books
    from tasks.ledger.connection import Role

    wanted = Month.find(month)
    if wanted is None:
        raise ConfigurationError(f"{month!r} is no month: write it like 2026-10")
    stated = None if currency is None else _parse_currency(currency)[0]

    async def order(ledger: Ledger) -> Closed:
        scope = await _find_scope(ledger, None, wanted, stated, in_sandbox)
        return await books.close_month(ledger, scope, with_unknown=with_unknown)

    _bury_superseded(in_sandbox)
    closed = _ask(order, in_sandbox, role=Role.BOOKKEEPER)
    if as_json:
        print_json(bookkeeping.closed_json(closed))
    else:
        show(*bookkeeping.closed_report(closed))


def _bury_superseded(in_sandbox: bool) -> None:
    """What dead lanes of superseded runs left open may have been billed, and can be closed: nobody resumes those."""
    from tasks.ledger.connection import PermissionRefused
    from tasks.ledger.leases import bury_superseded

    with suppress(PermissionRefused):  # a bookkeeper who is no lane is told what stays
        _ask(bury_superseded, in_sandbox, as_lane=True)


async def _find_scope(
    ledger: Ledger,
    run: int | None,
    month: Month | None,
    stated: Currency | None,
    in_sandbox: bool,
    *,
    has_export: bool = False,
) -> Scope:
    """Which money is meant. The sandbox's is simulated, and so is what its address was exported for."""
    from tasks.ledger.books import find_scope

    settings = _settings()
    is_simulated = in_sandbox or settings.sandbox or settings.database_url is None
    return await find_scope(ledger, run, month, stated, is_simulated=is_simulated, has_export=has_export)


prices = typer.Typer(name="prices", help="What a token costs, and whether others say the same.", **_OPEN)
app.add_typer(prices)


@prices.callback(invoke_without_command=True)
def show_prices(
    context: typer.Context,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="2026-11-25T02:00:00Z (default: now).")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="Only this model.")] = None,
    currency: Annotated[
        str | None, typer.Option("--currency", metavar="C", help="USD or CNY (default: all).")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Models to compare with, and self-hosted ones, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a token costs at an instant, and when that changes."""
    if context.invoked_subcommand is not None:
        return
    from schemas.pricing import load_price_book
    from tasks import report

    book, instant = load_price_book(_settings().prices), _parse_instant(at)
    found = _find_prices(book, instant, model, currency, everything)
    if as_json:
        print_json({"at": instant.isoformat(), "prices": [report.price_json(each, book, instant) for each in found]})
    else:
        show(report.price_table(found, book, instant))


@prices.command("check")
def check_prices(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…", help="LiteLLM's model_prices_and_context_window.json, or model-prices' snapshot.json."
        ),
    ],
    since: Annotated[
        str | None, typer.Option("--since", metavar="DATE", help="Compare from then on. Default: the last 30 days.")
    ] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="Compare until then. Default: now.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hold the price book against public price maps. Leaves with 1 where they differ."""
    from schemas.pricing import load_price_book
    from schemas.public_prices import compare
    from tasks import report

    book, until = load_price_book(_settings().prices), _parse_instant(at)
    first = until - timedelta(days=30) if since is None else _parse_day(since)
    if first > until:
        raise ConfigurationError(f"--since {first:%Y-%m-%d} is after --at {until:%Y-%m-%d %H:%M} UTC")
    found = [compare(book, _read_map(file), first, until) for file in files]
    if idle := [str(file) for file, each in zip(files, found, strict=True) if not each.compared]:
        raise ConfigurationError(f"{', '.join(idle)}: no model of the price book is in there: nothing was compared")
    if as_json:
        print_json({"since": first.isoformat(), "at": until.isoformat(), **report.price_check_json(found)})
    else:
        show(*report.price_check_report(found))
    raise typer.Exit(int(any(each.differences for each in found)))


def _read_map(file: Path) -> PublicMap:
    from schemas.public_prices import read_map

    try:
        return read_map(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigurationError(f"{file}: cannot be read: {why}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None


def _parse_instant(given: str | None) -> datetime:
    if given is None:
        return datetime.now(UTC)
    try:
        instant = datetime.fromisoformat(given)
    except ValueError:
        raise ConfigurationError(f"{given!r} is not a time: write it like 2026-11-25T02:00:00Z") from None
    if instant.tzinfo is None:
        clock = given if "T" in given or " " in given else f"{given}T00:00"
        raise ConfigurationError(f"{given!r} has no zone: write {clock}Z for UTC, or {clock}+08:00 for Beijing")
    return instant.astimezone(UTC)


def _find_prices(
    book: PriceBook, at: datetime, model: str | None, currency: str | None, everything: bool
) -> list[Price]:
    """The rows in force. A model that was asked for must have one; of all the others, those that do are shown."""
    from schemas.errors import UnknownPrice

    cards = _parse_currency(currency)
    if model is not None:
        known = [card for card in book.currencies(model) if card in cards]
        return [book.at(model, card, at) for card in known or cards]
    models = [name for name in book.models if everything or name.startswith("deepseek-")]
    found = []
    for name in models:
        for card in (card for card in book.currencies(name) if card in cards):
            with suppress(UnknownPrice):
                found.append(book.at(name, card, at))
    if kept := [price for price in found if everything or not price.is_what_if_only]:
        return kept
    first = min(price.valid_from for price in book.rows() if price.model in models and price.currency in cards)
    why = f"the first one is from {first:%Y-%m-%d}" if at < first else "the peak hours of that year are not known yet"
    raise UnknownPrice(f"no price is known at {at:%Y-%m-%d %H:%M} UTC: {why}")


def _parse_currency(given: str | None) -> list[Currency]:
    from schemas.money import Currency

    try:
        return list(Currency) if given is None else [Currency(given.upper())]
    except ValueError:
        raise ConfigurationError(f"{given!r} is no currency that DeepSeek bills in: USD or CNY") from None


# The ledger's tables


@db.command("upgrade")
def db_upgrade(in_sandbox: InSandbox = False, as_json: AsJson = False) -> None:
    """Make or update the ledger's tables, views and roles. Safe to repeat."""
    from tasks.ledger.upgrades import upgrade

    with _ledger_address(in_sandbox) as url:
        version = upgrade(url)
    if as_json:
        print_json({"version": version})
    else:
        show(f"the ledger is at version {version}")


@db.command("status")
def db_status(in_sandbox: InSandbox = False, as_json: AsJson = False) -> None:
    """Say whether the ledger can be reached and is up to date."""
    from tasks.ledger.connection import find_version

    version = _ask(find_version, in_sandbox)
    if as_json:
        print_json({"version": version})
    else:
        show(f"the ledger is there, and at version {version}, the newest")


# The sandbox


@sandbox.command("up")
def sandbox_up(as_json: AsJson = False) -> None:
    """Start the DeepSeek and the Postgres of this machine, and leave them running."""
    from pydantic import SecretStr

    from sandbox import postgres, service
    from tasks.ledger.upgrades import upgrade

    settings = _settings()
    server = postgres.up(settings.home)
    upgrade(SecretStr(server.url))
    endpoint = service.up(settings.home, **_service_options(settings))
    addresses = _addresses(server.url, endpoint.url, endpoint.api_key)
    if as_json:
        return print_json(addresses)
    if sys.stdout.isatty():  # not where a shell reads it
        tell("to use them with other tools, or as if they were the real ones:")
    print("\n".join(f"export {name}={value!r}" for name, value in addresses.items()))


@sandbox.command("down")
def sandbox_down(force: Force = False, as_json: AsJson = False) -> None:
    """Stop both. What they hold stays."""
    from sandbox import postgres, service

    home = _settings().home
    _require_unused(home, "down", force)
    postgres.down(home, force=force)  # first: whoever uses the DeepSeek uses this, too, and for longer
    service.down(home, force=force)
    if as_json:
        print_json({"running": False})
    else:
        show("the sandbox is down; its ledger and its bill are kept")


@sandbox.command("reset")
def sandbox_reset(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Stop both and delete all they hold: every sandbox run, and the bill."""
    import shutil

    from sandbox import postgres, service

    home = _settings().home
    _require_unused(home, "reset", force)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("this deletes every sandbox run and its bill: say --yes if you mean it")
        typer.confirm(f"Delete every sandbox run and its bill in {home}?", abort=True, err=True)
    postgres.reset(home, force=force)
    service.reset(home, force=force)
    shutil.rmtree(home / "prefect", ignore_errors=True)
    if as_json:
        print_json({"reset": True})
    else:
        show("the sandbox is empty")


def _require_unused(home: Path, command: str, is_forced: bool) -> None:
    """Raises ConfigurationError that names the processes which use the sandbox, and their runs."""
    from sandbox import postgres
    from tasks.ledger.spend import list_living_lanes

    users = [] if is_forced else postgres.users(home)
    if not users:
        return
    lanes: Sequence[tuple[int, int]] = []
    if (server := postgres.status(home)) is not None:
        from pydantic import SecretStr

        with suppress(FarthingError):  # a ledger that cannot be read has no runs to tell of
            lanes = wait_for(_ask_at(SecretStr(server.url), list_living_lanes))
    told = [f"run {run} (its lane is process {pid})" for run, pid in lanes]
    told += [f"process {pid}" for pid in users if pid not in {lane for _, lane in lanes}]
    raise ConfigurationError(
        f"the sandbox is in use by {', '.join(told)}: end that first, with Ctrl-C where it runs or `kill -INT PID`; "
        f"`farthing sandbox {command} --force` cuts it off in mid-run"
    )


@sandbox.command("status")
def sandbox_status(as_json: AsJson = False) -> None:
    """Say what runs, and what the sandbox has billed."""
    from sandbox import postgres, service
    from schemas.money import Currency, Money

    home = _settings().home
    server, deepseek = postgres.status(home), service.status(home)
    bill = deepseek.bill
    if as_json:
        return print_json(
            {
                "postgres": {"running": server is not None, "port": server.port if server else None},
                "deepseek": {"running": deepseek.endpoint is not None, "kept": deepseek.is_kept},
                "attempts": bill.attempts,
                "cost_pico": bill.cost_pico,
                "currency": bill.currency,
            }
        )
    show(
        f"Postgres  {f'on port {server.port}' if server else 'not running'}\n"
        f"DeepSeek  {f'at {deepseek.endpoint.url}' if deepseek.endpoint else 'not running'}\n"
        f"billed    {Money(bill.cost_pico, Currency(bill.currency))} for {bill.attempts:,} attempts"
    )


@sandbox.command("bill")
def sandbox_bill(as_json: AsJson = False) -> None:
    """Say what the sandbox billed, from its own files: the figure an audit must meet."""
    from sandbox.bill import read_bill
    from schemas.money import Currency, Money

    bill = read_bill(_settings().home)
    if as_json:
        print_json({"attempts": bill.attempts, "cost_pico": bill.cost_pico, "currency": bill.currency})
    else:
        show(
            f"{Money(bill.cost_pico, Currency(bill.currency))} for {bill.attempts:,} attempts ({bill.cost_pico} pico)"
        )


@sandbox.command("export")
def sandbox_export(
    file: Annotated[Path, typer.Argument(metavar="FILE.zip", help="Where to write it.")],
    month: Annotated[
        str | None, typer.Option("--month", metavar="M", help="Like 2026-11. Default: the newest that was billed.")
    ] = None,
    by_request: Annotated[
        bool, typer.Option("--by-request", help="Split by the user_id of requests, not one for the whole account.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what the sandbox billed in a month as DeepSeek's console exports it: to reconcile with."""
    from sandbox.bill import bill_path
    from sandbox.export import export_month, newest_month
    from schemas.months import Month

    bill = bill_path(_settings().home)
    wanted = month or newest_month(bill)
    if Month.find(wanted) is None:
        raise ConfigurationError(f"--month: {wanted!r} is no month: write it like 2026-11")
    try:
        file.write_bytes(export_month(bill, wanted, by_request=by_request))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}; name another file") from None
    if as_json:
        print_json({"file": str(file), "month": wanted})
    else:
        show(f"{file}: what the sandbox billed in {wanted}\nfarthing reconcile {wanted} {file}")


# Where things are


def _settings() -> Settings:
    """The environment, read anew. Raises ConfigurationError that names the variable and not its value."""
    from pydantic import ValidationError

    from schemas.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        raise ConfigurationError(*_explain(error, "FARTHING_")) from None


def _explain(error: ValidationError, prefix: str) -> list[str]:
    """Each of pydantic's complaints as a line, without the value, which may be a secret."""
    lines = []
    for each in error.errors(include_url=False, include_input=False):
        name = ".".join(map(str, each["loc"]))
        what = each["msg"].removeprefix("Value error, ")
        lines.append(f"{name if name.isupper() else _spell(prefix, name)}: {what}" if name else what)
    return lines


def _spell(prefix: str, name: str) -> str:
    """A field as a user wrote it: `--budget`, `FARTHING_TIME_SCALE`."""
    return prefix + (name.upper() if prefix.isupper() else name.replace("_", "-"))


def _database(settings: Settings) -> SecretStr:
    from tasks.enrichment import require_database

    return require_database(settings)


def _has_sandbox_ledger(settings: Settings) -> bool:
    return (settings.home / "postgres").exists()


@contextmanager
def _ledger_address(in_sandbox: bool) -> Iterator[SecretStr]:
    """The ledger to read: the environment's, else the sandbox's for as long as the block lasts."""
    from pydantic import SecretStr

    settings = _settings()
    if settings.database_url is not None and not in_sandbox:
        yield settings.database_url
        return
    if not _has_sandbox_ledger(settings):
        raise ConfigurationError(
            f"there is no ledger: FARTHING_DATABASE_URL is not set, and {settings.home} holds no sandbox; "
            "set it to postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or run `farthing demo` first"
        )
    from sandbox import postgres

    tell(f"reading the sandbox's ledger in {settings.home}")
    with postgres.running(settings.home) as server:
        yield SecretStr(server.url)


def _ask(
    question: Callable[[Ledger], Awaitable[T]], in_sandbox: bool, *, as_lane: bool = False, role: Role | None = None
) -> T:
    """The answer of the ledger, asked as its auditor. Only a lane may read the rows themselves, or steer a run."""
    with _ledger_address(in_sandbox) as url:
        return wait_for(_ask_at(url, question, as_lane=as_lane, role=role))


async def _ask_at(
    url: SecretStr, question: Callable[[Ledger], Awaitable[T]], *, as_lane: bool = False, role: Role | None = None
) -> T:
    from tasks.ledger.connection import Role, opened

    async with opened(url, role or (Role.LANE if as_lane else Role.AUDITOR), pool_size=2) as ledger:
        return await question(ledger)


@contextmanager
def _sandbox(settings: Settings, phase: Callable[[str], None]) -> Iterator[Settings]:
    """Both servers of this machine while the block lasts, with the environment saying where they are."""
    from pydantic import SecretStr

    from sandbox import postgres, service
    from tasks.ledger.upgrades import upgrade

    phase("starting the sandbox's Postgres")
    with postgres.running(settings.home) as server:
        upgrade(SecretStr(server.url))
        phase("starting the sandbox's DeepSeek")
        with service.running(settings.home, **_service_options(settings)) as endpoint:
            os.environ.update(_addresses(server.url, endpoint.url, endpoint.api_key))
            yield _settings()


def _service_options(settings: Settings) -> dict[str, Option]:
    """The same for every command, since a DeepSeek that runs already is shared only with the same options."""
    keys = [ROOT / CORPUS / f"answers-{job}.jsonl" for job in SHIPPED]
    options: dict[str, Option] = {
        "answers": [key for key in keys if key.exists()],
        "time_scale": settings.time_scale,
    }
    if (clock := _sandbox_clock(settings)) is not None:
        options["clock"] = f"{clock:%Y-%m-%dT%H:%M:%SZ}"
    return options


def _sandbox_clock(settings: Settings) -> datetime | None:
    """Where the sandbox's clock starts; None: now. After the last year whose Chinese holidays are known nothing
    has a price, and a sandbox need not wait for the next calendar."""
    from schemas.errors import UnknownPrice
    from schemas.money import Currency
    from schemas.pricing import load_price_book
    from tasks.completions import utc_now

    if settings.sandbox_clock is not None:
        return settings.sandbox_clock.astimezone(UTC)
    try:
        load_price_book(settings.prices).at("deepseek-flash", Currency.USD, utc_now() + timedelta(days=1))
    except UnknownPrice:
        tell(f"the sandbox's clock starts at {PRICED:%Y-%m-%d}: today has no price yet (see `farthing prices`)")
        return PRICED
    return None


def _now(settings: Settings, in_sandbox: bool) -> datetime:
    """The provider's instant to price by."""
    from tasks.completions import utc_now

    return (_sandbox_clock(settings) if in_sandbox else None) or utc_now()


def _addresses(database_url: str, base_url: str, api_key: str) -> dict[str, str]:
    return {
        "FARTHING_DATABASE_URL": database_url,
        "DEEPSEEK_BASE_URL": base_url,
        "DEEPSEEK_API_KEY": api_key,
        "FARTHING_SANDBOX": "1",
    }


@contextmanager
def _view(job: str, is_quiet: bool) -> Iterator[View]:
    """What a person sees on stderr while a run goes on."""
    from rich.console import Console

    from tasks.live import View

    console = Console(stderr=True, quiet=is_quiet)
    with View(console, job) as view:
        yield view


# What is read of a run


def _parse_target(target: str | None) -> tuple[int | None, str | None]:
    """A run's number, or a job's name, or neither."""
    if target is None:
        return None, None
    return (int(target), None) if target.isdecimal() else (None, target)


async def _find_newest(ledger: Ledger, job: str | None) -> int:
    """The newest run of a job, or of all. Raises ConfigurationError where there is none."""
    from tasks.ledger.spend import list_runs

    listed = await list_runs(ledger, job)
    if not listed:
        of = f" of {job}" if job else ""
        raise ConfigurationError(
            f"there is no run{of} in this ledger yet; start one with `farthing run {job or 'JOB'}`"
        )
    return listed[0].run


async def _prove(ledger: Ledger, run_id: int) -> Proof:
    from schemas.pricing import load_price_book
    from tasks.ledger.proof import prove

    return await prove(ledger, run_id, load_price_book(_settings().prices))


async def _conclude(url: SecretStr, run_id: int) -> tuple[Audit, Proof]:
    """What the run cost and whether the ledger proves it."""
    from tasks.ledger import spend

    audit = await _ask_at(url, lambda ledger: spend.audit(ledger, run=run_id))
    return audit, await _ask_at(url, lambda ledger: _prove(ledger, run_id), as_lane=True)


if __name__ == "__main__":
    main()
