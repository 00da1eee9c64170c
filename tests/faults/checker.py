"""The independent checker: whether a run kept its promise, decided without a line of the product's code.

It reads Postgres as its superuser, the provider's bill as text, and the input as Parquet, each by itself, and
says which of the design's invariants I1 to I14 (ledger.md, "Fault matrix"), and of I15, the rows break:

    I1  one terminal row per document, of the right id and text      I8  in flight <= limit (the provider's own peak)
    I2  every billed attempt has an intent, and is billed once       I9  retries within what the retry budget allows
    I3  every known cost is its line of the bill, token by token     I10 results equal those of a fault-free run
    I4  known <= bill <= known + bounds; what is closed is known     I11 no lane's lock or session is left behind
    I5  nothing is paid for again without a reason                   I12 no row that was there before has changed
    I6  no open intent or grant; granted = known + bounds            I13 no canary in a log, event or detail
    I7  no budget's bill, over all runs that share it, passes its cap
    I15 of a run with a promise, the cut is the rule's, and only what is above it keeps its first answer

I1 to I7, I12, I15 are decided from rows, bill and input alone. I8, I10, I12 and I13 need what only the harness has:
the provider's peaks, a fault-free run's results, a snapshot from before, the log files (`Beside`); without them
they are not decided. Of I11 only sessions that hold a lock show here: exit codes, deadlines and orphan processes are
the harness's to assert. I14 (memory and descriptors) leaves no rows and is wholly the harness's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from functools import cached_property
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pyarrow.parquet as pq
from psycopg.rows import namedtuple_row

Key = tuple[int, int, int]
Row = Any  # a row of psycopg's namedtuple_row, whose fields are the columns of its query

#: A document may be lost three times: once, and the two retries that G6 allows.
LOST_AT_MOST = 3
#: Each of these verdicts buys one more attempt on the same tier, and a second one ends the tier.
REPAIRED = ("invalid_answer", "blank", "truncated")
INTERRUPTED_AT_MOST = 3
#: The retry budget's bucket, and what a retry takes from it.
BUCKET, RETRY_TAKES = 500, {"failed": 10, "lost": 10, "malformed": 10}
#: A result counts as committed so long after its row was written.
COMMIT_SLACK = timedelta(seconds=30)
#: Tables whose rows never change, with their keys.
APPEND_ONLY = {
    "attempt_intent": "run_id, document_no, attempt_no",
    "attempt_outcome": "run_id, document_no, attempt_no",
    "attempt_unknown": "run_id, document_no, attempt_no",
    "answer": "run_id, document_no, attempt_no",
    "document": "run_id, document_no",
    "input_file": "run_id, file_no",
    "duplicate": "run_id, document_no",
    "label": "run_id, document_no",
    "cost_adjustment": "adjustment_id",
    "month_close": "month, is_simulated, currency",
    "prompt_version": "prompt_version",
    "budget_grant": "grant_id",
    "grant_close": "grant_id, close_no",
    "run_event": "event_id",
    "price": "price_id",
    "run_sums": "run_id, late",
    "held": "run_id, document_no",
    "ranked": "run_id, document_no",
    "frozen_order": "run_id",
    "certified": "run_id",
}

Snapshot = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant, and the row, attempt or sum that breaks it."""

    invariant: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.what}"


class Answered(NamedTuple):
    """How a document ended: its state, and the result's tier and answer (as JSON text)."""

    state: str
    tier: str | None
    answer: str | None


@dataclass(frozen=True)
class Beside:
    """What only the harness knows. `peaks` is per model: the provider's peak in flight, and the limit it had.

    `root` is where the input's relative paths start, `columns` are its id and text. `trickle_per_s` is what the
    retry budget regains by time alone. `baseline` is by document id.
    """

    root: Path | None = None
    columns: tuple[str, str] = ("id", "text")
    peaks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    baseline: Mapping[str, Answered] | None = None
    earlier: Snapshot | None = None
    logs: Sequence[Path] = ()
    canaries: Sequence[str] = ()
    trickle_per_s: float = 1.0


class Line(NamedTuple):
    """One line of the bill."""

    attempt: str
    status: int
    hit: int
    miss: int
    output: int
    cost: int


