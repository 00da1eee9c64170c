"""Spend: what runs cost and how far they are, read from the auditor's views and nothing else.

An audit counts rows, once (`breakdowns`). Progress adds up the counters that lanes keep in the transactions they
commit, one row per lane, so that looking costs nothing. Money is integers of pico units; what is unknown is a bound
of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

from sqlalchemy import CursorResult, RowMapping, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.announcements import RunEvent
from schemas.balance import Paid
from schemas.errors import ConfigurationError
from schemas.spending import Cell, Line, Side, add_up, per_million, split
from tasks.ledger.balances import read_paid
from tasks.ledger.breakdowns import (
    DocumentCosts,
    SlowDocument,
    hashed,
    read_cells,
    read_document_costs,
    read_lines,
    read_slowest,
)
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import DEAD_AFTER_S

Row = TypeVar("Row")

#: Events that a progress view shows, the newest first.
RECENT_EVENTS = 10
#: Different documents of several runs are counted by their ids, a second or two for each million. Up to so many ended
#: ones are counted unasked.
COUNTED_UNASKED = 100_000

#: Of the dearest and the slowest documents an audit names so many, where nobody asks for more.
DEAREST = 5


@dataclass(frozen=True, slots=True)
class TierSpend:
    """One tier: its attempts and what they cost; `results` are documents whose answer was accepted there."""

    attempts: int
    results: int
    cost_pico: int
    unknown_pico: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class PurposeSpend:
    """What attempts of one purpose (answer, retry, repair, priming) cost."""

    attempts: int
    cost_pico: int
    unknown_pico: int


@dataclass(frozen=True, slots=True)
class Escalation:
    """What going up to a tier for one reason bought: rescued results, changed answers, right ones where labelled."""

    to_tier: str
    reason: str
    escalated: int
    rescued: int
    agreed: int
    changed: int
    labelled: int
    right_before: int
    right_after: int
    cost_pico: int
    unknown_pico: int

    @property
    def pico_per_rescued(self) -> int | None:
        """What one document that was answered there cost, those that were not included; rounded up."""
        return -(-self.cost_pico // self.rescued) if self.rescued else None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Results of one tier that have a label, and how many equal it."""

    tier: str
    labelled: int
    correct: int


@dataclass(frozen=True, slots=True)
class Waste:
    """Attempts that bought no result, by what came of them.

    `kind`: `failed`; `unknown`, where nobody knows whether it was billed; `unsure`, so that the document climbs.
    """

    tier: str
    purpose: str
    signal: str
    verdict: str | None
    billing: str
    attempts: int
    cost_pico: int
    unknown_pico: int
    kind: str


@dataclass(frozen=True, slots=True)
class HoursSpend:
    """What attempts cost that were billed in one band of hours."""

    attempts: int
    cost_pico: int


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """What the tokens of each bucket cost, together the whole known cost, and how many of them have a price."""

    hit_pico: int
    miss_pico: int
    output_pico: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """All that have a price."""
        return self.hit_tokens + self.miss_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class SharedBudget:
    """A budget that several runs draw on, in pico units: used, others, held and left add up to the cap.

    `used_pico` is what the runs in view cost, bounds of unknowns included, `others_pico` what the rest that name it
    did; `held_pico` is set aside: by lanes at work, and of bounds that an export has closed for less.
    """

    name: str
    cap_pico: int
    used_pico: int
    others_pico: int
    held_pico: int
    left_pico: int


@dataclass(frozen=True, slots=True)
class CertifiedRun:
    """What a run promised, and by what. Without a `cut` its sample is not answered yet.

    `target`, `delta` and `tail`, the chance to fail, are decimals as text. `sampled` is how many were drawn;
    `disagreements` of these the tiers disagree about; `may_differ` is how many of the others may.
    """

    run: int
    target: str
    delta: str
    documents: int
    may_differ: int
    sampled: int
    disagreements: int | None
    cut: int | None
    score_at_cut: float | None
    tail: str | None


