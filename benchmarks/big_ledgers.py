"""A big ledger, made up: alone responsible for filling a Postgres with runs that look as if they had happened.

Postgres makes the rows itself (`generate_series`). What becomes of a document, how long it is and what it costs
follow from its number: 2 % of first attempts are lost and made again, 10 % of documents climb to the second tier, one
in a thousand is a dead letter, and one attempt in twenty hits no cache. Prices are the book's of each minute, so that
`farthing verify` proves such a run; the rest, from opening a run to settling it, is done by the ledger's own code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from pydantic import SecretStr

from schemas.answers import Answer
from schemas.attempts import RunId
from schemas.documents import InputFile, Manifest, Shard
from schemas.jobs import TIERS, Confidence, Input, Job
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from tasks.ledger import budgets, leases, runs
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.runs import Opening

START, SPAN = datetime(2026, 9, 1, tzinfo=UTC), timedelta(days=10)
#: An attempt of either tier costs less; what a run is allowed to spend on all of them.
RESERVED, CAP = 10**10, 10**18
SHARD_ROWS, LANES = 1000, 2
#: Attempts of a thousand documents.
PER_1000 = 1120
#: Documents whose rows are made in one transaction.
BLOCK = 500_000
SCHEMA = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
JOB = Job(
    name="big",
    folder=Path("jobs/big"),
    input=Input(path="documents.parquet", id="id", text="text"),
    prompt="Which colour? JSON.",
    answer=Answer.from_schema("answer", SCHEMA),
    ladder=(TIERS["flash"], TIERS["pro"]),
    budget=Money(CAP, Currency.USD),
    concurrency={"flash": 8, "pro": 8},
    confidence=Confidence(fields=("colour",)),
)

_PRICES = """
    CREATE TABLE IF NOT EXISTS public.of_minute (
        minute timestamptz, tier text, price_id integer, hit_pico bigint, miss_pico bigint, output_pico bigint,
        PRIMARY KEY (minute, tier)
    )
"""
#: A document's attempts, each with what it is to come to. Chance is a hash, so that every statement makes the same.
_MADE = """
    CREATE OR REPLACE TEMP VIEW made AS
    SELECT d.document_no, a.attempt_no, a.tier, a.purpose, a.reason, a.came_to, d.lane, e.at, p.price_id,
           t.hit, t.miss, t.output, t.hit * p.hit_pico + t.miss * p.miss_pico + t.output * p.output_pico AS cost
    FROM (
        SELECT n AS document_no, n / {rows} %% {lanes} AS lane, d.is_lost, c.climbs,
               c.climbs AND h.dead %% 100 = 0 AS is_dead,
               timestamptz '{start}' + n * interval '{step}' AS began
        FROM generate_series({{first}}, {{last}}) n
        CROSS JOIN LATERAL (SELECT abs(hashint8extended(n, 1)) AS lost, abs(hashint8extended(n, 2)) AS climb,
                                   abs(hashint8extended(n, 3)) AS dead) h
        CROSS JOIN LATERAL (SELECT (h.lost %% 50 = 0)::int AS is_lost) d
        CROSS JOIN LATERAL (SELECT h.climb %% 10 = 0 AS climbs) c
    ) d
    CROSS JOIN LATERAL (
        SELECT 1 AS attempt_no, 'flash' AS tier, 'answer' AS purpose, NULL AS reason, 'lost' AS came_to
        WHERE is_lost = 1
        UNION ALL
        SELECT 1 + is_lost, 'flash',
               CASE WHEN is_lost = 1 THEN 'retry' WHEN d.document_no < 3 THEN 'priming' ELSE 'answer' END,
               CASE WHEN is_lost = 1 THEN 'lost' END, CASE WHEN climbs THEN 'unsure' ELSE 'accepted' END
        UNION ALL
        SELECT 2 + is_lost, 'pro', 'answer', 'low_confidence', CASE WHEN is_dead THEN 'refused' ELSE 'accepted' END
        WHERE climbs
    ) a
    CROSS JOIN LATERAL (SELECT d.began + a.attempt_no * interval '3 s' AS at) e
    JOIN public.of_minute p ON p.tier = a.tier AND p.minute = date_trunc('minute', e.at)
    CROSS JOIN LATERAL (SELECT abs(hashint8extended(d.document_no, 10 + a.attempt_no)) AS chance) x
    CROSS JOIN LATERAL (SELECT CASE WHEN x.chance %% 20 = 0 THEN 0 ELSE 640 END AS hit) c
    CROSS JOIN LATERAL (SELECT c.hit, (740 + x.chance %% 1500)::int - c.hit AS miss,
                               (5 + x.chance %% 61)::int AS output) t