@dataclass(frozen=True)
class Evidence:
    """All rows, read in one snapshot, and the bill."""

    runs: Sequence[Row]
    documents: Sequence[Row]
    attempts: Sequence[Row]
    files: Sequence[Row]
    shards: Sequence[Row]
    grants: Sequence[Row]
    lanes: Sequence[Row]
    caps: Sequence[Row]
    texts: Sequence[Row]
    locks: Sequence[Row]
    orphans: Sequence[Row]
    orders: Sequence[Row]
    places: Sequence[Row]
    rows: Snapshot
    bill: Sequence[Line]
    beside: Beside

    @cached_property
    def by_key(self) -> Mapping[Key, Row]:
        return {(a.run_id, a.document_no, a.attempt_no): a for a in self.attempts}

    @cached_property
    def billed(self) -> Mapping[str, Line]:
        return {line.attempt: line for line in self.bill}

    @cached_property
    def sharing(self) -> Mapping[int, Mapping[int, Row]]:
        """The runs that draw on each budget, by their numbers."""
        found: dict[int, dict[int, Row]] = defaultdict(dict)
        for run in self.runs:
            found[run.budget_id][run.run_id] = run
        return found

    @cached_property
    def resting(self) -> frozenset[int]:
        """Runs that nobody works on: done, or every lane has ended."""
        living = {lane.run_id for lane in self.lanes if lane.ended_at is None}
        return frozenset(run.run_id for run in self.runs if run.state == "done" or run.run_id not in living)


def check(
    database_url: str, bill: Path, beside: Beside | None = None, *, run_id: int | None = None
) -> list[Violation]:
    """Every violation in a ledger, or in one run of it and those that share its budget."""
    evidence = read(database_url, bill, beside or Beside(), run_id)
    return [Violation(name, what) for name, broken in INVARIANTS.items() for what in broken(evidence)]


def read(database_url: str, bill: Path, beside: Beside, run_id: int | None = None) -> Evidence:
    """One consistent snapshot of everything that the invariants are about."""
    options = "-c search_path=farthing -c default_transaction_isolation=repeatable\\ read"
    with psycopg.connect(database_url, options=options, row_factory=namedtuple_row) as connection:
        chosen = [row.run_id for row in connection.execute(_CHOSEN, {"run_id": run_id})]

        def ask(query: str) -> list[Row]:
            return connection.execute(query.replace("$only", "run_id = ANY(%(runs)s)"), {"runs": chosen}).fetchall()

        found = {name: ask(query) for name, query in QUERIES.items()}
        rows = _snapshot(connection)
    lines = [line for line in read_bill(bill) if run_id is None or (_key(line.attempt) or chosen)[0] in chosen]
    return Evidence(**found, rows=rows, bill=lines, beside=beside)


def read_bill(path: Path) -> Iterator[Line]:
    """The whole lines of a bill; a torn last one was never followed by a reply."""
    for raw in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        line = json.loads(raw)
        yield Line(line["attempt"], line["status"], line["hit"], line["miss"], line["output"], int(line["cost_pico"]))


def snapshot(database_url: str) -> Snapshot:
    """A digest of every row that may never change, by table and key, to hand back as `Beside.earlier`."""
    with psycopg.connect(database_url, options="-c search_path=farthing", row_factory=namedtuple_row) as connection:
        return _snapshot(connection)


def results(database_url: str, run_id: int) -> Mapping[str, Answered]:
    """How each document of a run ended, by its id, to hand back as `Beside.baseline`."""
    with psycopg.connect(database_url, options="-c search_path=farthing", row_factory=namedtuple_row) as connection:
        rows = connection.execute(_ENDINGS, [run_id]).fetchall()
    return {row.document_id: Answered(row.state, row.tier, row.answer) for row in rows}


#: Without a number every run, else that one and those that share its budget.
_CHOSEN = """
    SELECT run_id FROM run WHERE budget_id = ANY(
        SELECT budget_id FROM run WHERE run_id = coalesce(%(run_id)s, run_id))
"""

_ENDINGS = """
    SELECT d.document_id, d.state, coalesce(d.tier, s.tier) AS tier, coalesce(d.answer, s.answer)::text AS answer
    FROM document d LEFT JOIN document s ON s.run_id = d.of_run_id AND s.document_no = d.of_document_no
    WHERE d.run_id = %s
"""