@dataclass(frozen=True)
class Audit:
    """The spend of a run, of a job's runs, or of the whole ledger.

    `documents` is a sum over runs. `distinct_documents` is how many ended: over several runs, each id counts once.
    It is None where these are too many to count them unasked.

    `run`, `job`, `state` and the like are filled in where the scope has exactly one. `results` counts reused ones
    too, so results + dead_letters + duplicates == documents once every run of the scope is done. Total cost is in
    [cost_pico, high_pico]; corrections (`adjusted_pico`) are apart. `lost_pico` is what misses of
    the shared prefix cost after priming, `lost_whole_pico` of it where nothing hit; `saved_pico` is what hits saved
    against misses. After priming, `expected_hit_tokens` of the prefix should have hit, and `real_hit_tokens` did.
    `off_peak_saved_pico` is what the `off_peak_attempts` of lanes that wait for off-peak prices would have cost more
    at peak ones. `slowest` are the documents that waited longest for replies. `balances` is what each account paid
    meanwhile, as far as somebody looked.
    """

    run: int | None
    job: str | None
    documents: int
    results: int
    dead_letters: int
    attempts: int
    cost_pico: int
    unknown_pico: int
    currency: str | None
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    prefix_hit_rate: float | None
    escalated: int
    tiers: dict[str, TierSpend]
    runs: tuple[int, ...]
    state: str | None
    reason: str | None
    is_simulated: bool | None
    prompt_version: str | None
    opened_at: datetime | None
    finished_at: datetime | None
    budget_pico: int | None
    reused: int
    duplicates: int
    unknown_attempts: int
    reasoning_tokens: int
    priming_pico: int
    adjusted_pico: int
    lost_pico: int
    saved_pico: int
    by_purpose: dict[str, PurposeSpend]
    escalations: tuple[Escalation, ...]
    accuracy: tuple[Accuracy, ...]
    waste: tuple[Waste, ...]
    dead_letters_by_reason: dict[str, int]
    distinct_documents: int | None
    expected_hit_tokens: int
    real_hit_tokens: int
    lost_whole_pico: int
    token_costs: TokenCosts
    hours: dict[str, HoursSpend]
    document_costs: DocumentCosts
    shared_budget: SharedBudget | None = None
    off_peak_attempts: int = 0
    off_peak_saved_pico: int = 0
    by: tuple[Side, ...] = ()
    lines: tuple[Line, ...] = ()
    balances: tuple[Paid, ...] = ()
    slowest: tuple[SlowDocument, ...] = ()
    certificates: tuple[CertifiedRun, ...] = ()

    @property
    def high_pico(self) -> int:
        """The most that the spend can be: its known cost and the bounds of what is unknown."""
        return self.cost_pico + self.unknown_pico

    @property
    def pico_per_million_tokens(self) -> int | None:
        """The effective price of a million tokens that have one, cached ones among them. None without any."""
        return per_million(self.cost_pico, self.token_costs.tokens)

    @property
    def done(self) -> int:
        """Documents that have ended."""
        return self.results + self.dead_letters + self.duplicates

    @property
    def pico_per_1000_documents(self) -> int | None:
        """Known cost of a thousand documents that ended, rounded to the nearest pico unit. None before the first,
        and where nobody counted them.

        Several runs of the same documents cost what they cost together, over documents that are still the same.
        """
        ended = self.distinct_documents
        return (2 * 1000 * self.cost_pico + ended) // (2 * ended) if ended else None

    def to_json(self) -> dict[str, Any]:
        """One JSON object: money as integers, rates as plain numbers, instants in ISO 8601, None where unknown."""
        names = ("pico_per_1000_documents", "pico_per_million_tokens", "high_pico")
        made = {name: getattr(self, name) for name in names}
        return _json_object(asdict(self) | made | {"lines": [line.to_json(self.by) for line in self.lines]})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a run."""

    happened_at: datetime
    kind: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Partitions:
    """How many of a backfill's partitions have a finished run."""

    backfill: int
    done: int
    all: int


@dataclass(frozen=True)
class Progress:
    """How far a run is, as of its lanes' last commits. `lanes` is how many of them live.

    `ceilings` are how many requests may be in flight, by tier and over all lanes; `concurrency` is the job's word
    on it, which an operator may have overruled. Of a run with a promise, `held` first answers wait, or waited, for
    its certificate, and `phase` says in words how far that is. With `partitions` it is about a backfill: all its runs
    together, of which `run` is the newest.
    """

    run: int
    job: str
    state: str
    reason: str | None
    done: int
    documents: int
    waiting_because: str | None
    in_flight: int
    lanes: int
    results: int
    dead_letters: int
    reused: int
    escalated: int
    attempts: int
    cost_pico: int
    unknown_pico: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    budget_pico: int
    currency: str
    is_simulated: bool
    opened_at: datetime
    finished_at: datetime | None
    events: tuple[Event, ...]
    shared_budget: SharedBudget | None = None
    ceilings: dict[str, int] = field(default_factory=dict)
    concurrency: dict[str, int] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    backfill_id: int | None = None
    partitions: Partitions | None = None
    held: int = 0
    phase: str | None = None

    @property
    def name(self) -> str:
        """What it is the progress of: `run 7`, `run 8 (b.md)`, `backfill 2`."""
        variant = self.selection.get("variant")
        what = f"run {self.run} ({variant})" if variant else f"run {self.run}"
        return what if self.partitions is None else f"backfill {self.partitions.backfill}"

    @property
    def is_limited(self) -> bool:
        """Whether an operator has said how many requests may be in flight."""
        return self.ceilings != self.concurrency

    def to_json(self) -> dict[str, Any]:
        """One JSON object, as `Audit.to_json`."""
        return _json_object(asdict(self))


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One line about a run, as of its lanes' last commits."""

    run: int
    job: str
    state: str
    reason: str | None
    documents: int
    done: int
    cost_pico: int
    unknown_pico: int
    budget_pico: int
    currency: str
    is_simulated: bool
    opened_at: datetime
    finished_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object, as `Audit.to_json`."""
        return _json_object(asdict(self))


@dataclass(frozen=True, slots=True)
class PartitionSpend:
    """What a partition of a backfill came to: its newest run, with the attempts and the cost of all its `runs`."""

    partition: str
    state: str
    reason: str | None
    documents: int
    results: int
    reused: int
    dead_letters: int
    attempts: int
    cost_pico: int
    unknown_pico: int
    runs: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object, as `Audit.to_json`."""
        return _json_object(asdict(self))


