"""The ledger's tables as SQLAlchemy sees them. The migrations make them; a test holds the two together.

Money is BIGINT pico units of the run's currency. Intents, outcomes, unknowns, answers, what is held, orders and
certificates, grants, closes, adjustments, closed months, sums and events are only ever appended; `run`, `backfill`,
`shard`, `lane` and `budget` have named columns that change. A document that is not terminal has no row in `document`:
what is missing is the shard's range less the rows.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

SCHEMA = "farthing"
LANE_COUNTERS = (
    "done",
    "results",
    "dead_letters",
    "reused",
    "escalated",
    "attempts",
    "cost",
    "bounds",
    "hit",
    "miss",
    "output",
    "held",
)
metadata = MetaData(schema=SCHEMA)


def _instant(name: str, *, nullable: bool = False, default: bool = False) -> Column[object]:
    """A timestamp with time zone; `default` lets Postgres fill in the instant of the insert."""
    server_default = text("clock_timestamp()") if default else None
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=server_default)


def _document_key() -> tuple[Column[int], Column[int]]:
    return (
        Column("run_id", BigInteger, primary_key=True, autoincrement=False),
        Column("document_no", BigInteger, primary_key=True, autoincrement=False),
    )


def _attempt_key() -> tuple[Column[int], ...]:
    return (*_document_key(), Column("attempt_no", SmallInteger, primary_key=True, autoincrement=False))


price = Table(
    "price",
    metadata,
    Column("price_id", Integer, Identity(), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("band", Text, nullable=False),
    _instant("valid_from"),
    Column("hit_pico", BigInteger, nullable=False),
    Column("miss_pico", BigInteger, nullable=False),
    Column("output_pico", BigInteger, nullable=False),
)

prompt_version = Table(
    "prompt_version",
    metadata,
    Column("prompt_version", Text, primary_key=True),
    Column("prefix", Text, nullable=False),
    Column("answer_schema", JSONB, nullable=False),
    Column("ladder", JSONB, nullable=False),
    _instant("created_at", default=True),
)

budget = Table(
    "budget",
    metadata,
    Column("budget_id", BigInteger, Identity(), primary_key=True),
    Column("currency", Text, nullable=False),
    Column("cap", BigInteger, nullable=False),
    Column("granted", BigInteger, nullable=False, server_default=text("0")),
    Column("is_simulated", Boolean, nullable=False),
    Column("name", Text),
    Column("declared", BigInteger),
    UniqueConstraint("name", "is_simulated"),
)

run = Table(
    "run",
    metadata,
    Column("run_id", BigInteger, Identity(), primary_key=True),
    Column("job", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("prompt_version", Text, nullable=False),
    Column("policy", JSONB, nullable=False),
    Column("selection", JSONB, nullable=False),
    Column("manifest_digest", Text, nullable=False),
    Column("documents", BigInteger, nullable=False),
    Column("compared_fields", ARRAY(Text), nullable=False),
    Column("currency", Text, nullable=False),
    Column("budget_id", BigInteger, nullable=False),
    Column("is_simulated", Boolean, nullable=False),
    _instant("opened_at", default=True),
    _instant("finished_at", nullable=True),
    Column("ledger_digest", Text),
    Column("concurrency", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("limits", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("backfill_id", BigInteger),
    Column("reuses", JSONB),
)

backfill = Table(
    "backfill",
    metadata,
    Column("backfill_id", BigInteger, Identity(), primary_key=True),
    Column("job", Text, nullable=False),
    Column("is_simulated", Boolean, nullable=False),
    Column("asked", JSONB, nullable=False),
    Column("partitions", ARRAY(Text), nullable=False),
    Column("documents", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("cap", BigInteger, nullable=False),
    Column("budget_name", Text),
    Column("reuses", JSONB),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("lanes", Integer, nullable=False, server_default=text("0")),
    Column("host", Text),
    Column("pid", Integer),
    _instant("opened_at", default=True),
    _instant("finished_at", nullable=True),
)

run_event = Table(
    "run_event",
    metadata,
    Column("event_id", BigInteger, Identity(), primary_key=True),
    Column("run_id", BigInteger, nullable=False),
    _instant("happened_at", default=True),
    Column("kind", Text, nullable=False),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("event_key", Text),
    UniqueConstraint("run_id", "event_key"),
)

input_file = Table(
    "input_file",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("file_no", Integer, primary_key=True, autoincrement=False),
    Column("path", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("partition", Text),
)

shard = Table(
    "shard",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("shard_no", Integer, primary_key=True, autoincrement=False),
    Column("file_no", Integer, nullable=False),
    Column("first_row", BigInteger, nullable=False),
    Column("row_count", BigInteger, nullable=False),
    Column("first_document_no", BigInteger, nullable=False),
    Column("document_count", BigInteger, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'open'")),
    Column("lease_epoch", Integer, nullable=False, server_default=text("0")),
    Column("lane_id", BigInteger),
)

duplicate = Table(
    "duplicate",
    metadata,
    *_document_key(),
    Column("of_document_no", BigInteger, nullable=False),
    Column("is_same_text", Boolean, nullable=False),
)

lane = Table(
    "lane",
    metadata,
    Column("lane_id", BigInteger, Identity(), primary_key=True),
    Column("run_id", BigInteger, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    _instant("started_at", default=True),
    _instant("heartbeat_at", default=True),
    _instant("ended_at", nullable=True),
    Column("ended_because", Text),
    Column("in_flight", Integer, nullable=False, server_default=text("0")),
    Column("waiting_because", Text),
    Column("places", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    # What this lane has committed so far, kept in the transaction that commits it, so that a progress
    # line costs one row per lane and not a count over millions.
    *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in LANE_COUNTERS),
)

budget_grant = Table(
    "budget_grant",
    metadata,
    Column("grant_id", BigInteger, Identity(), primary_key=True),
    Column("budget_id", BigInteger, nullable=False),
    Column("run_id", BigInteger, nullable=False),
    Column("lane_id", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    _instant("granted_at", default=True),
)

grant_close = Table(
    "grant_close",
    metadata,
    Column("grant_id", BigInteger, primary_key=True, autoincrement=False),
    Column("close_no", SmallInteger, primary_key=True, autoincrement=False),
    Column("used", BigInteger, nullable=False),
    _instant("closed_at", default=True),
)

attempt_intent = Table(
    "attempt_intent",
    metadata,
    *_attempt_key(),
    Column("tier", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("reason", Text),
    Column("shard_no", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("lane_id", BigInteger, nullable=False),
    Column("grant_id", BigInteger, nullable=False),
    Column("price_id", Integer, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    _instant("intended_at", default=True),
)

attempt_outcome = Table(
    "attempt_outcome",
    metadata,
    *_attempt_key(),
    Column("signal", Text, nullable=False),
    Column("verdict", Text),
    Column("http_status", SmallInteger),
    Column("finish_reason", Text),
    _instant("sent_at"),
    _instant("completed_at"),
    Column("hit", Integer),
    Column("miss", Integer),
    Column("output", Integer),
    Column("reasoning", Integer),
    Column("price_id", Integer),
    Column("cost", BigInteger),
    Column("served_model", Text),
    Column("fingerprint", Text),
    Column("provider_id", Text),
    Column("detail", Text),
    _instant("recorded_at", default=True),
)

attempt_unknown = Table(
    "attempt_unknown",
    metadata,
    *_attempt_key(),
    Column("bound", BigInteger, nullable=False),
    Column("because", Text, nullable=False),
    _instant("declared_at", default=True),
)

answer = Table(
    "answer",
    metadata,
    *_attempt_key(),
    Column("content", Text, nullable=False),
    Column("answer", JSONB),
    Column("confidence", Double),
    Column("confidence_signal", Text),
)

document = Table(
    "document",
    metadata,
    *_document_key(),
    Column("document_id", Text, nullable=False),
    Column("text_digest", LargeBinary),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("tier", Text),
    Column("attempt_no", SmallInteger),
    Column("answer", JSONB),
    Column("confidence", Double),
    Column("confidence_signal", Text),
    Column("of_run_id", BigInteger),
    Column("of_document_no", BigInteger),
    _instant("recorded_at", default=True),
)

held = Table(
    "held",
    metadata,
    *_document_key(),
    Column("attempt_no", SmallInteger),
    Column("confidence", Double),
    Column("of_run_id", BigInteger),
    Column("of_document_no", BigInteger),
    _instant("recorded_at", default=True),
)

ranked = Table(
    "ranked",
    metadata,
    *_document_key(),
    Column("rank", BigInteger, nullable=False),
    Column("is_sampled", Boolean, nullable=False),
    UniqueConstraint("run_id", "rank"),
)

frozen_order = Table(
    "frozen_order",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("documents", BigInteger, nullable=False),
    Column("piloted", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("allowance", BigInteger),
    Column("fields", ARRAY(Text), nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("seed", LargeBinary, nullable=False),
    Column("order_digest", Text, nullable=False),
    _instant("frozen_at", default=True),
)

certified = Table(
    "certified",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("findings", JSONB, nullable=False),
    Column("cut", BigInteger, nullable=False),
    Column("score_at_cut", Double),
    Column("tail", Numeric),
    Column("served", JSONB, nullable=False),
    _instant("certified_at", default=True),
)

label = Table(
    "label",
    metadata,
    *_document_key(),
    Column("label", Text, nullable=False),
)

cost_adjustment = Table(
    "cost_adjustment",
    metadata,
    Column("adjustment_id", BigInteger, Identity(), primary_key=True),
    Column("run_id", BigInteger, nullable=False),
    Column("document_no", BigInteger),
    Column("attempt_no", SmallInteger),
    Column("amount", BigInteger, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("billed_on", Date),
    _instant("adjusted_at", default=True),
    # With an attempt: what it was billed, tokens times a price row, as for an outcome.
    Column("price_id", Integer),
    Column("hit", Integer),
    Column("miss", Integer),
    Column("output", Integer),
    Column("adjusted_by", Text, server_default=text("SESSION_USER")),
    # Of a correction of what an export told, whose tokens may be negative.
    Column("corrected_price_id", Integer),
)

month_close = Table(
    "month_close",
    metadata,
    Column("month", Date, primary_key=True),
    Column("is_simulated", Boolean, primary_key=True),
    Column("currency", Text, primary_key=True),
    Column("attempts", BigInteger, nullable=False),
    Column("cost", Numeric, nullable=False),
    Column("unknown_attempts", BigInteger, nullable=False),
    Column("unknown", Numeric, nullable=False),
    Column("runs", JSONB, nullable=False),
    Column("digest", Text, nullable=False),
    _instant("until"),
    _instant("closed_at", default=True),
    Column("closed_by", Text, nullable=False, server_default=text("SESSION_USER")),
)

run_sums = Table(
    "run_sums",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("late", BigInteger, primary_key=True, autoincrement=False),
    Column("spend", JSONB, nullable=False),
    Column("ended", JSONB, nullable=False),
    Column("cache_efficiency", JSONB, nullable=False),
    Column("off_peak_saving", JSONB, nullable=False),
    Column("escalation_yield", JSONB, nullable=False),
    Column("accuracy", JSONB, nullable=False),
    Column("cost_at_most", ARRAY(BigInteger), nullable=False),
    Column("cost_documents", ARRAY(BigInteger), nullable=False),
    Column("dearest", JSONB, nullable=False),
    _instant("summed_at", default=True),
    Column("slowest", JSONB),
    Column("waits", JSONB),
    Column("over_time", JSONB),
    Column("confidences", JSONB),
)
