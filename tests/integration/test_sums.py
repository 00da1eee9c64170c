"""Sums of a run that is done: an audit from them is the audit from the rows, and they are read while they hold."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.records import Record
from schemas.settings import Settings
from schemas.spending import Side
from tasks import enrichment
from tasks.ledger import leases, runs, spend
from tasks.ledger.breakdowns import STORED_DEAREST
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.shapes import Shape, read_shape
from tests.ledgers import COST, RESERVED, Hand, opening, run_everything, sql, value

#: Rows as nobody would make them: any tier, purpose, signal, price and cost with any other, known, lost or open.
_ANYTHING = """
    SELECT setseed({seed});
    CREATE TEMP TABLE one AS
    SELECT {run}::bigint AS run_id, n AS document_no, a::smallint AS attempt_no,
           (ARRAY['flash', 'pro'])[1 + floor(random() * 2)] AS tier,
           (ARRAY['answer', 'retry', 'repair', 'priming'])[1 + floor(random() * 4)] AS purpose,
           (ARRAY[NULL, 'low_confidence', 'blank'])[1 + floor(random() * 3)] AS reason,
           1 + floor(random() * (SELECT count(*) FROM price))::int AS price_id,
           (random() * 1e9)::bigint AS cost, (random() * 2)::int * 320 AS hit, (random() * 999)::int AS miss,
           (random() * 99)::int AS output, random() AS came, random() AS told,
           timestamptz '2026-09-26' + random() * interval '3 days' AS at
    FROM generate_series(0, {documents} - 1) n, generate_series(1, 3) a WHERE random() < 0.7;
    INSERT INTO attempt_intent
    SELECT run_id, document_no, attempt_no, tier, purpose, reason, 0, 1, {lane}, {grant}, price_id, cost + 5, at
    FROM one;
    INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, verdict, sent_at, completed_at, hit, miss,
                                 output, reasoning, price_id, cost, served_model)
    SELECT run_id, document_no, attempt_no, CASE WHEN told < 0.8 THEN 'answered' ELSE 'blank' END,
           (ARRAY['accepted', 'low_confidence', 'invalid_answer'])[1 + floor(told * 4)], at, at + interval '5 s',
           hit, miss, output, output / 2, CASE WHEN came < 0.6 THEN price_id END, CASE WHEN came < 0.6 THEN cost END,
           CASE WHEN told < 0.5 THEN 'a-model' END
    FROM one WHERE came < 0.8;
    INSERT INTO attempt_unknown
    SELECT run_id, document_no, attempt_no, cost + 5, CASE WHEN told < 0.5 THEN 'lost' ELSE 'lane dead' END, at
    FROM one WHERE came > 0.6 AND told < 0.9;
    INSERT INTO answer
    SELECT run_id, document_no, attempt_no, '?', jsonb_build_object('colour', (ARRAY['red', 'blue'])[attempt_no]),
           told
    FROM one WHERE came < 0.5 AND attempt_no < 3;
    INSERT INTO document (run_id, document_no, document_id, text_digest, state, reason, tier, attempt_no, answer,
                          of_document_no)
    SELECT {run}, n, 'd' || n % 50, '', s.state, CASE s.state WHEN 'dead_letter' THEN 'blank' END, 'pro', 1,
           CASE s.state WHEN 'result' THEN '{{"colour": "red"}}'::jsonb END, 0
    FROM generate_series(0, {documents} - 1) n
    CROSS JOIN LATERAL (
        SELECT (ARRAY['result', 'dead_letter', 'duplicate'])[1 + floor(random() * 3 + n * 0)]) s (state);
    INSERT INTO label SELECT {run}, n, 'red' FROM generate_series(0, {documents} - 1) n WHERE random() < 0.5;
    DROP TABLE one;
    UPDATE run SET state = 'done' WHERE run_id = {run};
    SELECT sum_up({run})
"""


async def audit(url: str, **scope: Any) -> dict[str, Any]:
    """All that an audit says, as an auditor."""
    async with opened(SecretStr(url), Role.AUDITOR, pool_size=1) as ledger:
        return (await spend.audit(ledger, by=tuple(Side), **scope)).to_json()


async def shape(url: str, found: dict[str, Any]) -> Shape | None:
    """How the spend of an audit's runs lies, as an auditor."""
    async with opened(SecretStr(url), Role.AUDITOR) as auditor, auditor.transaction() as connection:
        return await read_shape(connection, found["runs"])


async def run_anything(ledger: Ledger, url: str, seed: float, documents: int) -> RunId:
    """A run that is done, whose rows chance made."""
    run = await runs.open_run(ledger, opening(selection={"seed": str(seed)}))
    hand = await Hand.join(ledger, run)
    sql(url, _ANYTHING.format(**key_of(hand), seed=seed, documents=documents))
    return run.run_id


def key_of(hand: Hand) -> dict[str, int]:
    return {"run": hand.run.run_id, "lane": hand.lane_id, "grant": hand.grant_id}