@dataclass(frozen=True, slots=True)
class BackfillRun:
    """A run of a backfill, as an audit counts it: `results` with the `reused` ones."""

    run: int
    partition: str
    state: str
    reason: str | None
    documents: int
    results: int
    reused: int
    dead_letters: int
    duplicates: int
    attempts: int
    cost_pico: int
    unknown_pico: int
    currency: str
    is_simulated: bool


#: For a transaction whose figures have to agree.
SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

_SCOPE = text("""
    SELECT run_id, job, currency, is_simulated FROM run_overview
    WHERE run_id = coalesce(CAST(:run AS bigint), run_id) AND job = coalesce(CAST(:job AS text), job)
    ORDER BY run_id
""")

_JOBS = text("SELECT DISTINCT job FROM run_overview ORDER BY job LIMIT 20")

_RUNS_TOGETHER = text("""
    SELECT coalesce(sum(documents), 0) AS documents, coalesce(sum(adjusted_pico), 0) AS adjusted_pico
    FROM run_overview WHERE run_id = ANY(:runs)
""")

_ENDED = text("""
    SELECT state, tier, reason, sum(documents) AS documents FROM ended WHERE run_id = ANY(:runs)
    GROUP BY state, tier, reason ORDER BY sum(documents) DESC, reason
""")

#: A duplicate has the id of another document.
_ONCE = text("""
    SELECT coalesce(sum(documents), 0) FROM ended WHERE run_id = ANY(:runs) AND (:is_one OR state <> 'duplicate')
""")

#: Of documents that never were read, in a shard whose file changed, only the number is known.
_DISTINCT = text("""
    SELECT count(*) FROM (
        SELECT DISTINCT r.job, coalesce(nullif(d.document_id, ''), 'number ' || d.document_no)
        FROM (SELECT run_id, document_no, document_id FROM result
              UNION ALL SELECT run_id, document_no, document_id FROM dead_letter) d
        JOIN run_overview r USING (run_id) WHERE d.run_id = ANY(:runs)) distinct_document
""")

_OVERVIEW = text("""
    SELECT state, reason, is_simulated, prompt_version, opened_at, finished_at, budget_pico, budget_name
    FROM run_overview WHERE run_id = ANY(:runs)
""")

_SHARED = text("""
    SELECT name, cap_pico, used_pico, others_pico, granted - used_pico - others_pico AS held_pico,
           cap_pico - granted AS left_pico
    FROM (
        SELECT o.budget_name AS name, o.budget_pico AS cap_pico, o.granted_pico AS granted,
               coalesce(sum(l.pico) FILTER (WHERE o.run_id = ANY(:runs)), 0) AS used_pico,
               coalesce(sum(l.pico) FILTER (WHERE o.run_id <> ALL(:runs)), 0) AS others_pico
        FROM run_overview o
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(p.cost_pico + p.unknown_pico), 0) + o.closed_pico - o.closed_bound_pico AS pico
            FROM lane_progress p WHERE p.run_id = o.run_id) l
        WHERE o.budget_name = :name AND o.is_simulated = :is_simulated
        GROUP BY o.budget_id, o.budget_name, o.budget_pico, o.granted_pico
    ) budget
""")

#: A tier on which nothing ever hit shows no prefix; the run's other tiers tell its length, since they share it.
_CACHE = text("""
    WITH tier AS (
        SELECT attempts, coalesce(real_hit_tokens, 0) AS hit, lost_pico, lost_whole_pico, saved_pico,
               coalesce(prefix_tokens, max(prefix_tokens) OVER (PARTITION BY run_id)) AS prefix_tokens
        FROM cache_efficiency WHERE run_id = ANY(:runs)
    )
    SELECT CASE WHEN sum(attempts) = 0 THEN NULL WHEN sum(hit) = 0 THEN 0
                ELSE round(sum(hit)::numeric / sum(attempts * prefix_tokens), 6) END::double precision AS hit_rate,
           coalesce(sum(attempts * prefix_tokens), 0) AS expected_hit_tokens,
           coalesce(sum(hit), 0) AS real_hit_tokens,
           coalesce(sum(lost_pico), 0) AS lost_pico, coalesce(sum(lost_whole_pico), 0) AS lost_whole_pico,
           coalesce(sum(saved_pico), 0) AS saved_pico
    FROM tier
""")