QUERIES = {
    "runs": """
        SELECT r.*, b.cap, b.granted FROM run r JOIN budget b USING (budget_id) WHERE $only ORDER BY run_id
    """,
    "documents": """
        SELECT run_id, document_no, document_id, text_digest, state, reason, tier, attempt_no, answer::text,
               confidence, of_run_id, of_document_no, recorded_at
        FROM document WHERE $only ORDER BY run_id, document_no
    """,
    "attempts": """
        SELECT i.run_id, i.document_no, i.attempt_no, i.tier, i.purpose, i.shard_no, i.epoch, i.lane_id,
               i.grant_id, i.reserved, i.intended_at, o.signal, o.verdict, o.hit, o.miss, o.output, o.cost, u.bound,
               c.amount AS closing
        FROM attempt_intent i
        LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
        LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
        LEFT JOIN (SELECT * FROM cost_adjustment WHERE price_id IS NOT NULL) c
            USING (run_id, document_no, attempt_no)
        WHERE $only ORDER BY run_id, document_no, attempt_no
    """,
    "files": "SELECT * FROM input_file WHERE $only ORDER BY run_id, file_no",
    "shards": "SELECT * FROM shard WHERE $only ORDER BY run_id, shard_no",
    "grants": """
        SELECT g.grant_id, g.budget_id, g.run_id, g.lane_id, g.amount,
               (SELECT used FROM grant_close c WHERE c.grant_id = g.grant_id ORDER BY close_no DESC LIMIT 1) AS used
        FROM budget_grant g WHERE $only
    """,
    "lanes": "SELECT * FROM lane WHERE $only",
    "caps": """
        SELECT run_id, happened_at, (detail ->> 'cap')::bigint AS cap FROM run_event
        WHERE kind IN ('opened', 'cap_changed') AND $only ORDER BY event_id
    """,
    "texts": """
        SELECT 'attempt_outcome ' || concat_ws('.', run_id, document_no, attempt_no) AS place, detail AS said
        FROM attempt_outcome WHERE detail IS NOT NULL AND $only
        UNION ALL SELECT 'run_event ' || event_id, detail::text FROM run_event WHERE $only
        UNION ALL SELECT 'run ' || run_id, reason FROM run WHERE reason IS NOT NULL AND $only
        UNION ALL SELECT 'lane ' || lane_id, concat_ws(' ', ended_because, waiting_because) FROM lane WHERE $only
    """,
    "locks": """
        SELECT l.pid, l.objid, a.state FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.locktype = 'advisory'
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """,
    "orders": """
        SELECT f.*, c.findings, c.cut, c.run_id IS NOT NULL AS is_certified, r.policy, r.state
        FROM frozen_order f JOIN run r USING (run_id) LEFT JOIN certified c USING (run_id) WHERE $only
    """,
    "places": """
        SELECT k.*, h.confidence, h.attempt_no, coalesce(e.answer, a.answer) AS first, d.state AS became,
               d.attempt_no AS by_attempt, coalesce(d.tier, s.tier) AS tier, coalesce(d.answer, s.answer) AS answer,
               (SELECT min(i.intended_at) FROM attempt_intent i WHERE i.run_id = k.run_id
                AND i.document_no = k.document_no AND i.tier <> r.policy -> 'ladder' ->> 0) AS climbed_at
        FROM ranked k
        JOIN run r USING (run_id)
        LEFT JOIN held h USING (run_id, document_no)
        LEFT JOIN answer a ON a.run_id = h.run_id AND a.document_no = h.document_no AND a.attempt_no = h.attempt_no
        LEFT JOIN document e ON e.run_id = h.of_run_id AND e.document_no = h.of_document_no
        LEFT JOIN document d ON d.run_id = k.run_id AND d.document_no = k.document_no
        LEFT JOIN document s ON s.run_id = d.of_run_id AND s.document_no = d.of_document_no
        WHERE k.$only ORDER BY k.run_id, k.rank
    """,
    "orphans": """
        SELECT x.kind, x.run_id, x.document_no, x.attempt_no FROM (
            SELECT 'attempt_outcome' AS kind, run_id, document_no, attempt_no FROM attempt_outcome
            UNION ALL SELECT 'attempt_unknown', run_id, document_no, attempt_no FROM attempt_unknown
            UNION ALL SELECT 'answer', run_id, document_no, attempt_no FROM answer) x
        LEFT JOIN attempt_intent i USING (run_id, document_no, attempt_no) WHERE i.tier IS NULL AND $only
    """,
}


