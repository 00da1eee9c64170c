"""A small ledger by hand: a job without a disk, runs of it, and a lane whose every call the test makes itself."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from pydantic import SecretStr
from sqlalchemy import text

from schemas.answers import Answer
from schemas.attempts import LaneId, Purpose, Reply, Signal, Usage
from schemas.documents import Duplicate, InputFile, Manifest, Shard
from schemas.jobs import TIERS, Confidence, Input, Job
from schemas.ladder import Verdict
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from schemas.records import DocumentState, Ending, Held, Intent, Lease, Outcome, Record, ResultKey, StoredAnswer
from tasks.ledger import attempts, budgets, leases, runs
from tasks.ledger.attempts import Permit, Permitted, Reusable
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.leases import ClaimedShard
from tasks.ledger.runs import Opening, Run

T = TypeVar("T")
BOOK = load_price_book()
#: Off-peak in Beijing: flash costs 3,000 / 150,000 / 600,000 pico-dollars per token.
AT = datetime(2026, 9, 26, 0, 10, tzinfo=UTC)
USAGE = Usage(hit=640, miss=100, output=5)
COST = 640 * 3_000 + 100 * 150_000 + 5 * 600_000
RESERVED = 10**9
CAP = 10**12
SCHEMA = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
JOB = Job(
    name="colours",
    folder=Path("jobs/colours"),
    input=Input(path="documents.parquet", id="id", text="text"),
    prompt="Which colour? JSON.",
    answer=Answer.from_schema("answer", SCHEMA),
    ladder=(TIERS["flash"], TIERS["pro"]),
    budget=Money(CAP, Currency.USD),
    concurrency={"flash": 8, "pro": 8},
    confidence=Confidence(fields=("colour",)),
    measure="colour",
)

#: A month without a row, closed.
MONTH_CLOSE = """
    INSERT INTO month_close (month, is_simulated, currency, attempts, cost, unknown_attempts, unknown, runs, digest,
                             until)
    VALUES ('2026-08-01', false, 'USD', 0, 0, 0, 0, '[]', 'sha256:0', now())
"""

#: Rows as a certificate has them, of a run that promised nothing.
CERTIFICATE = (
    "INSERT INTO ranked (run_id, document_no, rank, is_sampled) VALUES (:run_id, 1, 0, true)",
    """INSERT INTO frozen_order (run_id, documents, piloted, size, allowance, fields, salt, seed, order_digest)
       VALUES (:run_id, 500, 1, 1, 0, '{colour}', 'salt', 'seed', 'sha256:0')""",
    """INSERT INTO certified (run_id, findings, cut, score_at_cut, tail, served)
       VALUES (:run_id, '{"colour": [0]}', 0, 0.4, 0.05, '{"pro": ["deepseek-v4-pro"]}')""",
)

#: A backfill that nobody works on, with its budget.
BACKFILL = """
    INSERT INTO budget (currency, cap, is_simulated, name, declared) VALUES ('USD', 5, false, 'backfill 1', 5);
    INSERT INTO backfill (job, is_simulated, asked, partitions, documents, currency, cap, state)
    VALUES ('colours', false, '{}', '{a,b}', 6, 'USD', 5, 'paused')