_OFF_PEAK = text("""
    SELECT coalesce(sum(attempts), 0) AS off_peak_attempts, coalesce(sum(saved_pico), 0) AS off_peak_saved_pico
    FROM off_peak_saving WHERE run_id = ANY(:runs)
""")

_ESCALATIONS = text("""
    SELECT to_tier, reason, sum(escalated) AS escalated, sum(rescued) AS rescued, sum(agreed) AS agreed,
           sum(changed) AS changed, sum(labelled) AS labelled, sum(right_before) AS right_before,
           sum(right_after) AS right_after, sum(cost_pico) AS cost_pico, sum(unknown_pico) AS unknown_pico
    FROM escalation_yield WHERE run_id = ANY(:runs) GROUP BY to_tier, reason ORDER BY sum(escalated) DESC, 1, 2
""")

_ACCURACY = text("""
    SELECT tier, sum(labelled) AS labelled, sum(correct) AS correct
    FROM accuracy WHERE run_id = ANY(:runs) GROUP BY tier ORDER BY tier
""")

_SUMS = """
    SELECT coalesce(sum(done), 0) AS done, coalesce(sum(results), 0) AS results,
           coalesce(sum(dead_letters), 0) AS dead_letters, coalesce(sum(reused), 0) AS reused,
           coalesce(sum(escalated), 0) AS escalated, coalesce(sum(attempts), 0) AS attempts,
           coalesce(sum(cost_pico), 0) AS cost_pico, coalesce(sum(unknown_pico), 0) AS unknown_pico,
           coalesce(sum(hit_tokens), 0) AS hit_tokens, coalesce(sum(miss_tokens), 0) AS miss_tokens,
           coalesce(sum(output_tokens), 0) AS output_tokens, coalesce(sum(held), 0) AS held,
           coalesce(sum(in_flight) FILTER (WHERE is_alive), 0) AS in_flight,
           count(*) FILTER (WHERE is_alive) AS lanes,
           string_agg(DISTINCT waiting_because, '; ') FILTER (WHERE is_alive) AS lanes_wait
    FROM (SELECT *, ended_at IS NULL AND heartbeat_at > clock_timestamp() - make_interval(secs => :dead_after)
                 AS is_alive
          FROM lane_progress) lane
"""
_SUMS_OF_RUN = f"{_SUMS} WHERE lane.run_id = o.run_id"
_SUMS_OF_BACKFILL = f"""
    {_SUMS} WHERE lane.run_id IN (SELECT o.run_id FROM run_overview o WHERE o.backfill_id = b.backfill_id)
"""  # noqa: S608 (made of our own constants)

_PROGRESS = text(f"""
    SELECT o.run_id AS run, o.job, o.state, o.reason, o.documents, o.budget_pico, o.currency, o.is_simulated,
           o.opened_at, o.finished_at, o.budget_name, o.ladder, o.ceilings, o.concurrency, o.selection,
           o.backfill_id, o.closed_pico, o.closed_bound_pico, o.escalates_below IS NULL AS is_promised,
           c.size AS drawn, c.certified_at, s.*
    FROM run_overview o CROSS JOIN LATERAL ({_SUMS_OF_RUN}) s LEFT JOIN certificate c ON c.run_id = o.run_id
    WHERE o.run_id = :run
""")  # noqa: S608 (made of our own constants)

_LIVING_LANES = text("""
    SELECT run_id, pid FROM lane_progress
    WHERE ended_at IS NULL AND heartbeat_at > clock_timestamp() - make_interval(secs => :dead_after) ORDER BY lane_id
""")

_LEFT_OPEN = text("""
    SELECT count(*) AS attempts, coalesce(sum(unknown_pico), 0) AS bounds
    FROM attempt WHERE run_id = :run AND billing = 'open'
""")

_RUNS = text(f"""
    SELECT o.run_id AS run, o.job, o.state, o.reason, o.documents, s.done, s.cost_pico + o.closed_pico AS cost_pico,
           s.unknown_pico - o.closed_bound_pico AS unknown_pico, o.budget_pico, o.currency, o.is_simulated,
           o.opened_at, o.finished_at
    FROM run_overview o CROSS JOIN LATERAL ({_SUMS_OF_RUN}) s
    WHERE o.job = coalesce(CAST(:job AS text), o.job) ORDER BY o.run_id DESC
""")  # noqa: S608 (made of our own constants)