def _snapshot(connection: psycopg.Connection[Any]) -> Snapshot:
    found: dict[str, str] = {}
    for table, key in APPEND_ONLY.items():
        query = f"SELECT concat_ws('.', {key}) AS key, md5({table}::text) AS digest FROM {table}"
        found |= {f"{table} {row.key}": row.digest for row in connection.execute(query)}
    return found


def one_ending_per_document(e: Evidence) -> Iterator[str]:
    """I1: a finished run has one terminal row per row of its input, with that row's id and text."""
    ended = defaultdict(list)
    for document in e.documents:
        ended[document.run_id].append(document)
    for run in e.runs:
        if run.state == "done":
            numbers = Counter(document.document_no for document in ended[run.run_id])
            for number in range(run.documents):
                if numbers[number] != 1:
                    yield f"document {run.run_id}.{number} has {numbers[number]} terminal rows"
            for number in numbers.keys() - set(range(run.documents)):
                yield f"document {run.run_id}.{number} is not one of the run's {run.documents}"
        yield from _unfinished_shards(e, run, {document.document_no for document in ended[run.run_id]})
        yield from _strangers(e, run, ended[run.run_id])


def _unfinished_shards(e: Evidence, run: Row, ended: set[int]) -> Iterator[str]:
    for shard in e.shards:
        if shard.run_id == run.run_id and shard.state in ("done", "failed"):
            due = set(range(shard.first_document_no, shard.first_document_no + shard.document_count))
            for number in sorted(due - ended):
                yield f"document {run.run_id}.{number} has no terminal row, and its shard is {shard.state}"
        elif shard.run_id == run.run_id and run.state == "done":
            yield f"shard {run.run_id}.{shard.shard_no} is {shard.state}, and the run is done"


def _strangers(e: Evidence, run: Row, ended: Sequence[Row]) -> Iterator[str]:
    """Terminal rows whose id or text is not the input's. A file that changed since says nothing any more."""
    rows = _read_input(e, run.run_id)
    if rows is None:
        return
    if len(rows) != run.documents:
        yield f"run {run.run_id} has {run.documents} documents, its input {len(rows)} rows"
    for document in ended:
        if document.reason in ("input_changed", "input_unreadable") or document.document_no >= len(rows):
            continue
        document_id, text = rows[document.document_no]
        if document.document_id != (document_id or "").replace("\0", "\ufffd"):
            yield f"document {run.run_id}.{document.document_no} is called {document.document_id!r}"
        if document.text_digest is not None and document.text_digest != hashlib.sha256(text.encode()).digest():
            yield f"document {run.run_id}.{document.document_no} has another text's digest"


def _read_input(e: Evidence, run_id: int) -> list[tuple[str | None, str]] | None:
    """Id and text of every row, in the order of files and rows. None where they are not to be had any more."""
    if e.beside.root is None:
        return None
    rows: list[tuple[str | None, str]] = []
    for file in (file for file in e.files if file.run_id == run_id):
        path = e.beside.root / file.path
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
            return None
        table = pq.read_table(path, columns=list(e.beside.columns))
        rows += zip(*(table.column(name).to_pylist() for name in e.beside.columns), strict=True)
    return rows


def billed_within_intents(e: Evidence) -> Iterator[str]:
    """I2: nothing was billed, answered or declared that had not been intended, and nothing was billed twice."""
    for attempt, times in Counter(line.attempt for line in e.bill).items():
        if times > 1:
            yield f"attempt {attempt} was billed {times} times"
        if _key(attempt) not in e.by_key:
            yield f"attempt {attempt} was billed and has no intent"
    for row in e.orphans:
        yield f"{row.kind} {row.run_id}.{row.document_no}.{row.attempt_no} has no intent"