"""
_ROWS = (
    """
    INSERT INTO attempt_intent (run_id, document_no, attempt_no, tier, purpose, reason, shard_no, epoch, lane_id,
                                grant_id, price_id, reserved, intended_at)
    SELECT %(run)s, document_no, attempt_no, tier, purpose, reason, document_no / %(rows)s, 1,
           (%(lanes)s::bigint[])[1 + lane], (%(grants)s::bigint[])[1 + lane], price_id, %(reserved)s, at FROM made
    """,
    """
    INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, verdict, http_status, finish_reason,
                                 sent_at, completed_at, hit, miss, output, reasoning, price_id, cost, served_model,
                                 recorded_at)
    SELECT %(run)s, document_no, attempt_no,
           CASE came_to WHEN 'lost' THEN 'lost' WHEN 'refused' THEN 'refused_by_provider' ELSE 'answered' END,
           CASE came_to WHEN 'unsure' THEN 'low_confidence' WHEN 'accepted' THEN 'accepted' END, 200, 'stop', at, at,
           k.hit, k.miss, k.output, k.none, k.price_id, k.cost,
           CASE WHEN k.cost IS NOT NULL THEN CASE tier WHEN 'pro' THEN %(pro)s ELSE %(flash)s END END,
           at + interval '1 s'
    FROM made m
    LEFT JOIN LATERAL (SELECT m.hit, m.miss, m.output, 0 AS none, m.price_id, m.cost) k ON came_to <> 'lost'
    """,
    """
    INSERT INTO attempt_unknown (run_id, document_no, attempt_no, bound, because, declared_at)
    SELECT %(run)s, document_no, attempt_no, %(reserved)s, 'lost', at + interval '1 s'
    FROM made WHERE came_to = 'lost'
    """,
    """
    INSERT INTO answer (run_id, document_no, attempt_no, content, answer, confidence, confidence_signal)
    SELECT %(run)s, document_no, attempt_no, '{"colour":"green"}', '{"colour":"green"}', 0.4, 'logprobs'
    FROM made WHERE came_to = 'unsure'
    """,
    """
    INSERT INTO document (run_id, document_no, document_id, text_digest, state, reason, tier, attempt_no, answer,
                          confidence, confidence_signal, recorded_at)
    SELECT %(run)s, document_no, 'document ' || %(run)s || '.' || document_no,
           decode(md5('text ' || %(run)s || '.' || document_no), 'hex'),
           CASE came_to WHEN 'refused' THEN 'dead_letter' ELSE 'result' END,
           CASE came_to WHEN 'refused' THEN 'refused_by_provider' END, tier, attempt_no,
           CASE came_to WHEN 'refused' THEN NULL ELSE
               jsonb_build_object('colour', (ARRAY['red', 'green', 'blue'])[1 + document_no %% 3]) END,
           CASE came_to WHEN 'refused' THEN NULL ELSE 0.9 END,
           CASE came_to WHEN 'refused' THEN NULL ELSE 'logprobs' END, at + interval '1 s'
    FROM made WHERE came_to IN ('accepted', 'refused')
    """,
)
#: The hash index is made anew: row by row it takes as long as all else.
_INDEX = "CREATE INDEX document_by_text ON document USING hash (text_digest) WHERE state = 'result'"
#: What the lanes of a run would have counted.
_COUNTED = """
    UPDATE lane l SET attempts = s.attempts, escalated = s.escalated, cost = s.cost, bounds = s.bounds, hit = s.hit,
                      miss = s.miss, output = s.output
    FROM (SELECT i.lane_id, count(*) AS attempts,
                 count(*) FILTER (WHERE i.purpose IN ('answer', 'priming') AND i.reason IS NOT NULL) AS escalated,
                 sum(o.cost) AS cost, sum(i.reserved) FILTER (WHERE o.cost IS NULL) AS bounds, sum(o.hit) AS hit,
                 sum(o.miss) AS miss, sum(o.output) AS output
          FROM attempt_intent i JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
          WHERE i.run_id = %(run)s GROUP BY i.lane_id) s
    WHERE l.lane_id = s.lane_id
"""
_ENDED = """
    UPDATE lane l SET done = d.done, results = d.results, dead_letters = d.dead_letters
    FROM (SELECT count(*) AS done, count(*) FILTER (WHERE state = 'result') AS results,
                 count(*) FILTER (WHERE state = 'dead_letter') AS dead_letters
          FROM document WHERE run_id = %(run)s) d
    WHERE l.lane_id = (SELECT min(lane_id) FROM lane WHERE run_id = %(run)s)
