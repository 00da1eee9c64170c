"""Where budgets are played: many small jobs under one ledger and one emulated DeepSeek, all in this process.

Lanes run side by side in one event loop, over the real SQL and real sockets, so that a cap costs a fraction of a
second. An attempt's worst case is near what a long reply really costs (the prompt is short, answers may be long), so
that a cap binds, and a bound that is too low shows.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from pydantic import SecretStr

from sandbox.bill import bill_path, read_lines
from sandbox.deepseek import DeepSeek, build, read_options, start
from schemas.attempts import RunId
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import bulkhead, enrichment
from tasks.documents import orders
from tasks.lanes import Ended
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.proof import prove
from tasks.ledger.runs import Run
from tests.faults.checker import Beside, Violation, check
from tests.world import CLOCK, SCHEMA

JOB = """\
name: {name}
input: {{path: {name}.parquet, id: id, text: text}}
prompt: prompt.md
answer: answer.schema.json
ladder: [flash, pro]
escalate: {{below: 0.8}}
confidence: {{signal: logprobs, fields: [colour]}}
tiers: {{flash: {{max_tokens: 300, deadline_s: 5}}, pro: {{max_tokens: 300, deadline_s: 5}}}}
concurrency: {concurrency}
budget: {budget}
shard_rows: {shard_rows}
tolerance: 1
"""
PLENTY = "1 USD"
#: For all lanes together.
CONNECTIONS = 60
#: A lane that has nothing to do gives its money back, and asks what is left to do, at a test's pace.
TIMES = LeaseTimes(beat_every_s=0.5)
#: A reply as long as its tier allows, and billed so: an attempt then costs most of what was reserved for it.
LONG_REPLY = {"kind": "usage_over_max_tokens", "args": {"by": 0}}
#: What befalls replies: unbilled failures, failures of unknown billing (billed here), and answers of no use.
MISHAPS = (
    *("500", "502", "503", "rate_limited_bare", "reset_before"),
    *("reset_after", "eof", "cut", "500_html", "504_html"),
    *("blank", "null_content", "insufficient_system_resource"),
)


@dataclass(frozen=True)
class Draw:
    """What chance made of one job: all that differs from another."""

    name: str
    cap: int
    documents: int
    lanes: int
    concurrency: int
    shard_rows: int
    mishaps: tuple[dict[str, Any], ...]
    #: After so many more requests of anyone, the cap is multiplied so; (0, 1): it stays.
    change: tuple[int, float]


class Pause(NamedTuple):
    """A run or its budget at rest: the lowest cap of this leg, and what is known and bounds, in pico units."""

    cap: int
    spent: int
    granted: int


def draw(dice: random.Random, name: str, *, least: int, cost_of_one: int) -> Draw:
    """A job whose cap lies, evenly on a logarithmic scale, between a third of `least` and one and a half passes."""
    documents = dice.randint(6, 12)
    low, high = least / 3, 1.5 * cost_of_one * documents
    return Draw(
        name=name,
        cap=int(low * (high / low) ** dice.random()),
        documents=documents,
        lanes=dice.randint(1, 3),
        concurrency=dice.choice((3, 6, 16, 48)),
        shard_rows=dice.choice((3, 6, 24)),
        mishaps=tuple(_draw_mishaps(dice)),
        change=(dice.randint(1, 40), dice.choice((0.3, 0.8, 1.2, 3.0))) if dice.random() < 0.4 else (0, 1.0),
    )


def _draw_mishaps(dice: random.Random) -> list[dict[str, Any]]:
    rules = [{**LONG_REPLY, "share": dice.choice((0.0, 0.2, 0.6)), "seed": dice.randrange(10**6)}]
    for kind in dice.sample(MISHAPS, dice.randint(0, 2)):
        rules.append({"kind": kind, "share": dice.uniform(0.02, 0.15), "seed": dice.randrange(10**6)})
    return rules


@dataclass
class Purses:
    """A ledger and a provider that any number of jobs share."""

    root: Path
    database_url: str
    server: DeepSeek
    settings: Settings
    ledger: Ledger

    def write_job(self, plan: Draw, budget: str = PLENTY) -> None:
        folder = self.root / "jobs" / plan.name
        folder.mkdir(parents=True, exist_ok=True)
        shape = {"name": plan.name, "concurrency": plan.concurrency, "shard_rows": plan.shard_rows}
        (folder / "job.yaml").write_text(JOB.format(budget=budget, **shape))
        (folder / "prompt.md").write_text(f"Say in JSON which colour it is about ({plan.name}).")
        (folder / "answer.schema.json").write_text(SCHEMA)
        numbers = range(plan.documents)
        texts = [f"{plan.name}: document {number:02d} is about a colour" for number in numbers]
        table = pa.table({"id": [f"d{number}" for number in numbers], "text": texts})
        pq.write_table(table, self.root / f"{plan.name}.parquet")

    async def open(self, plan: Draw, cap: int | None) -> Run:
        """As `farthing run --budget` opens it: resumed where it is unfinished, with that cap."""
        return await enrichment.open_run(self._request(plan, cap), self.settings)

    def befall(self, run: Run, plan: Draw) -> None:
        self.server.mishaps.add([{**rule, "match": f"{run.run_id}."} for rule in plan.mishaps])

    async def work(self, run: Run, plan: Draw) -> set[str]:
        """All lanes at once, to their end; why they ended."""
        request = self._request(plan, None)
        lanes = (enrichment.work_lane(request, self.settings, run, times=TIMES) for _ in range(plan.lanes))
        return {end.reason for end in await asyncio.gather(*lanes)}

    async def settle(self, run: Run, reasons: set[str]) -> Run:
        return await enrichment.settle_run(self.settings, run, [Ended(reason) for reason in sorted(reasons)])

    def pause(self, run: Run, cap: int) -> Pause:
        """What the run's budget has spent by the attempts' rows, and granted by its own."""
        query = """
            SELECT coalesce(sum(coalesce(o.cost, u.bound, i.reserved)), 0)::bigint, min(b.granted)
            FROM run r JOIN budget b USING (budget_id)
            LEFT JOIN attempt_intent i USING (run_id)
            LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
            LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
            WHERE r.budget_id = %s
        """
        ((spent, granted),) = self.sql(query, run.budget_id)
        return Pause(cap, spent, granted)

    def overrun(self, run: Run) -> dict[str, int]:
        """The attempts that cost more than was reserved for them, and by how much."""
        query = """
            SELECT concat_ws('.', run_id, document_no, attempt_no), cost - reserved
            FROM attempt_intent JOIN attempt_outcome USING (run_id, document_no, attempt_no)
            WHERE run_id = %s AND cost > reserved
        """
        return dict(self.sql(query, run.run_id))

    def billed(self, run: Run) -> int:
        """What the provider billed for the run, by its own file."""
        lines = read_lines(bill_path(self.root))
        return sum(line["cost_pico"] for line in lines if line["attempt"].startswith(f"{run.run_id}."))

    def dearest(self, budget_id: int) -> int:
        """The greatest worst case that any attempt on this budget was reserved at."""
        query = "SELECT max(reserved) FROM attempt_intent JOIN run USING (run_id) WHERE budget_id = %s"
        return int(self.sql(query, budget_id)[0][0] or 0)

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, options="-c search_path=farthing") as connection:
            return connection.execute(query, values or None).fetchall()

    async def violations(self) -> list[str]:
        """What the checker and the product's own proof find in all runs: nothing."""
        beside = Beside(root=self.root, trickle_per_s=1000)
        found: list[Violation] = check(self.database_url, bill_path(self.root), beside)
        runs = [RunId(run_id) for (run_id,) in self.sql("SELECT run_id FROM run ORDER BY run_id")]
        book = load_price_book()
        proofs = [await prove(self.ledger, run_id, book) for run_id in runs]
        disproved = [
            f"run {proof.run} {name}: {what}"
            for proof in proofs
            for name, evidence in proof.evidence.items()
            for what in evidence.violations
        ]
        return [*map(str, found), *disproved]

    def _request(self, plan: Draw, cap: int | None) -> RunRequest:
        return RunRequest(job=plan.name, root=self.root, lanes=plan.lanes, budget=None if cap is None else say(cap))