_CERTIFICATES = text("""
    SELECT run_id AS run, target::text, delta::text, documents, floor((1 - target) * documents) AS may_differ,
           size AS sampled, cut, score_at_cut, tail::text,
           CASE WHEN cut IS NOT NULL THEN (SELECT count(DISTINCT x.rank) FROM jsonb_each(findings) f
                                           CROSS JOIN jsonb_array_elements(f.value) x (rank)) END AS disagreements
    FROM certificate WHERE run_id = ANY(:runs) ORDER BY run_id
""")

_PAUSED = text("""
    SELECT run_id, selection FROM run_overview
    WHERE job = :job AND is_simulated = :is_simulated AND state = 'paused' AND backfill_id IS NULL
    ORDER BY run_id DESC
""")

#: The newest backfill that somebody works on. The lanes of a run that was left behind by another one count, too: what
#: they spent is spent.
_BACKFILL = text(f"""
    SELECT b.backfill_id, b.job, b.state, b.reason, b.documents, b.budget_pico, b.currency, b.is_simulated,
           b.opened_at, b.finished_at, cardinality(b.partitions) AS all_partitions,
           (SELECT count(DISTINCT o.selection -> 'partitions' ->> 0) FROM run_overview o
            WHERE o.backfill_id = b.backfill_id AND o.state = 'done') AS done_partitions,
           r.*, s.*
    FROM backfill_overview b CROSS JOIN LATERAL ({_SUMS_OF_BACKFILL}) s
    CROSS JOIN LATERAL (
        SELECT coalesce(max(o.run_id), 0) AS run, coalesce(sum(o.closed_pico), 0) AS closed_pico,
               coalesce(sum(o.closed_bound_pico), 0) AS closed_bound_pico
        FROM run_overview o WHERE o.backfill_id = b.backfill_id) r
    WHERE b.job = :job AND b.state = 'running' ORDER BY b.backfill_id DESC LIMIT 1
""")  # noqa: S608 (made of our own constants)

_BACKFILL_RUNS = text("""
    SELECT o.run_id AS run, o.selection -> 'partitions' ->> 0 AS partition, c.state, c.reason, c.documents,
           c.results + c.reused AS results, c.reused, c.dead_letters, c.duplicates, c.attempts, c.cost_pico,
           c.unknown_pico, c.currency, c.is_simulated
    FROM run_overview o JOIN run_cost c USING (run_id) WHERE o.backfill_id = :backfill ORDER BY o.run_id
""")

_EVENTS = text("SELECT happened_at, kind, detail FROM event WHERE run_id = :run ORDER BY event_id DESC LIMIT :most")

_ALL_EVENTS = text("""
    SELECT event_id, happened_at, kind, detail FROM event WHERE run_id = :run AND kind = ANY(:kinds) ORDER BY event_id
""")


async def audit(
    ledger: Ledger,
    *,
    run: int | None = None,
    job: str | None = None,
    by: Sequence[Side] = (),
    top: int = DEAREST,
    distinct: bool = False,
) -> Audit:
    """What a run, a job's runs, or (neither given) the whole ledger cost, from one snapshot of the rows.

    `by` asks for the spend split by these sides, too, and `top` for so many of the dearest and of the slowest
    documents. `distinct` has documents of several runs counted by their ids however many there are. Raises
    ConfigurationError where there is no such run or job, and where the scope mixes currencies or simulated with real
    money: sums of those would mean nothing.
    """
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        return await read_audit(connection, run=run, job=job, by=by, top=top, distinct=distinct)


async def read_audit(
    connection: AsyncConnection, *, run: int | None, job: str | None, by: Sequence[Side], top: int, distinct: bool
) -> Audit:
    """The same inside of a transaction that reads more from its SNAPSHOT."""
    scope = (await connection.execute(_SCOPE, {"run": run, "job": job})).all()
    if not scope and (run is not None or job is not None):
        raise ConfigurationError(await _explain_nothing(connection, run, job))
    _require_one({row.currency for row in scope}, "currencies")
    _require_one({"simulated" if row.is_simulated else "real" for row in scope}, "kinds of money")
    runs = [row.run_id for row in scope]
    spent = await _read_spend(connection, runs)
    return Audit(
        run=_only(runs),
        job=_only([row.job for row in scope]),
        currency=_only([row.currency for row in scope]),
        runs=tuple(runs),
        by=tuple(by),
        lines=await read_lines(connection, runs, by) if by else (),
        document_costs=await read_document_costs(connection, runs, top, spent["cost_pico"]),
        **await _read_totals(connection, runs),
        **spent,
        certificates=await _read_rows(connection, _CERTIFICATES, CertifiedRun, {"runs": runs}),
        distinct_documents=await _count_distinct(connection, {row.run_id: row.job for row in scope}, distinct),
        balances=await read_paid(connection, runs),
        slowest=await read_slowest(connection, runs, top),
    )


