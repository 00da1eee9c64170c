"""The live view of a run: alone responsible for what a person sees on stderr while it goes on.

A thread polls the ledger as its auditor, on a connection of its own: the run's event loop may be busy for a second,
and the view must not be. On a terminal it is redrawn twice a second; elsewhere it is one line every few seconds.
Until the run has a lane at work, the phase that the command is in is shown instead, so that nothing long is silent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from schemas.errors import FarthingError
from schemas.inert import plain
from schemas.money import Currency, Money
from tasks import report
from tasks.ledger import spend
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.spend import Progress
from tasks.priming import PRIMING
from tasks.report import share

SETTLING = "settling the run"
POLL_EVERY_S = 0.5
LINE_EVERY_S = 5.0
#: A rate is that of the last so many seconds.
WINDOW_S = 10.0
#: From fewer seconds and fewer documents than this nobody can tell how long the rest takes.
ENOUGH_S, ENOUGH_DOCUMENTS = 5.0, 10
#: A look at the ledger takes milliseconds; one that takes longer than this says that Postgres is away.
AWAY_S = 3.0
#: One that gets no answer for so long is given up, for another connection.
LOOK_WITHIN_S = 10.0


@dataclass
class Pace:
    """How fast documents end, from what was seen in the last `WINDOW_S`. Instants are monotonic seconds."""

    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    def see(self, at: float, done: int) -> None:
        if len(self._seen) == 1 and self._seen[0][1] == done:
            self._seen.clear()  # the wait for the first document is not the pace of the rest
        self._seen.append((at, done))
        while len(self._seen) > 2 and at - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Documents per second; None until two looks at them."""
        if len(self._seen) < 2:
            return None
        (since, before), (until, now) = self._seen[0], self._seen[-1]
        return (now - before) / (until - since) if until > since else None

    def remaining_s(self, documents: int) -> float | None:
        """Seconds until all have ended at this rate; None where nothing moves, or too little was seen."""
        if not self.rate:
            return None
        (since, before), (until, now) = self._seen[0], self._seen[-1]
        if until - since < ENOUGH_S or now - before < ENOUGH_DOCUMENTS:
            return None
        return (documents - now) / self.rate


def project(progress: Progress) -> Money | None:
    """What the whole run comes to if the rest costs what the documents so far did, those reused for nothing apart.

    None while a lane says that it primes a tier: the documents that wait to climb there are the dear ones, and they
    are not paid yet. None, too, in the phases of a run with a promise, which end its documents in no even order.
    """
    paid = progress.done - progress.reused
    if paid <= 0 or progress.phase or PRIMING in (progress.waiting_because or ""):
        return None
    rest = -(-progress.cost_pico * (progress.documents - progress.done) // paid)
    return Money(progress.cost_pico + rest, Currency(progress.currency))


def line(progress: Progress, pace: Pace) -> str:
    """Progress in one line, for logs and pipes."""
    cost, projected = _money(progress, progress.cost_pico), project(progress)
    parts = [
        f"{progress.partitions.done}/{progress.partitions.all} partitions" if progress.partitions else None,
        f"{progress.done:,}/{progress.documents:,} documents",
        f"{pace.rate:,.0f}/s" if pace.rate is not None else None,
        f"{left} left" if (left := _left(progress, pace)) else None,
        f"{cost} of {_money(progress, progress.budget_pico)}",
        f"projected {projected}" if projected else None,
        f"cache {share(progress.hit_tokens, progress.hit_tokens + progress.miss_tokens)}",
        f"escalated {share(progress.escalated, progress.done)}",
        f"dead {progress.dead_letters:,}",
        f"in flight {progress.in_flight:,}",
        f"phase {progress.phase}" if progress.phase else None,
        f"waiting: {_wait(progress)}" if _wait(progress) else None,
    ]
    return plain(f"{progress.name}: " + " · ".join(part for part in parts if part))


def panel(progress: Progress, pace: Pace) -> RenderableType:
    """Progress as a person reads it on a terminal."""
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, progress.documents), completed=progress.done, width=40)
    rate = "" if pace.rate is None else f"{pace.rate:,.0f}/s"
    left = _left(progress, pace)
    name = Text(plain(f"{progress.job} · {progress.name}"), "bold")
    head.add_row(name, bar, f"{progress.done:,}/{progress.documents:,}", rate, f"{left} left" if left else "")
    parts: list[RenderableType] = [head, _figures(progress)]
    if progress.phase:
        parts.append(Text(plain(f"phase {progress.phase}")))
    if progress.is_simulated:
        parts.append(Text("sandbox: prices are real, the answers are simulated", "dim"))
    if reason := _wait(progress):
        parts.append(Text(plain(f"waiting: {reason}"), "yellow"))
    return Group(*parts)


