"""Shapes: buckets hold every row of a run once, and add up to its audit."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import pairwise

from pydantic import SecretStr

from schemas.buckets import COST_EDGES, pick_stride
from schemas.records import Record
from tasks.ledger import runs
from tasks.ledger.breakdowns import SlowDocument
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.shapes import Shape, Sureness, read_shape
from tasks.ledger.spend import SNAPSHOT, Audit, read_audit
from tests.ledgers import COST, Hand, make_manifest, opening, run_everything, sql


async def read(url: str, **scope: int | str) -> tuple[Audit, Shape]:
    """As an auditor, who reads nothing but views."""
    async with opened(SecretStr(url), Role.AUDITOR) as ledger, ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        found = await read_audit(
            connection, **{"run": None, "job": None, "by": (), "top": 5, "distinct": False} | scope
        )
        shape = await read_shape(connection, found.runs)
        assert shape is not None
        return found, shape


async def test_slices_and_buckets_add_up_to_the_audit_of_a_run_and_of_a_job(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    second = await runs.open_run(ledger, opening(manifest=make_manifest(3)))
    hand = await Hand.join(ledger, second)
    await hand.intend(hand.intent((await hand.claim()).lease, 0))
    await hand.record(Record(hand.outcome(0)))
    for scope in ({"run": 1}, {"run": 2}, {"job": "colours"}):
        found, shape = await read(ledger_url, **scope)
        for name in ("attempts", "cost_pico", "unknown_pico", "hit_tokens", "miss_tokens"):
            assert sum(getattr(each, name) for each in shape.slices) == getattr(found, name)
        assert found.cost_pico > 0
        assert sum(shape.costs.values()) == found.document_costs.documents
        assert {each.tier for each in shape.slices} == set(found.tiers)


async def test_documents_are_counted_by_what_is_known_of_their_cost(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET cost = 0 WHERE document_no = 3")  # a refusal that was not billed
    sql(ledger_url, "DELETE FROM run_sums")
    sql(ledger_url, "SELECT sum_up(1)")
    _, shape = await read(ledger_url, run=1)
    costs = {bucket: (COST_EDGES[bucket - 1] if bucket else 0) for bucket in shape.costs}
    assert costs[0] == 0
    assert shape.costs[0] == 1
    plain = next(bucket for bucket, edge in costs.items() if edge and edge <= COST < COST_EDGES[bucket])
    assert shape.costs[plain] == 3  # documents 0, 2 and 4; document 1 was dearer


async def test_answers_are_counted_by_how_sure_they_were_and_against_the_threshold(
    ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    sql(ledger_url, "UPDATE document SET confidence = 1 WHERE document_no = 2")
    sql(ledger_url, "UPDATE document SET confidence = 0.85 WHERE document_no = 4")  # as sure as it must be
    sql(ledger_url, "DELETE FROM run_sums")
    _, shape = await read(ledger_url, run=1)
    assert shape.threshold == Decimal("0.85")
    assert shape.confidences == (
        *(Sureness("flash", 16, 1, 1), Sureness("flash", 34, 1, 0), Sureness("flash", 36, 1, 0)),
        *(Sureness("flash", 39, 1, 0), Sureness("pro", 36, 1, 0)),
    )


async def test_the_slowest_documents_waited_longest_for_replies_over_all_attempts(
    ledger: Ledger, ledger_url: str
) -> None:
    """Whatever the provider's clock says: it may be another than that of the intents. Stored or from the rows."""
    await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET sent_at = completed_at - interval '2 s' WHERE document_no = 1")
    sql(ledger_url, "UPDATE attempt_outcome SET sent_at = completed_at - interval '3 s' WHERE document_no = 3")
    sql(ledger_url, "DELETE FROM run_sums")
    for _ in range(2):
        found, _ = await read(ledger_url, run=1)
        assert found.slowest[:2] == (
            SlowDocument(1, 1, "d1", "result", "pro", None, 2, 4_000_000),
            SlowDocument(1, 3, "d3", "dead_letter", "flash", "refused_by_provider", 1, 3_000_000),
        )
        assert (await read(ledger_url, run=1, top=0))[0].slowest == ()
        sql(ledger_url, "SELECT sum_up(1)")
    sql(ledger_url, "UPDATE run_sums SET slowest = '[]'")
    assert (await read(ledger_url, run=1))[0].slowest == ()


async def test_postgres_cuts_the_time_of_a_run_as_the_page_does_and_shorter_strides_make_up_longer_ones(
    ledger: Ledger, ledger_url: str
) -> None:
    await runs.open_run(ledger, opening())
    strides = set()
    for days in (Decimal(10) ** power * digit for power in range(-5, 4) for digit in range(1, 10)):
        sql(ledger_url, f"UPDATE run SET finished_at = opened_at + interval '{days} days'")
        [(first, last, stride)] = sql(ledger_url, "SELECT first, last, stride FROM run_span")
        assert stride == pick_stride(first, last)
        strides.add(stride)
    ordered = sorted(strides)
    assert len(ordered) > 10
    assert all(longer % shorter == timedelta() for shorter, longer in pairwise(ordered))


async def test_sums_are_the_same_in_any_time_zone(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    [(stored,)] = sql(ledger_url, "SELECT over_time FROM run_sums")
    sql(ledger_url, "DELETE FROM run_sums")
    sql(ledger_url, "SET TIME ZONE 'Asia/Shanghai'; SELECT sum_up(1)")
    assert sql(ledger_url, "SELECT over_time FROM run_sums") == [(stored,)]


async def test_a_run_of_weeks_has_few_slices_and_nothing_falls_out_of_them(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    sql(ledger_url, "UPDATE run SET opened_at = opened_at - interval '20 days'")
    sql(ledger_url, "UPDATE attempt_intent SET intended_at = intended_at - interval '30 days' WHERE document_no = 0")
    sql(ledger_url, "UPDATE attempt_intent SET intended_at = intended_at + interval '9 days' WHERE document_no = 1")
    sql(ledger_url, "DELETE FROM run_sums")
    found, shape = await read(ledger_url, run=1)
    assert shape.stride == timedelta(hours=6)
    assert sum(each.attempts for each in shape.slices) == found.attempts
    begins = {each.begins for each in shape.slices}
    assert shape.first - shape.stride < min(begins) <= max(begins) <= shape.last
