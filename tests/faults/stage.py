"""Where faults are played: an input, an emulated DeepSeek, a ledger, children that run, and the two proofs after.

Children are forked from a server that has everything imported already, so that one costs milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import SecretStr

from sandbox import service
from sandbox.bill import bill_path
from schemas.attempts import RunId
from schemas.pricing import load_price_book
from tasks.ledger.connection import Role, opened
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tasks.ledger.proof import prove
from tests.faults.checker import Answered, Beside, Snapshot, check, results, snapshot
from tests.faults.child import API_KEY, STACKS, TASKS, Order, obey
from tests.world import CLOCK, PROMPT, SCHEMA

#: In every document, and so never to be seen in a log, an event or a detail.
TEXT_CANARY = "canary-91c4"
#: Seconds that a child may take, whatever befalls it.
DEADLINE_S = 60.0
KILLED = 137
IN_FLIGHT = 16
REPLY_WITHIN_S = 5
#: Not decided here: a stage's provider has a second in no time, so the retry budget of a lane refills a thousand
#: times as fast as the checker could count against it. Whether it binds is the brakes' unit tests' to say.
UNDECIDED = frozenset({"I9"})
#: What a stage says that cannot even be set up, since both proofs are of a run that nothing befell, too.
BROKEN_UNHURT = "a run without faults breaks its promise"

JOB = f"""\
name: colours
input: {{path: documents.parquet, id: id, text: text, label: colour}}
prompt: prompt.md
answer: answer.schema.json
ladder: [flash, pro]
escalate: {{below: 0.6}}
confidence: {{signal: logprobs, fields: [colour]}}
measure: colour
tiers: {{flash: {{max_tokens: 100, deadline_s: 5}}, pro: {{max_tokens: 100, deadline_s: 5}}}}
concurrency: {IN_FLIGHT}
budget: 1 USD
shard_rows: 5
tolerance: 1
"""


@dataclass
class Stage:
    """One input and one ledger; each `scene` is a new run over the same texts, so that results can be compared."""

    root: Path
    database_url: str
    base_url: str
    documents: int
    times: LeaseTimes = USUAL_TIMES
    baseline: Mapping[str, Answered] | None = None
    starts: int = 1
    in_flight: int = IN_FLIGHT
    deadline_s: float = DEADLINE_S
    job: str = JOB
    _children: int = 0
    _scenes: int = 0
    _logs: list[Path] = field(default_factory=list)
    _log_of: dict[ForkServerProcess, Path] = field(default_factory=dict)

    def scene(self) -> None:
        """A prompt that was never asked: nothing of an earlier run can be reused."""
        self._scenes += 1
        (self.root / "jobs" / "colours" / "prompt.md").write_text(f"{PROMPT}\nScene {self._scenes}.\n")
        write_documents(self.root, self.documents)
        self.ask_sandbox("POST", "limits", {})  # its peaks are the scene's
        self._logs.clear()

    def start(self, **order: Any) -> ForkServerProcess:
        """A child that runs the job; `order` is what differs from an ordinary run."""
        self._children += 1
        log = self.root / f"child-{self._children}.log"
        self._logs.append(log)
        usual = Order(self.root, self.database_url, self.base_url, log, times=self.times)
        child = CONTEXT.Process(target=obey, args=(replace(usual, **order),))
        child.start()
        self._log_of[child] = log
        return child

    def run(self, **order: Any) -> int:
        """The exit code of a child that ran to its end, whichever that was."""
        return self.wait(self.start(**order))

    def wait(self, child: ForkServerProcess) -> int:
        """Its exit code. One that is still there after the deadline is told to say where it is, and ended."""
        child.join(self.deadline_s)
        if child.exitcode is None:
            for number in (STACKS, TASKS):
                os.kill(child.pid or 0, number)
                child.join(1.0)  # until it has said where it is
            child.kill()
            raise AssertionError(f"a child was still there after {self.deadline_s:.0f} s: {self.told_by(child)}")
        return child.exitcode

    def resume(self, **order: Any) -> int:
        """Run the same command until it is done; returns how often. Nothing but a pause may come between."""
        for attempt in range(1, 20):
            code = self.run(**order)
            if code == 0:
                return attempt
            assert code == 3, f"exit code {code}: {self.told()}"
        raise AssertionError(f"not done after {attempt} resumes: {self.told()}")

    def told_by(self, child: ForkServerProcess) -> str:
        """Everything that one child said."""
        log = self._log_of[child]
        return log.read_text() if log.exists() else ""

    def value(self, query: str) -> Any:
        with psycopg.connect(self.database_url, options="-c search_path=farthing") as connection:
            row = connection.execute(query).fetchone()
        return row[0] if row else None

    @property
    def run_id(self) -> int:
        """The newest run: the scene's."""
        return int(self.value("SELECT coalesce(max(run_id), 0) FROM run"))

    def snapshot(self) -> Snapshot:
        return snapshot(self.database_url)

    def change_job(self, **lines: object) -> None:
        """Other values for keys of the job file, until it is changed again; without any, the usual job."""
        job = self.job
        for key, value in lines.items():
            job = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", job)
        (self.root / "jobs" / "colours" / "job.yaml").write_text(job)
        self.in_flight = int(str(lines.get("concurrency", IN_FLIGHT)))

    def violations(self, earlier: Snapshot | None = None, *, undecided: frozenset[str] = UNDECIDED) -> list[str]:
        """What the checker, but for `undecided`, and the product's own proof find in the scene's run: nothing."""
        run_id = self.run_id
        beside = Beside(
            root=self.root,
            baseline=self.baseline,
            earlier=earlier,
            peaks=self._peaks(),
            logs=[log for log in self._logs if log.exists()],
            canaries=[TEXT_CANARY, API_KEY, _password(self.database_url)],
        )
        found = check(self.database_url, bill_path(self.root), beside, run_id=run_id)
        decided = [str(broken) for broken in found if broken.invariant not in undecided]
        return [*decided, *asyncio.run(_disproved(self.database_url, run_id))]

    def told(self) -> str:
        """The last words of the scene's children."""
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in self._logs if log.exists())

    def remember_baseline(self) -> None:
        """A run without faults, which all others are compared with."""
        self.scene()
        assert self.run() == 0, self.told()
        found = self.violations()
        assert found == [], f"{BROKEN_UNHURT}: {found}"
        self.baseline = results(self.database_url, self.run_id)
        assert len(self.baseline) == self.documents

    def plan_mishaps(self, *rules: dict[str, Any]) -> None:
        """These rules and no others, from now on."""
        self.ask_sandbox("DELETE", "mishaps")
        self.ask_sandbox("POST", "mishaps", rules)

    def struck(self) -> Counter[str]:
        """How often each kind of the planned mishaps has struck."""
        counts: Counter[str] = Counter()
        for rule in self.ask_sandbox("GET", "mishaps"):
            counts[rule["kind"]] += rule["struck"]
        return counts

    def ask_sandbox(self, method: str, page: str, body: object = None) -> Any:
        """One of the emulator's own pages: `clock`, `limits`, `balance`, `mishaps`, `status`, `bill`."""
        raw = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.base_url}/sandbox/{page}", raw, method=method)
        with urllib.request.urlopen(asked) as reply:
            return json.load(reply)

    def _peaks(self) -> dict[str, tuple[int, int]]:
        peaks = self.ask_sandbox("GET", "status")["peak_in_flight"]
        return {model: (peak, self.in_flight * self.starts) for model, peak in peaks.items()}


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.child"])