def known_costs_billed(e: Evidence) -> Iterator[str]:
    """I3: what the ledger calls known is what the provider billed, in pico units and in tokens."""
    for attempt in e.attempts:
        if attempt.cost is None:
            continue
        line = e.billed.get(_name(attempt), Line("", 0, 0, 0, 0, 0))
        if attempt.cost != line.cost:
            yield f"attempt {_name(attempt)} is booked at {attempt.cost} and billed at {line.cost}"
        elif line.attempt and (attempt.hit, attempt.miss, attempt.output) != (line.hit, line.miss, line.output):
            yield f"attempt {_name(attempt)} is booked with other tokens than billed"


def bill_within_bounds(e: Evidence) -> Iterator[str]:
    """I4: known <= bill <= known + bounds, for each run and each unknown attempt."""
    for run in e.runs:
        own = [attempt for attempt in e.attempts if attempt.run_id == run.run_id]
        known = sum(attempt.cost if attempt.cost is not None else attempt.closing or 0 for attempt in own)
        bounds = sum(_bound(attempt) for attempt in own if attempt.closing is None)
        bill = sum(line.cost for line in e.bill if line.attempt.startswith(f"{run.run_id}."))
        if not known <= bill <= known + bounds:
            yield f"run {run.run_id} was billed {bill}, and the ledger says {known} to {known + bounds}"
    for attempt in e.attempts:
        line = e.billed.get(_name(attempt))
        if attempt.cost is None and line is not None and line.cost > _bound(attempt):
            yield f"attempt {_name(attempt)} was billed {line.cost}, more than its bound of {_bound(attempt)}"


def paid_once(e: Evidence) -> Iterator[str]:
    """I5: billed successes per document and tier <= 1 + unknowns + quality retries; nothing after a result."""
    climbs = defaultdict(list)
    for attempt in e.attempts:
        climbs[attempt.run_id, attempt.document_no, attempt.tier].append(attempt)
    for (run_id, number, tier), tried in climbs.items():
        paid = sum(1 for a in tried if (line := e.billed.get(_name(a))) and line.status == 200)
        unknown = sum(1 for a in tried if a.cost is None or a.bound is not None)
        verdicts = Counter(a.verdict for a in tried if a.bound is None)
        again = sum(min(1, verdicts[verdict]) for verdict in REPAIRED)
        again += min(INTERRUPTED_AT_MOST - 1, sum(1 for a in tried if a.signal == "interrupted"))
        if paid > 1 + unknown + again:
            yield f"document {run_id}.{number} was paid for {paid} times at {tier}, {unknown} unknown, {again} again"
    yield from _lost_too_often(e)
    yield from _paid_after_result(e)
    yield from _out_of_lease(e)


def _lost_too_often(e: Evidence) -> Iterator[str]:
    lost: Counter[tuple[int, int]] = Counter()
    for a in e.attempts:
        lost[a.run_id, a.document_no] += a.signal is None or a.signal in RETRY_TAKES
    for (run_id, number), times in lost.items():
        if times > LOST_AT_MOST:
            yield f"document {run_id}.{number} was tried again after {times} attempts of unknown billing"


def _paid_after_result(e: Evidence) -> Iterator[str]:
    """Attempts for documents, and first attempts for texts, that had a committed result of the same prompt."""
    runs = {run.run_id: run for run in e.runs}
    first: dict[tuple[str, bool, bytes], Row] = {}
    ended = {(d.run_id, d.document_no): d for d in e.documents}
    for d in sorted(e.documents, key=lambda d: d.recorded_at):
        if d.state == "result" and d.answer is not None and _is_sure(runs[d.run_id], d):
            first.setdefault(_question(runs[d.run_id], d), d)
    for a in e.attempts:
        own = ended.get((a.run_id, a.document_no))
        if own is None or own.text_digest is None:
            continue
        if a.intended_at > own.recorded_at:
            yield f"attempt {_name(a)} was intended after its document had ended"
        paid = first.get(_question(runs[a.run_id], own))
        policy = runs[a.run_id].policy
        last = policy["ladder"][-1]
        if paid is not None and "target" in policy["escalate"] and paid.tier != last and a.tier == last:
            paid = None  # accepted elsewhere: here it is one first answer of many, and the lot or the cut decides
        if a.attempt_no == 1 and paid is not None and a.intended_at > paid.recorded_at + COMMIT_SLACK:
            yield f"attempt {_name(a)} asks what {paid.run_id}.{paid.document_no} had answered"