async def progress(ledger: Ledger, run_id: int, *, counts_open: bool = False) -> Progress:
    """How far the run is. Costs one row per lane. Raises ConfigurationError where there is no such run.

    With `counts_open`, attempts that dead lanes left open count as unknown, as in an audit: that reads the attempts.
    """
    async with ledger.transaction() as connection:
        key = {"run": run_id, "dead_after": DEAD_AFTER_S}
        found = (await connection.execute(_PROGRESS, key)).mappings().one_or_none()
        if found is None:
            raise ConfigurationError(await _explain_nothing(connection, run_id, None))
        row = _with_closed(_plain(found))
        if counts_open and not row["lanes"]:
            left = _plain((await connection.execute(_LEFT_OPEN, {"run": run_id})).mappings().one())
            row["attempts"] += left["attempts"]
            row["unknown_pico"] += left["bounds"]
        row["waiting_because"] = _waiting_because(row["state"], row["reason"], row["lanes"], row.pop("lanes_wait"))
        row["phase"] = _spell_phase(row)
        ladder = row.pop("ladder")
        for name in ("ceilings", "concurrency"):
            row[name] = {tier: row[name][tier] for tier in ladder if tier in row[name]}  # jsonb keeps no order
        events = await _read_rows(connection, _EVENTS, Event, {"run": run_id, "most": RECENT_EVENTS})
        shared = await _read_shared(connection, row.pop("budget_name"), row["is_simulated"], [run_id])
        return Progress(events=events, shared_budget=shared, **row)


def _spell_phase(row: dict[str, Any]) -> str | None:
    is_promised, drawn, certified_at = (row.pop(name) for name in ("is_promised", "drawn", "certified_at"))
    if not is_promised or row["state"] in ("done", "superseded"):
        return None
    if drawn is None and not row["held"]:
        return None
    if drawn is None:
        return f"1 of 3: first answers, {row['held']:,} wait for the certificate"
    if certified_at is None:
        return f"2 of 3: {drawn:,} drawn documents go to the last tier"
    return "3 of 3: certified; what is not accepted goes to the last tier"


async def list_events(ledger: Ledger, run_id: int, kinds: Sequence[str]) -> tuple[RunEvent, ...]:
    """All events of these kinds that the run had so far, the oldest first. One may yet appear before the last."""
    async with ledger.transaction() as connection:
        return await _read_rows(connection, _ALL_EVENTS, RunEvent, {"run": run_id, "kinds": list(kinds)})


async def list_living_lanes(ledger: Ledger) -> list[tuple[int, int]]:
    """Run and process id of every lane that works, on whichever machine."""
    async with ledger.transaction() as connection:
        rows = await connection.execute(_LIVING_LANES, {"dead_after": DEAD_AFTER_S})
        return [(run, pid) for run, pid in rows]


async def list_runs(ledger: Ledger, job: str | None = None) -> list[RunSummary]:
    """The runs of a job, or all of them, newest first."""
    async with ledger.transaction() as connection:
        return list(await _read_rows(connection, _RUNS, RunSummary, {"job": job, "dead_after": DEAD_AFTER_S}))


async def list_paused(ledger: Ledger, job: str, *, is_simulated: bool) -> list[tuple[int, dict[str, Any]]]:
    """The job's runs that somebody may go on with, each with its selection, newest first. Not those of backfills."""
    async with ledger.transaction() as connection:
        found = await connection.execute(_PAUSED, {"job": job, "is_simulated": is_simulated})
        return [(run_id, selection) for run_id, selection in found]


async def progress_of_backfill(ledger: Ledger, job: str) -> Progress | None:
    """How far the job's backfill is that somebody works on. None: there is none."""
    async with ledger.transaction() as connection:
        key = {"job": job, "dead_after": DEAD_AFTER_S}
        found = (await connection.execute(_BACKFILL, key)).mappings().one_or_none()
        if found is None:
            return None
        row = _with_closed(_plain(found))
        partitions = Partitions(*(row.pop(name) for name in ("backfill_id", "done_partitions", "all_partitions")))
        waits = row.pop("lanes_wait")
        row["waiting_because"] = waits if row["lanes"] else "no lane is at work yet"
        return Progress(events=(), partitions=partitions, **row)


def _with_closed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of lanes' sums with what exports told: a lane counts what it told itself, not what came later."""
    row["cost_pico"] += row.pop("closed_pico")
    row["unknown_pico"] -= row.pop("closed_bound_pico")
    return row