"""


@dataclass(frozen=True, slots=True)
class Made:
    """A run that was made, and how many seconds it took to settle it."""

    run_id: RunId
    documents: int
    settle_s: float


async def fill(url: str, sizes: dict[str, list[int]]) -> list[Made]:
    """Make a run of so many attempts for each size of each job, all finished and settled."""
    with psycopg.connect(url, autocommit=True, options="-c search_path=farthing") as superuser:
        superuser.execute("SET synchronous_commit = off; SET maintenance_work_mem = '1GB'; SET work_mem = '256MB'")
        superuser.execute("DROP INDEX IF EXISTS document_by_text")
        async with opened(SecretStr(url), Role.LANE) as ledger:
            prices = await runs.register_prices(ledger, load_price_book().rows())
            _write_prices(superuser, prices)
            made = [
                await _make_run(ledger, superuser, job, number, size * 1000 // PER_1000)
                for job, attempts in sizes.items()
                for number, size in enumerate(attempts)
            ]
            superuser.execute(_INDEX)
            settled = [replace(each, settle_s=await _settle(ledger, each.run_id)) for each in made]
            superuser.execute("VACUUM (ANALYZE)")  # as autovacuum would before long
            return settled


def _write_prices(superuser: psycopg.Connection, prices: dict[str, int]) -> None:
    book = load_price_book()
    superuser.execute(_PRICES)
    with superuser.cursor() as cursor, cursor.copy("COPY public.of_minute FROM STDIN") as copy:
        for number in range(int((SPAN + timedelta(hours=1)) / timedelta(minutes=1))):
            minute = START + number * timedelta(minutes=1)
            for tier in JOB.ladder:
                price = book.at(tier.model, Currency.USD, minute)
                amounts = (price.hit_pico, price.miss_pico, price.output_pico)
                copy.write_row((minute, tier.name, prices[price.name], *amounts))
    superuser.execute("ANALYZE public.of_minute")


async def _make_run(ledger: Ledger, superuser: psycopg.Connection, job: str, number: int, documents: int) -> Made:
    opening = Opening(
        replace(JOB, name=job),
        _manifest(documents),
        {"partitions": [str(number)]},
        Currency.USD,
        CAP,
        is_simulated=True,
    )
    run = await runs.open_run(ledger, opening)
    lanes = [await leases.register(ledger, run.run_id) for _ in range(LANES)]
    amount = 4 * RESERVED * (documents // LANES + SHARD_ROWS)
    grants = [
        await budgets.open_grant(ledger, run.run_id, lane, run.budget_id, need=amount, want=amount) for lane in lanes
    ]
    key = {
        "run": run.run_id,
        "lanes": lanes,
        "grants": [grant.grant_id for grant in grants if grant],
        "rows": SHARD_ROWS,
        "reserved": RESERVED,
        "flash": JOB.tier("flash").model,
        "pro": JOB.tier("pro").model,
    }
    for first in range(0, documents, BLOCK):
        _write(superuser, first, min(first + BLOCK, documents) - 1, documents, key)
    superuser.execute("UPDATE shard SET state = 'done', lease_epoch = 1 WHERE run_id = %s", [run.run_id])
    # Of a run that Postgres has not counted yet it would compare all pairs of rows.
    with superuser.transaction():
        superuser.execute("SET LOCAL enable_nestloop = off")
        for statement in (_COUNTED, _ENDED):
            superuser.execute(statement, key)
    return Made(run.run_id, documents, 0.0)


def _write(superuser: psycopg.Connection, first: int, last: int, documents: int, key: dict[str, object]) -> None:
    step = f"{SPAN.total_seconds() / documents:.6f} s"
    made = _MADE.format(rows=SHARD_ROWS, lanes=LANES, start=START.isoformat(), step=step)
    with superuser.transaction():
        superuser.execute(made.replace("%%", "%").format(first=first, last=last))
        for statement in _ROWS:
            superuser.execute(statement, key)


def _manifest(documents: int) -> Manifest:
    return Manifest((InputFile(0, "documents.parquet", 1000, "0" * 64, documents),), tuple(_shards(documents)), ())


def _shards(documents: int) -> Iterator[Shard]:
    for number, first in enumerate(range(0, documents, SHARD_ROWS)):
        rows = min(SHARD_ROWS, documents - first)
        yield Shard(number, 0, first, rows, first, rows)


async def _settle(ledger: Ledger, run_id: RunId) -> float:
    began = time.perf_counter()
    if await runs.settle(ledger, run_id) is None:
        raise RuntimeError(f"run {run_id} was not settled")
    return time.perf_counter() - began