def _out_of_lease(e: Evidence) -> Iterator[str]:
    """Attempts of a lane that had lost its lease: the next owner of the shard was at work before them."""
    newest: dict[tuple[int, int], int] = {}
    for a in sorted(e.attempts, key=lambda a: a.intended_at):
        epoch = newest.setdefault((a.run_id, a.shard_no), a.epoch)
        if a.epoch < epoch:
            yield f"attempt {_name(a)} was intended under lease {a.epoch} of its shard, after lease {epoch}"
        newest[a.run_id, a.shard_no] = max(epoch, a.epoch)


def _question(run: Row, document: Row) -> tuple[str, bool, bytes]:
    return run.prompt_version, run.is_simulated, bytes(document.text_digest)


def _is_sure(run: Row, document: Row) -> bool:
    """Whether the result is good enough for its own run's policy; a stricter one may ask again."""
    if document.tier == run.policy["ladder"][-1]:
        return True
    below = run.policy["escalate"].get("below")  # without one, a promise is about the documents of one run
    return below is not None and (document.confidence is None or document.confidence >= float(below))


def nothing_open(e: Evidence) -> Iterator[str]:
    """I6: a run at rest has no open intent or grant, and granted = known + bounds."""
    for a in e.attempts:
        if a.run_id in e.resting and a.cost is None and a.bound is None:
            yield f"attempt {_name(a)} has neither a cost nor a bound"
    for grant in e.grants:
        if grant.run_id in e.resting and grant.used is None:
            yield f"grant {grant.grant_id} of run {grant.run_id} is open"
    for lane in e.lanes:
        if lane.ended_at is None and lane.run_id in e.resting:
            yield f"lane {lane.lane_id} of run {lane.run_id} has not ended"
    for budget_id, runs in e.sharing.items():
        spent = sum(a.cost if a.cost is not None else _bound(a) for a in e.attempts if a.run_id in runs)
        granted = next(iter(runs.values())).granted
        if runs.keys() <= e.resting and granted != spent:
            yield f"budget {budget_id} has granted {granted}, and known + bounds are {spent}"


def bill_within_cap(e: Evidence) -> Iterator[str]:
    """I7: what was billed for attempts intended until any instant is within the largest cap there was by then."""
    for budget_id, runs in e.sharing.items():
        caps = [(cap.happened_at, cap.cap) for cap in e.caps if cap.run_id in runs]
        total = 0
        for a in sorted((a for a in e.attempts if a.run_id in runs), key=lambda a: a.intended_at):
            total += e.billed[_name(a)].cost if _name(a) in e.billed else 0
            cap = _largest_cap(caps, a.intended_at)
            if total > cap:
                yield f"budget {budget_id} was billed {total} by attempt {_name(a)}, and its cap was {cap}"
                break
        granted = next(iter(runs.values())).granted
        if granted > max((cap for _, cap in caps), default=0):
            yield f"budget {budget_id} has granted {granted}, more than any cap it had"


def _largest_cap(caps: Sequence[tuple[datetime, int]], until: datetime) -> int:
    return max((cap for since, cap in caps if since <= until), default=0)


def flights_within_limit(e: Evidence) -> Iterator[str]:
    """I8: the provider never saw more requests of a model at once than were allowed."""
    for model, (peak, limit) in e.beside.peaks.items():
        if peak > limit:
            yield f"{model} had {peak} requests in flight, {limit} are allowed"


def retries_within_budget(e: Evidence) -> Iterator[str]:
    """I9: a lane's retries took no more from its bucket than it held, successes, answered retries and time put in.

    A document that another lane began comes back as a retry without passing the bucket: those do not count.
    """
    taken: Counter[int] = Counter()
    gained: Counter[int] = Counter()
    for a in e.attempts:
        before = e.by_key.get((a.run_id, a.document_no, a.attempt_no - 1))
        is_retry = a.purpose == "retry" and before is not None and before.lane_id == a.lane_id
        gained[a.lane_id] += 0 if a.hit is None else 5 if is_retry and a.signal == "answered" else 1
        if is_retry:
            taken[a.lane_id] += RETRY_TAKES.get(before.signal, 5)
    for lane in e.lanes:
        lived = ((lane.ended_at or lane.heartbeat_at) - lane.started_at).total_seconds() + 1
        allowed = BUCKET + gained[lane.lane_id] + lived * e.beside.trickle_per_s
        if taken[lane.lane_id] > allowed:
            yield f"lane {lane.lane_id} took {taken[lane.lane_id]} for retries, {allowed:.0f} were there"