async def list_backfill(ledger: Ledger, backfill_id: int) -> list[BackfillRun]:
    """What each run of a backfill came to, counted from the rows, in the order they were opened."""
    async with ledger.transaction() as connection:
        return list(await _read_rows(connection, _BACKFILL_RUNS, BackfillRun, {"backfill": backfill_id}))


def by_partition(runs: Sequence[BackfillRun]) -> list[PartitionSpend]:
    """A backfill's runs added up by partition, in the order of their names."""
    of: dict[str, list[BackfillRun]] = {}
    for run in runs:
        of.setdefault(run.partition, []).append(run)
    return [_spend(of[name]) for name in sorted(of)]


def _spend(runs: Sequence[BackfillRun]) -> PartitionSpend:
    newest = runs[-1]
    return PartitionSpend(
        partition=newest.partition,
        state=newest.state,
        reason=newest.reason,
        documents=newest.documents,
        results=newest.results,
        reused=newest.reused,
        dead_letters=newest.dead_letters,
        attempts=sum(run.attempts for run in runs),
        cost_pico=sum(run.cost_pico for run in runs),
        unknown_pico=sum(run.unknown_pico for run in runs),
        runs=tuple(run.run for run in runs),
    )


async def _read_totals(connection: AsyncConnection, runs: list[int]) -> dict[str, Any]:
    """The fields of `Audit` that say how its runs stand, and what the cache and the hours were worth."""
    overview = (await connection.execute(_OVERVIEW, {"runs": runs})).mappings().all()
    names = ("state", "reason", "is_simulated", "prompt_version", "opened_at", "finished_at", "budget_pico")
    name, is_simulated = (_only([row[name] for row in overview]) for name in ("budget_name", "is_simulated"))
    async with hashed(connection):
        cache = _plain((await connection.execute(_CACHE, {"runs": runs})).mappings().one())
        off_peak = _plain((await connection.execute(_OFF_PEAK, {"runs": runs})).mappings().one())
    return {
        **_plain((await connection.execute(_RUNS_TOGETHER, {"runs": runs})).mappings().one()),
        **off_peak,
        "shared_budget": await _read_shared(connection, name, is_simulated, runs),
        "prefix_hit_rate": cache.pop("hit_rate"),
        **cache,
        **{name: _only([row[name] for row in overview]) for name in names},
    }


async def _read_shared(
    connection: AsyncConnection, name: str | None, is_simulated: bool, runs: list[int]
) -> SharedBudget | None:
    """The shared budget of that name, as these runs see it. None where they have none in common."""
    if name is None:
        return None
    key = {"name": name, "is_simulated": is_simulated, "runs": runs}
    return SharedBudget(**_plain((await connection.execute(_SHARED, key)).mappings().one()))


async def _read_spend(connection: AsyncConnection, runs: list[int]) -> dict[str, Any]:
    """The fields of `Audit` that count attempts and documents, and those that split them."""
    cells = await read_cells(connection, runs)
    async with hashed(connection):
        ended = [_plain(row) for row in (await connection.execute(_ENDED, {"runs": runs})).mappings()]
        escalations = _rows(await connection.execute(_ESCALATIONS, {"runs": runs}), Escalation)
        accuracy = _rows(await connection.execute(_ACCURACY, {"runs": runs}), Accuracy)
    return {
        **_count_documents(ended),
        **_total(cells),
        "tiers": _by_tier(cells, ended),
        "by_purpose": {
            name: PurposeSpend(sums.attempts, sums.cost_pico, sums.unknown_pico)
            for name, sums in sorted(split(cells, lambda cell: cell.purpose).items())
        },
        "hours": {
            name: HoursSpend(sums.attempts, sums.cost_pico) for name, sums in split(cells, lambda c: c.band).items()
        },
        "waste": _waste(cells),
        "escalations": escalations,
        "accuracy": accuracy,
    }


async def _count_distinct(connection: AsyncConnection, jobs: Mapping[int, str], distinct: bool) -> int | None:
    """Documents that ended in these runs. One of several runs of a job counts once: only their ids tell."""
    runs_of = Counter(jobs.values())
    alone = [run for run, job in jobs.items() if runs_of[job] == 1]
    together = [run for run, job in jobs.items() if runs_of[job] > 1]
    once = await _count(connection, _ONCE, runs=alone, is_one=len(jobs) == 1)
    if not together:
        return once
    most = await _count(connection, _ONCE, runs=together, is_one=False)
    if most > COUNTED_UNASKED and not distinct:
        return None
    return once + await _count(connection, _DISTINCT, runs=together)


async def _count(connection: AsyncConnection, query: TextClause, **key: Any) -> int:
    return int((await connection.execute(query, key)).scalar_one())