def _figures(progress: Progress) -> Table:
    unknown, projected = progress.unknown_pico, project(progress)
    spent = str(_money(progress, progress.cost_pico))
    partitions = progress.partitions
    figures = {} if partitions is None else {"partitions": f"{partitions.done}/{partitions.all}"}
    figures |= {
        "spent": spent + (f" (+ at most {_money(progress, unknown)} open)" if unknown else ""),
        "projected": str(projected or "—"),
        "budget": str(_money(progress, progress.budget_pico)),
        "from cache": share(progress.hit_tokens, progress.hit_tokens + progress.miss_tokens),
        "escalated": share(progress.escalated, progress.done),
        "dead": f"{progress.dead_letters:,}",
        "in flight": f"{progress.in_flight:,}",
    }
    grid = Table.grid(padding=(0, 2))
    for _ in figures:
        grid.add_column(no_wrap=True)
    grid.add_row(*(Text(name, "dim") for name in figures))
    grid.add_row(*figures.values())
    return grid


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 20 s` or `5 h 12 min`; — where it is not known."""
    if seconds is None:
        return "—"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _wait(progress: Progress) -> str | None:
    """Why it waits. A run whose documents have all ended has no lane any more and waits for nothing."""
    return progress.waiting_because if progress.done < progress.documents else None


def _left(progress: Progress, pace: Pace) -> str | None:
    """How long the rest takes; None where that is not known, and where a run that drains will not do the rest."""
    if progress.phase:  # documents end in none of its phases at the pace of another
        return None
    seconds = None if (_wait(progress) or "").startswith("draining") else pace.remaining_s(progress.documents)
    return None if seconds is None else duration(seconds)


def _money(progress: Progress, pico: int) -> Money:
    return Money(pico, Currency(progress.currency))


class View:
    """What is shown on `console` about one job's run, from the first phase to the end. A context manager."""

    def __init__(self, console: Console, job: str, tick: Callable[[], float] = time.monotonic) -> None:
        self._console, self._job, self._tick = console, job, tick
        self._phase, self._phase_since = "", tick()
        self._url: SecretStr | None = None
        self._run_id: int | None = None
        self._is_of_backfill = False
        self._progress: Progress | None = None
        self._budget: Money | None = None
        self._selections: Sequence[Mapping[str, Any]] = ()
        self._looked_at = tick()
        self._pace = Pace()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._poller = threading.Thread(target=self._poll, name="farthing-view", daemon=True)
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if console.is_terminal and not console.quiet:
            self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._poller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the view off the terminal. Safe to repeat."""
        self._closing.set()
        self._poller.join(timeout=10)
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str) -> None:
        """Say what the command is busy with while there is no progress to show."""
        self._phase, self._phase_since = text, self._tick()
        if self._live is None:
            self._print(f"{plain(text)} …")

    def follow(
        self,
        url: SecretStr,
        run_id: int | None = None,
        *,
        budget: Money | None = None,
        selections: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Show the progress of this run, or of the job's run of such a selection that has a lane at work, once there
        is one. Of several selections, whose runs follow one another, of each in its turn.

        `budget` is the job's, which a run that is resumed need not have.
        """
        self._selections = selections
        self._run_id, self._budget, self._looked_at, self._url = run_id, budget, self._tick(), url

    def follow_backfill(self, url: SecretStr) -> None:
        """Show the progress of the job's backfill that somebody works on, as soon as there is one."""
        self._is_of_backfill = True
        self.follow(url)

    @property
    def has_seen_run(self) -> bool:
        """Whether the run that is followed has shown progress: money may have been spent by then."""
        return self._progress is not None

    @property
    def run_id(self) -> int | None:
        """The run that is followed, once it has shown progress."""
        return None if self._progress is None else self._progress.run

    def wait(self) -> Progress | None:
        """Block until the run that is followed no longer runs; returns how it was left."""
        while not self._ended.wait(0.2):
            pass
        return self._progress

    def _draw(self) -> RenderableType:
        parts = [] if self._progress is None else [panel(self._progress, self._pace)]
        if away := self._away():
            parts.append(Text(away, "yellow"))
        elif self._phase and not (self._progress and self._progress.lanes):
            waited = self._tick() - self._phase_since
            self._spinner.update(text=Text(f"{plain(self._phase)} …" + (f" {waited:.0f} s" if waited >= 1 else "")))
            parts.append(self._spinner)
        return Group(*parts)

    def _away(self) -> str | None:
        """Since when Postgres has not answered, if it does not."""
        silent = self._tick() - self._looked_at
        if self._progress is None or silent < AWAY_S:
            return None
        since = datetime.now(UTC) - timedelta(seconds=silent)
        return (
            f"waiting: Postgres has not answered since {since:%H:%M:%S} UTC ({duration(silent)}); nothing more is "
            "sent until it does. Ctrl-C leaves, and the same command goes on later"
        )

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _poll(self) -> None:
        asyncio.run(self._poll_until_closed())

    async def _poll_until_closed(self) -> None:
        printing = asyncio.create_task(self._print_often())
        while not self._closing.is_set():
            if self._url is not None:
                with suppress(FarthingError):  # what is shown says so, and the run goes on once Postgres is back
                    async with opened(self._url, Role.AUDITOR, pool_size=1, answer_within_s=LOOK_WITHIN_S) as ledger:
                        await self._look_often(ledger)
            await asyncio.sleep(POLL_EVERY_S / 2)
        printing.cancel()

    async def _look_often(self, ledger: Ledger) -> None:
        while not self._closing.is_set():
            await self._look(ledger)
            self._looked_at = self._tick()
            await asyncio.sleep(POLL_EVERY_S)

    async def _print_often(self) -> None:
        """Where there is no terminal to draw on: a line every few seconds, the first as soon as there is one."""
        while self._live is None:
            if self._progress is not None:
                self._print(self._away() or line(self._progress, self._pace))
            await asyncio.sleep(LINE_EVERY_S if self._progress else POLL_EVERY_S)

    async def _look(self, ledger: Ledger) -> None:
        progress = await self._ask(ledger)
        if progress is None:
            return
        if self._progress is None and (said := report.resumed_line(progress, self._budget)):
            self._print(said)
        if self._is_settling(progress):
            progress = replace(progress, waiting_because=None)
        if progress.run != self._run_id:
            self._pace = Pace()
        self._run_id = progress.run
        self._pace.see(self._tick(), progress.done)
        self._progress = progress
        if progress.state != "running":
            self._ended.set()

    async def _ask(self, ledger: Ledger) -> Progress | None:
        if self._is_of_backfill:
            return await spend.progress_of_backfill(ledger, self._job)
        if self._run_id is None:
            return await self._find(ledger)
        seen = await spend.progress(ledger, self._run_id)
        if seen.state == "done" and len(self._selections) > 1:
            return await self._find(ledger) or seen
        return seen

    def _is_settling(self, progress: Progress) -> bool:
        """Whether the lanes of this command have left. A run that is only watched has none and waits for a start."""
        if self._budget is None or progress.lanes:
            return False
        if self._phase != SETTLING:
            self._phase, self._phase_since = SETTLING, self._tick()
        return True

    async def _find(self, ledger: Ledger) -> Progress | None:
        """The job's run that is under way: a run that was killed has no lane and may be another selection's."""
        for listed in await spend.list_runs(ledger, self._job):
            if listed.state == "running":
                progress = await spend.progress(ledger, listed.run)
                if progress.lanes and progress.selection in self._selections:
                    return progress
        return None