def results_as_without_faults(e: Evidence) -> Iterator[str]:
    """I10: each document ends as in the fault-free run, or as a dead letter that was lost three times."""
    if e.beside.baseline is None:
        return
    lost: Counter[tuple[int, int]] = Counter()
    for a in e.attempts:
        lost[a.run_id, a.document_no] += a.bound is not None or a.signal in RETRY_TAKES
    for d in e.documents:
        due = e.beside.baseline.get(d.document_id)
        got = Answered(d.state, d.tier, d.answer)
        if d.state == "dead_letter" and lost[d.run_id, d.document_no] >= LOST_AT_MOST:
            continue
        if due is not None and d.state != "reused" and got != due:
            yield f"document {d.run_id}.{d.document_no} ended as {got}, without faults as {due}"


def nothing_left_behind(e: Evidence) -> Iterator[str]:
    """I11, as far as Postgres shows it: no lane's session lock outlives a run at rest."""
    if len(e.resting) == len(e.runs):
        for lock in e.locks:
            yield f"session {lock.pid} still holds the lock of lane {lock.objid}"


def earlier_rows_unchanged(e: Evidence) -> Iterator[str]:
    """I12: every row of an append-only table that was there before is there now, the same."""
    for name, digest in (e.beside.earlier or {}).items():
        if e.rows.get(name) != digest:
            yield f"{name} has {'changed' if name in e.rows else 'gone'}"


def no_canary_told(e: Evidence) -> Iterator[str]:
    """I13: no canary in a log, an event, a reason or a stored detail."""
    said = [(row.place, row.said or "") for row in e.texts]
    said += [(path.name, path.read_text(errors="replace")) for path in e.beside.logs]
    for canary in e.beside.canaries:
        for place, words in said:
            if canary in words:
                yield f"{place} tells a canary"  # not which: this line is printed


def promise_kept(e: Evidence) -> Iterator[str]:
    """I15: the sample and the cut are what the rule says, and only ranks above the cut keep their first answer."""
    yield from _without_order(e)
    for order in e.orders:
        places = [place for place in e.places if place.run_id == order.run_id]
        yield from _misplaced(order, places)
        ranked = {place.document_no for place in places}
        answered = (d for d in e.documents if d.run_id == order.run_id and d.state in ("result", "reused"))
        if (piloted := sum(d.document_no not in ranked for d in answered)) != order.piloted:
            yield f"run {order.run_id}: {piloted} without a place have an answer, not {order.piloted}"
        if order.is_certified:
            yield from _miscut(order, places)
        for place in places:
            last = order.policy["ladder"][-1]
            is_above = order.is_certified and place.rank < order.cut and not place.is_sampled
            name = f"document {place.run_id}.{place.document_no}"
            if place.became in ("result", "reused") and place.tier != last and not is_above:
                yield f"{name} keeps its first answer, and nothing allows that"
            elif place.became == "result" and place.tier != last and place.by_attempt != place.attempt_no:
                yield f"{name} keeps another answer than the one that was ranked"
            if place.climbed_at is not None and place.climbed_at < order.frozen_at:
                yield f"{name} climbed before the order was frozen"


def _without_order(e: Evidence) -> Iterator[str]:
    """First answers that a run with a promise keeps, of documents that no order of it holds."""
    ordered = {order.run_id for order in e.orders}
    placed = {(place.run_id, place.document_no) for place in e.places if place.run_id in ordered}
    lasts = {run.run_id: run.policy["ladder"][-1] for run in e.runs if "target" in run.policy["escalate"]}
    ended = {(d.run_id, d.document_no): d for d in e.documents}
    for key, d in ended.items():
        source = ended.get((d.of_run_id, d.of_document_no)) if d.state == "reused" else d
        is_kept = d.state in ("result", "reused") and source is not None and source.tier != lasts.get(d.run_id)
        if d.run_id in lasts and is_kept and key not in placed:
            yield f"document {d.run_id}.{d.document_no} keeps its first answer, and no order holds it"