def say(cap: int) -> str:
    """A sum as it is written on the command line, to the last pico unit."""
    return f"{Money(cap, Currency.USD).decimal:f} USD"


@asynccontextmanager
async def purses(root: Path, database_url: str) -> AsyncIterator[Purses]:
    """Over a migrated database."""
    server = build(read_options([f"--home={root}", "--time-scale=0", f"--clock={CLOCK}", "--cache-build=0"]))
    runner = await start(server.app())
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = Settings(
        database_url=SecretStr(database_url),
        DEEPSEEK_API_KEY=SecretStr("sk-sandbox-test"),
        DEEPSEEK_BASE_URL=f"http://127.0.0.1:{runner.addresses[0][1]}",
        home=root / "farthing",
        sandbox=True,
        time_scale=0.0,
    )
    try:
        async with opened(SecretStr(database_url), Role.LANE, pool_size=CONNECTIONS) as ledger:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(enrichment, "opened", partial(_reopened, ledger))
                patch.setattr(bulkhead, "start", _Reader)
                yield Purses(root, database_url, server, settings, ledger)
    finally:
        await runner.cleanup()
        server.house.bill.close()


class _Reader:
    """What reads documents, in a thread: a thousand small runs would start several thousand processes."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line.dup()
        self._thread = threading.Thread(target=self._obey, daemon=True)
        self._thread.start()

    def _obey(self) -> None:
        with suppress(EOFError, OSError), self._line.makefile("rb") as given, self._line.makefile("wb") as replies:
            orders.obey(given, replies)

    def kill(self) -> None:
        with suppress(OSError):  # the other end is closed already
            self._line.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        self._line.close()
        return 0


@asynccontextmanager
async def _reopened(ledger: Ledger, _url: SecretStr, _role: Role, **_how: object) -> AsyncIterator[Ledger]:
    """The connections that are there already: a new one costs Postgres more than all that a small run asks of it."""
    yield ledger