@contextmanager
def staged(
    root: Path,
    database_url: str,
    *,
    documents: int,
    in_flight: int = IN_FLIGHT,
    reply_within_s: int = REPLY_WITHIN_S,
    **options: service.Option,
) -> Iterator[Stage]:
    """A stage over a migrated database, for lanes with so much in flight. Options are the emulator's."""
    job = root / "jobs" / "colours"
    job.mkdir(parents=True)
    text = JOB.replace(f"concurrency: {IN_FLIGHT}", f"concurrency: {in_flight}")
    text = text.replace(f"deadline_s: {REPLY_WITHIN_S}", f"deadline_s: {reply_within_s}")
    (job / "job.yaml").write_text(text)
    (job / "answer.schema.json").write_text(SCHEMA)
    with service.running(root, **{"clock": CLOCK, "time_scale": 0, "cache_build": 0, **options}) as emulator:
        yield Stage(root, database_url, emulator.url, documents, in_flight=in_flight, job=text)


def write_documents(root: Path, documents: int) -> None:
    """The same texts in the same order, whenever it is called."""
    numbers = range(documents)
    columns = {
        "id": [f"d{number}" for number in numbers],
        "text": [f"document {number} ({TEXT_CANARY}) is about a colour" for number in numbers],
        "colour": [("red", "green", "blue")[number % 3] for number in numbers],
    }
    pq.write_table(pa.table(columns), root / "documents.parquet", row_group_size=10)


def wait_until(is_so: Any, patience_s: float = DEADLINE_S) -> bool:
    """Whether it came to be so in time."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def _disproved(database_url: str, run_id: int) -> list[str]:
    async with opened(SecretStr(database_url), Role.LANE, pool_size=1) as ledger:
        proof = await prove(ledger, RunId(run_id), load_price_book())
    return [f"{name}: {what}" for name, found in proof.evidence.items() for what in found.violations]


def _password(database_url: str) -> str:
    return database_url.partition("://")[2].partition("@")[0].partition(":")[2]


__all__ = ["CONTEXT", "KILLED", "Stage", "staged", "wait_until", "write_documents"]