def _total(cells: Sequence[Cell]) -> dict[str, Any]:
    sums = add_up(cells)
    same = ("attempts", "cost_pico", "unknown_pico", "unknown_attempts", "escalated")
    tokens = ("hit_tokens", "miss_tokens", "output_tokens", "reasoning_tokens")
    return {
        **{name: getattr(sums, name) for name in (*same, *tokens)},
        "token_costs": _token_costs(cells),
        "priming_pico": add_up(cell for cell in cells if cell.purpose == "priming").cost_pico,
    }


def _token_costs(cells: Sequence[Cell]) -> TokenCosts:
    priced = add_up(cell for cell in cells if cell.billing == "known")
    pico = (priced.hit_pico, priced.miss_pico, priced.output_pico)
    return TokenCosts(*pico, priced.hit_tokens, priced.miss_tokens, priced.output_tokens)


def _count_documents(ended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Documents by how they ended; a reused result is a result."""
    of = dict.fromkeys(("result", "reused", "duplicate", "dead_letter"), 0)
    reasons: dict[str, int] = {}
    for row in ended:
        of[row["state"]] += row["documents"]
        if row["state"] == "dead_letter":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + row["documents"]
    return {
        "results": of["result"] + of["reused"],
        "reused": of["reused"],
        "duplicates": of["duplicate"],
        "dead_letters": of["dead_letter"],
        "dead_letters_by_reason": dict(sorted(reasons.items(), key=lambda each: (-each[1], each[0]))),
    }


def _by_tier(cells: Sequence[Cell], ended: Sequence[Mapping[str, Any]]) -> dict[str, TierSpend]:
    results: dict[str, int] = {}
    for row in ended:
        if row["state"] == "result":
            results[row["tier"]] = results.get(row["tier"], 0) + row["documents"]
    return {
        name: TierSpend(
            attempts=sums.attempts,
            results=results.get(name, 0),
            cost_pico=sums.cost_pico,
            unknown_pico=sums.unknown_pico,
            hit_tokens=sums.hit_tokens,
            miss_tokens=sums.miss_tokens,
            output_tokens=sums.output_tokens,
        )
        for name, sums in split(cells, lambda cell: cell.tier).items()
    }


def _waste(cells: Sequence[Cell]) -> tuple[Waste, ...]:
    """What bought no result, the dearest first."""
    parts = split(
        [cell for cell in cells if cell.waste],
        lambda cell: (cell.tier, cell.purpose, cell.signal, cell.verdict, cell.billing, cell.waste or ""),
    )
    made = [
        Waste(*(tier, purpose, signal or "no reply", verdict, billing), s.attempts, s.cost_pico, s.unknown_pico, kind)
        for (tier, purpose, signal, verdict, billing, kind), s in parts.items()
    ]
    return tuple(sorted(made, key=lambda each: -each.cost_pico - each.unknown_pico))


async def _read_rows(
    connection: AsyncConnection, query: Any, kind: type[Row], key: dict[str, Any]
) -> tuple[Row, ...]:
    return _rows(await connection.execute(query, key), kind)


def _rows(found: CursorResult[Any], kind: type[Row]) -> tuple[Row, ...]:
    return tuple(kind(**_plain(row)) for row in found.mappings())


async def _explain_nothing(connection: AsyncConnection, run: int | None, job: str | None) -> str:
    jobs = ", ".join((await connection.execute(_JOBS)).scalars()) or "none yet"
    what = f"run {run}" if run is not None else f"run of job {job}"
    return f"there is no {what} in this ledger; jobs it knows: {jobs}. `farthing audit` without a name shows all"


def _require_one(found: set[str], what: str) -> None:
    if len(found) > 1:
        raise ConfigurationError(
            f"these runs have two {what} ({', '.join(sorted(found))}), which are never added up: "
            "audit each job or run by itself, `farthing audit JOB` or `farthing audit RUN`"
        )


def _waiting_because(state: str, reason: str | None, lanes: int, lanes_wait: str | None) -> str | None:
    """Why the run is not as fast as it could be; None when it is, or is done."""
    if state == "running":
        return lanes_wait if lanes else "no lane is at work: run the same command to go on"
    return None if state == "done" else f"{state}: {reason or 'run the same command to go on'}"


def _only(values: Sequence[Any]) -> Any:
    """The one value that all have in common, or None."""
    first = values[0] if values else None
    return first if all(value == first for value in values) else None


def _plain(row: RowMapping) -> dict[str, Any]:
    """The row with Postgres's numeric sums, which are whole, as integers."""
    return {name: int(value) if isinstance(value, Decimal) else value for name, value in row.items()}


def _json_object(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _as_json(value) for name, value in fields.items()}


def _as_json(value: Any) -> Any:
    match value:
        case dict():
            return _json_object(value)
        case tuple() | list():
            return [_as_json(item) for item in value]
        case datetime():
            return value.isoformat()
        case _:
            return value