async def test_an_audit_from_sums_is_the_audit_from_rows(ledger: Ledger, ledger_url: str) -> None:
    """For any rows, of one run, of several, and of some that are summed and some that are not."""
    seeds = {await run_anything(ledger, ledger_url, seed, documents): seed for seed, documents in SIZES}
    scopes = [{"run": run} for run in seeds] + [{"job": "colours"}, {}]
    wanted = [scope | {"top": top} for scope in scopes for top in (7, STORED_DEAREST + 20)]
    stored = [await audit(ledger_url, **scope) for scope in wanted]
    shapes = [await shape(ledger_url, each) for each in stored]
    assert value(ledger_url, "SELECT count(*) FROM summed") == len(seeds)
    assert value(ledger_url, "SELECT max(jsonb_array_length(dearest)) FROM run_sums") == STORED_DEAREST
    assert all(stored[4][name] for name in ("attempts", "unknown_pico", "escalations", "accuracy", "waste"))
    assert shapes[4] is not None
    assert shapes[4].slices
    assert shapes[4].confidences
    for gone in (1, len(seeds)):
        sql(ledger_url, f"DELETE FROM run_sums WHERE run_id <= {gone}")
        assert [await audit(ledger_url, **scope) for scope in wanted] == stored
        assert [await shape(ledger_url, each) for each in stored] == shapes


#: Where chance begins, and the number of documents: fewer than are named as the dearest, and more.
SIZES = ((0.1, 1), (0.2, 30), (0.3, 90))


async def test_sums_are_read_in_place_of_rows(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, "UPDATE run_sums SET spend = '[]', over_time = '[]', confidences = '[]'")
    found = await audit(ledger_url, run=run.run_id)
    assert found["attempts"] == 0
    lies = await shape(ledger_url, found)
    assert lies is not None
    assert (lies.slices, lies.confidences) == ((), ())
    sql(ledger_url, "UPDATE run_sums SET over_time = NULL, confidences = NULL")  # summed before shapes were
    lies = await shape(ledger_url, found)
    assert lies is not None
    assert (len(lies.slices) > 0, len(lies.confidences) > 0) == (True, True)


async def leave_in_flight(ledger: Ledger) -> Hand:
    """A run that is done, one attempt of which nobody has heard of."""
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    await hand.leave()
    other = await Hand.join(ledger, hand.run)
    for _ in range(2):
        claimed = await other.claim()
        for number in range(claimed.shard.first_document_no, claimed.shard.first_document_no + 3):
            await other.answer(claimed.lease, number, 1 if number else 2)
        await leases.finish(ledger, hand.run.run_id, other.lane_id, claimed.lease)
    assert await runs.settle(ledger, hand.run.run_id)
    return hand


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_late_reply_counts_at_once_and_is_in_the_sums_of_the_next_settling(
    is_known: bool, ledger: Ledger, ledger_url: str
) -> None:
    hand = await leave_in_flight(ledger)
    before = await audit(ledger_url)
    assert (before["cost_pico"], before["unknown_pico"]) == (6 * COST, RESERVED)
    await hand.record(Record(hand.outcome(0) if is_known else hand.outcome(0, usage=None, verdict=None)))
    after = await audit(ledger_url)
    assert (after["cost_pico"], after["unknown_pico"]) == ((7 * COST, 0) if is_known else (6 * COST, RESERVED))
    assert after != before
    assert sql(ledger_url, "SELECT late FROM summed") == []
    assert await runs.settle(ledger, hand.run.run_id)
    assert sql(ledger_url, "SELECT late FROM summed") == [(1,)]
    assert await audit(ledger_url) == after


async def test_after_a_correction_rows_are_read_until_they_are_summed_again(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, -7, 'the export of May')")
    assert sql(ledger_url, "SELECT run_id FROM unsummed") == [(1,)]
    for _ in range(2):
        assert await runs.settle(ledger, run.run_id)
    assert sql(ledger_url, "SELECT run_id, late FROM run_sums ORDER BY late") == [(1, 0), (1, 1)]


async def test_what_came_late_is_summed_when_the_next_run_of_the_job_is_done(ledger: Ledger, ledger_url: str) -> None:
    await run_anything(ledger, ledger_url, 0.1, 9)
    again = await run_everything(ledger)
    sql(ledger_url, "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, -7, 'the export of May')")
    assert sql(ledger_url, "SELECT run_id FROM unsummed") == [(1,)]
    await enrichment.settle_run(Settings(database_url=SecretStr(ledger_url)), again, [])
    assert sql(ledger_url, "SELECT run_id FROM unsummed") == []


async def test_a_run_that_postgres_has_not_counted_is_audited_without_comparing_all_pairs(
    ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    sql(ledger_url, "ANALYZE")
    run = await run_anything(ledger, ledger_url, 0.4, 6000)
    sql(ledger_url, "DELETE FROM run_sums WHERE run_id = 2")
    async with asyncio.timeout(20):  # a second; pair by pair, minutes
        assert await shape(ledger_url, await audit(ledger_url, run=run))


async def test_a_run_that_is_not_done_is_not_summed(ledger: Ledger, ledger_url: str) -> None:
    await runs.open_run(ledger, opening())
    sql(ledger_url, "SELECT sum_up(run_id) FROM run")
    assert value(ledger_url, "SELECT count(*) FROM run_sums") == 0