"""


def text_digest(number: int) -> bytes:
    """What stands for the text of document `number`."""
    return hashlib.sha256(f"text {number}".encode()).digest()


def make_manifest(documents: int = 6, shard_rows: int = 3, duplicates: Sequence[Duplicate] = ()) -> Manifest:
    """One file in shards of `shard_rows`; every raw row is a document."""
    starts = range(0, documents, shard_rows)
    shards = [
        Shard(number, 0, start, min(shard_rows, documents - start), start, min(shard_rows, documents - start))
        for number, start in enumerate(starts)
    ]
    return Manifest((InputFile(0, "documents.parquet", 1000, "0" * 64, documents),), tuple(shards), tuple(duplicates))


def opening(**changes: Any) -> Opening:
    usual = Opening(JOB, make_manifest(), {"partitions": []}, Currency.USD, CAP, is_simulated=False)
    return replace(usual, **changes)


@asynccontextmanager
async def lane_ledger(url: str, pool_size: int = 4, answer_within_s: float | None = None) -> AsyncIterator[Ledger]:
    async with opened(SecretStr(url), Role.LANE, pool_size=pool_size, answer_within_s=answer_within_s) as ledger:
        yield ledger


async def in_blocks(*blocks: T) -> AsyncIterator[T]:
    """These, as they would come from a reading."""
    for block in blocks:
        yield block


def sql(url: str, query: str, *values: object) -> list[tuple[Any, ...]]:
    """What the superuser sees or does, past every view, role and trigger; [] if it does not ask for rows."""
    options = "-c search_path=farthing -c session_replication_role=replica"
    with psycopg.connect(url, options=options) as connection:
        cursor = connection.execute(query, values or None)
        return cursor.fetchall() if cursor.description else []


def value(url: str, query: str, *values: object) -> Any:
    """The first column of the first row."""
    return sql(url, query, *values)[0][0]


@dataclass
class Hand:
    """A lane of `run`, moved by hand. Each attempt reserves RESERVED; plain ones cost COST."""

    ledger: Ledger
    run: Run
    lane_id: LaneId
    price_ids: dict[str, int]
    grant_id: int = 0

    @classmethod
    async def join(cls, ledger: Ledger, run: Run, *, amount: int = 100 * RESERVED) -> Hand:
        hand = cls(
            ledger,
            run,
            await leases.register(ledger, run.run_id),
            await runs.register_prices(ledger, BOOK.rows()),
        )
        await hand.take(amount)
        return hand

    async def take(self, amount: int) -> int:
        """A new grant, to reserve from henceforth."""
        run = self.run
        grant = await budgets.open_grant(
            self.ledger, run.run_id, self.lane_id, run.budget_id, need=amount, want=amount
        )
        assert grant is not None
        self.grant_id = grant.grant_id
        return grant.grant_id

    async def claim(self) -> ClaimedShard:
        claimed = await leases.claim(self.ledger, self.run.run_id, self.lane_id)
        assert claimed is not None
        return claimed

    def intent(self, lease: Lease, number: int, attempt_no: int = 1, tier: str = "flash", **fields: Any) -> Intent:
        price = BOOK.at(JOB.tier(tier).model, Currency.USD, AT)
        usual: dict[str, Any] = {"purpose": Purpose.ANSWER, "reason": None, "reserved": RESERVED}
        usual["text_digest"] = b"a text that nobody answered".ljust(32)
        return Intent(
            number,
            attempt_no,
            lease,
            tier,
            grant_id=self.grant_id,
            price_id=self.price_ids[price.name],
            **usual | fields,
        )

    async def intend(self, *intents: Intent, below: str = "0.85") -> list[Permit]:
        reusable = Reusable(JOB.prompt_version, "pro", JOB.escalate.below.__class__(below), self.run.is_simulated)
        return await attempts.intend(self.ledger, self.run.run_id, self.lane_id, intents, reusable)

    async def record(self, *records: Record) -> set[Lease]:
        return await attempts.record(self.ledger, self.run.run_id, self.lane_id, records)

    def outcome(
        self,
        number: int,
        attempt_no: int = 1,
        signal: Signal = Signal.ANSWERED,
        verdict: Verdict | None = Verdict.ACCEPTED,
        usage: Usage | None = USAGE,
        tier: str = "flash",
        **fields: Any,
    ) -> Outcome:
        """A known outcome where there is usage, a free one for an unbilled signal, else unknown up to RESERVED."""
        reply = Reply(signal, AT, AT, http_status=200, content='{"colour":"red"}', usage=usage, served_model=None)
        if usage is not None:
            price = BOOK.at(JOB.tier(tier).model, Currency.USD, AT)
            money: tuple[int | None, int | None, int | None] = (
                self.price_ids[price.name],
                price.cost(usage),
                None,
            )
        else:
            money = (None, 0, None) if signal is Signal.RATE_LIMITED else (None, None, RESERVED)
        return Outcome(number, attempt_no, reply, verdict, *money, **fields)

    def result(self, lease: Lease, number: int, attempt_no: int = 1, tier: str = "flash", **fields: Any) -> Ending:
        usual: dict[str, Any] = {"answer": {"colour": "red"}, "confidence": 0.9, "confidence_signal": "logprobs"}
        return self.ending(lease, number, DocumentState.RESULT, tier=tier, attempt_no=attempt_no, **usual | fields)

    def ending(self, lease: Lease, number: int, state: DocumentState, **fields: Any) -> Ending:
        usual: dict[str, Any] = {"text_digest": text_digest(number)}
        return Ending(number, f"d{number}", lease, state, **usual | fields)

    async def answer(self, lease: Lease, number: int, attempt_no: int = 1, **fields: Any) -> None:
        """One plain attempt whose answer becomes the result."""
        permits = await self.intend(self.intent(lease, number, attempt_no, text_digest=text_digest(number)))
        assert permits == [Permitted()]
        await self.record(Record(self.outcome(number, attempt_no), self.result(lease, number, attempt_no, **fields)))

    async def answer_shard(self) -> ClaimedShard:
        """Claim a shard, answer all of it, finish it."""
        claimed = await self.claim()
        first = claimed.shard.first_document_no
        for number in range(first, first + claimed.shard.document_count):
            await self.answer(claimed.lease, number)
        assert await leases.finish(self.ledger, self.run.run_id, self.lane_id, claimed.lease)
        return claimed

    async def leave(self) -> None:
        await leases.leave(self.ledger, self.run.run_id, self.lane_id, "done")


async def run_everything(ledger: Ledger) -> Run:
    """A finished run in which a bit of everything happened: six documents, two shards, two lanes.

    0 result · 1 held, then escalated to pro · 2 lost, then a result · 3 refused: dead letter · 4 in flight when its
    lane ended, repaired by the next one · 5 a duplicate of 0. Document 0 has a label that its result equals.
    """
    manifest = make_manifest(duplicates=[Duplicate(5, 0, is_same_text=True)])
    run = await runs.open_run(ledger, opening(manifest=manifest))
    await runs.add_labels(ledger, run.run_id, in_blocks([(0, "red"), (1, "blue")]))
    first = await Hand.join(ledger, run)
    await _work_first_shard(first)
    second_shard = await first.claim()
    await first.intend(first.intent(second_shard.lease, 4, text_digest=text_digest(4)))
    await first.leave()  # document 4 is in flight
    second = await Hand.join(ledger, run)
    await _work_second_shard(second)
    await second.leave()
    async with ledger.transaction() as connection:
        for statement in CERTIFICATE:
            await connection.execute(text(statement), {"run_id": run.run_id})
    assert await runs.settle(ledger, run.run_id) is not None
    return run


async def _work_first_shard(hand: Hand) -> None:
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.intend(hand.intent(lease, 1, purpose=Purpose.PRIMING))
    unsure = StoredAnswer('{"colour":"green"}', {"colour": "green"}, 0.4, "logprobs")
    held = Held(1, lease, 0.4, attempt_no=1)
    await hand.record(Record(hand.outcome(1, verdict=Verdict.LOW_CONFIDENCE, answer=unsure), held=held))
    await hand.intend(hand.intent(lease, 1, 2, "pro", reason="low_confidence"))
    rescued = hand.outcome(1, 2, tier="pro", is_escalated=True)
    await hand.record(Record(rescued, hand.result(lease, 1, 2, "pro", answer={"colour": "blue"})))
    await hand.intend(hand.intent(lease, 2))
    await hand.record(Record(hand.outcome(2, signal=Signal.LOST, verdict=None, usage=None)))
    await hand.intend(hand.intent(lease, 2, 2, purpose=Purpose.RETRY, reason="lost"))
    await hand.record(Record(hand.outcome(2, 2), hand.result(lease, 2, 2)))
    assert await leases.finish(hand.ledger, hand.run.run_id, hand.lane_id, lease)


async def _work_second_shard(hand: Hand) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 3))
    refused = hand.outcome(3, signal=Signal.REFUSED, verdict=None)
    dead = hand.ending(lease, 3, DocumentState.DEAD_LETTER, reason="refused_by_provider", tier="flash")
    await hand.record(Record(refused, dead))
    await hand.intend(hand.intent(lease, 4, 2, purpose=Purpose.RETRY, reason="lost"))
    await hand.record(Record(hand.outcome(4, 2), hand.result(lease, 4, 2)))
    copy = hand.ending(lease, 5, DocumentState.DUPLICATE, of=ResultKey(hand.run.run_id, 0))
    await hand.record(Record(ending=copy))
    assert await leases.finish(hand.ledger, hand.run.run_id, hand.lane_id, lease)