def _misplaced(order: Row, places: Sequence[Row]) -> Iterator[str]:
    def due(place: Row) -> tuple[bool, float, bytes]:
        tie = hashlib.sha256(bytes(order.salt) + str(place.document_no).encode()).digest()
        return place.confidence is None, -(place.confidence or 0.0), tie

    if [place.document_no for place in sorted(places, key=due)] != [place.document_no for place in places]:
        yield f"run {order.run_id}: its order is not that of its confidences"
    if [place.rank for place in places] != list(range(order.documents - order.piloted)):
        yield f"run {order.run_id}: its ranks are not 0 to {order.documents - order.piloted - 1}"
    drawn = [place.rank for place in places if place.is_sampled]
    if drawn != _drawn(bytes(order.seed), order.documents - order.piloted, order.size):
        yield f"run {order.run_id}: {order.size} were to be drawn, and others than these {len(drawn)}"


def _drawn(seed: bytes, population: int, size: int) -> list[int]:
    """Floyd's: of each last number in turn, one up to it, or itself where that is taken."""
    stream, taken = hashlib.shake_256(seed).digest(16 * size), set[int]()
    for turn in range(size):
        last = population - size + turn
        pick = int.from_bytes(stream[16 * turn : 16 * turn + 16], "big") * (last + 1) // 2**128
        taken.add(last if pick in taken else pick)
    return sorted(taken)


def _miscut(order: Row, places: Sequence[Row]) -> Iterator[str]:
    """Fields are compared as they are: the harness's jobs have choices only."""
    population = order.documents - order.piloted
    promised = order.policy["escalate"]
    allowed = int((1 - Fraction(promised["target"])) * order.documents)
    delta = Fraction(promised["delta"])
    most = min(order.size, population - allowed - 1)  # negative: every document may differ
    fits = [c for c in range(most + 1) if _chance(population, allowed + 1 + c, order.size, c) <= delta]
    passed = max(fits, default=None) if most >= 0 else order.size
    cut = population if passed is not None else 0
    if passed is not None:
        found = [place.rank for place in places if place.is_sampled and _differs(order, place)]
        cut = found[passed] if len(found) > passed else cut
    if (passed, cut) != (order.allowance, order.cut):
        yield f"run {order.run_id} passes {order.allowance} and is cut at {order.cut}, not {passed} and {cut}"


def _chance(population: int, marked: int, drawn: int, most: int) -> Fraction:
    """How likely at most so many of the marked are drawn."""
    ways = sum(comb(marked, x) * comb(population - marked, drawn - x) for x in range(min(most, drawn) + 1))
    return Fraction(ways, comb(population, drawn))


def _differs(order: Row, place: Row) -> bool:
    is_last = place.became in ("result", "reused") and place.tier == order.policy["ladder"][-1]
    return not is_last or any(place.first[name] != place.answer[name] for name in order.fields)


INVARIANTS: Mapping[str, Callable[[Evidence], Iterator[str]]] = {
    "I1": one_ending_per_document,
    "I2": billed_within_intents,
    "I3": known_costs_billed,
    "I4": bill_within_bounds,
    "I5": paid_once,
    "I6": nothing_open,
    "I7": bill_within_cap,
    "I8": flights_within_limit,
    "I9": retries_within_budget,
    "I10": results_as_without_faults,
    "I11": nothing_left_behind,
    "I12": earlier_rows_unchanged,
    "I13": no_canary_told,
    "I15": promise_kept,
}


def _key(attempt: str) -> Key | None:
    """`run.document.attempt`, or None: a request that was no attempt of ours."""
    parts = attempt.split(".")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


def _name(attempt: Row) -> str:
    return f"{attempt.run_id}.{attempt.document_no}.{attempt.attempt_no}"


def _bound(attempt: Row) -> int:
    """The most an attempt without known cost can have cost."""
    if attempt.cost is not None:
        return 0
    return int(attempt.reserved if attempt.bound is None else attempt.bound)
