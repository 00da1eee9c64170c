"""The proof: a consistent run proves, and each planted corruption turns its guarantee false and is named."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from schemas.errors import ConfigurationError
from schemas.records import Record
from tasks.ledger import leases, runs
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.proof import prove
from tests.ledgers import BOOK, COST, RESERVED, Hand, opening, run_everything, sql

GUARANTEES = [f"G{number}" for number in range(1, 11)]

#: What is done to the finished run 1 behind the triggers' back, which guarantees fall (G3 is the digest over the
#: rows, so it falls with every fact that it covers), and what the proof must name.
CORRUPTIONS = {
    "a file's digest": ("UPDATE input_file SET sha256 = repeat('1', 64)", "G1", "run 1: its files and shards"),
    "a shard's range": ("UPDATE shard SET first_row = 2 WHERE shard_no = 1", "G1", "shard 1.1: row 2 was cut before"),
    "documents of the run": ("UPDATE run SET documents = 7", "G1 G3", "run 1: 7 documents, but its shards have 6"),
    "a lost document": (
        "DELETE FROM document WHERE document_no = 5",
        "G2 G3 G8",
        "document 1.5: has no terminal row, and its shard 1 is done",
    ),
    "an invented document": (
        "INSERT INTO document (run_id, document_no, document_id, state, reason)"
        " VALUES (1, 6, '', 'dead_letter', 'x')",
        "G2 G8",
        "document 1.6: is outside of the run",
    ),
    "an open shard": ("UPDATE shard SET state = 'open' WHERE shard_no = 1", "G2", "shard 1.1: still open"),
    "a verdict": (
        "UPDATE attempt_outcome SET verdict = 'blank' WHERE document_no = 0",
        "G2 G3 G8",
        "document 1.0: its result names attempt 1 at flash, which accepted nothing",
    ),
    "a duplicate": ("DELETE FROM duplicate", "G2 G3", "document 1.5: ended as a duplicate of 0"),
    "the digest": ("UPDATE run SET ledger_digest = 'sha256:0'", "G3", "run 1: its rows have the digest"),
    "a reason": (
        "UPDATE document SET reason = 'lost' WHERE document_no = 3",
        "G3 G8",
        "run 1: its rows have the digest",
    ),
    "a bill without intent": (
        "INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, sent_at, completed_at, cost)"
        " VALUES (1, 3, 9, 'rate_limited', now(), now(), 0)",
        "G4",
        "attempt_outcome 1.3.9: has no intent",
    ),
    "an answer without intent": (
        "INSERT INTO answer (run_id, document_no, attempt_no, content) VALUES (1, 3, 9, '')",
        "G4",
        "answer 1.3.9: has no intent",
    ),
    "work after the end": (
        "UPDATE attempt_intent i SET intended_at = d.recorded_at + interval '1 microsecond'"
        " FROM document d WHERE d.document_no = 0 AND i.document_no = 0",
        "G3 G5",
        "attempt_intent 1.0.1: intended after its document had ended",
    ),
    "a second result": (
        "UPDATE attempt_outcome SET verdict = 'accepted' WHERE document_no = 1",
        "G3 G5 G8",
        "document 1.1: 2 of its answers were accepted",
    ),
    "a result paid for twice": (
        "UPDATE document SET text_digest = (SELECT text_digest FROM document WHERE document_no = 0),"
        " recorded_at = (SELECT recorded_at - interval '1 hour' FROM document WHERE document_no = 0)"
        " WHERE document_no = 2;"
        " UPDATE attempt_intent SET intended_at = intended_at WHERE document_no = 0",
        "G3 G5",
        "attempt_intent 1.0.1: the result 1.2 was committed before",
    ),
    "two attempts at once": (
        "UPDATE attempt_outcome SET recorded_at = (SELECT finished_at FROM run)"
        " WHERE document_no = 2 AND attempt_no = 1;"
        " UPDATE attempt_unknown SET declared_at = (SELECT finished_at FROM run) WHERE document_no = 2",
        "G3 G6",
        "attempt_intent 1.2.2: intended before attempt 1 was over",
    ),
    "too many retries": (
        "UPDATE attempt_outcome SET signal = 'lost' WHERE document_no = 1;"
        " UPDATE attempt_intent SET document_no = 1, attempt_no = attempt_no + 2 WHERE document_no = 2;"
        " UPDATE attempt_unknown SET document_no = 1, attempt_no = 3 WHERE document_no = 2;"
        " UPDATE attempt_outcome SET document_no = 1, attempt_no = attempt_no + 2, signal = 'malformed'"
        " WHERE document_no = 2",
        "G2 G3 G5 G6 G8",
        "document 1.1: 4 attempts may have been billed and brought nothing",
    ),
    "a price": (
        "UPDATE price SET hit_pico = hit_pico + 1 WHERE name = 'deepseek-flash/USD/2026-09-10T04:00Z/off_peak'",
        "G7 G8",
        "attempt_outcome 1.0.1: cost",
    ),
    "a price that no attempt met": (
        "UPDATE price SET output_pico = 1, hit_pico = 1 WHERE price_id = (SELECT price_id FROM attempt_intent"
        " WHERE tier = 'pro')",
        "G7 G8",
        "price deepseek-v4-pro/USD",
    ),
    "an instant in peak hours": (
        "UPDATE attempt_outcome SET completed_at = '2026-09-24T02:00:00Z' WHERE document_no = 0",
        "G3 G7 G8",
        "attempt_outcome 1.0.1: booked by deepseek-flash/USD/2026-09-10T04:00Z/off_peak",
    ),
    "a cost": (
        "UPDATE attempt_outcome SET cost = cost + 1 WHERE document_no = 0",
        "G3 G7 G8 G9",
        "attempt_outcome 1.0.1: cost",
    ),
    "a free lunch": (
        "UPDATE attempt_outcome SET cost = 0 WHERE cost IS NULL",
        "G3 G7 G8 G9",
        "attempt_outcome 1.2.1: cost 0 after lost without usage or price",
    ),
    "a smaller bound": (
        "UPDATE attempt_unknown SET bound = bound - 1 WHERE document_no = 4",
        "G3 G8 G9",
        "attempt_unknown 1.4.1: bound",
    ),
    "an unknown forgotten": (
        "DELETE FROM attempt_unknown WHERE document_no = 4",
        "G3 G6 G8",
        "attempt_intent 1.4.1: has no outcome, is not declared unknown",
    ),
    "no bound": (
        "DELETE FROM attempt_unknown WHERE document_no = 2",
        "G3 G8",
        "attempt_outcome 1.2.1: has neither a cost nor a bound",
    ),
    "a lane's counter": ("UPDATE lane SET hit = hit + 1 WHERE lane_id = 2", "G8", "lane 2: counted"),
    "a lane's documents": (
        "UPDATE lane SET done = done + 1 WHERE lane_id = 2",
        "G8",
        "lane: the run's lanes counted",
    ),
    "money granted": ("UPDATE budget SET granted = granted - 1", "G9", "budget 1: granted is"),
    "a higher cap": ("UPDATE budget SET cap = cap * 2", "G9", "budget 1: the cap is 2000000000000"),
    "a close": ("UPDATE grant_close SET used = used + 1 WHERE grant_id = 1", "G9", "budget_grant 1: closed by"),
    "no close": ("DELETE FROM grant_close WHERE grant_id = 1", "G9", "budget_grant 1: is open although"),
    "a smaller grant": (
        f"UPDATE budget_grant SET amount = {RESERVED} WHERE grant_id = 1",
        "G9",
        "budget_grant 1: its",
    ),
    "a smaller reservation": (
        "UPDATE attempt_intent SET reserved = 1 WHERE document_no = 0",
        "G3 G9",
        "attempt_outcome 1.0.1: cost",
    ),
    "an epoch": ("UPDATE shard SET lease_epoch = 0 WHERE shard_no = 0", "G10", "attempt_intent 1.0.1: epoch 1"),
    "a zombie's attempt": (
        "UPDATE attempt_intent SET intended_at = (SELECT max(intended_at) + interval '1 microsecond'"
        " FROM attempt_intent WHERE document_no = 4) WHERE document_no = 4 AND attempt_no = 1",
        "G3 G10",
        "attempt_intent 1.4.1: under epoch 1 of shard 1, after epoch 3 was at work",
    ),
    "two owners": (
        "UPDATE attempt_intent SET epoch = 3 WHERE document_no = 4",
        "G3 G10",
        "shard 1.1: lanes 1, 2 intended under one epoch, 3",
    ),
    "a shard of another": (
        "UPDATE attempt_intent SET shard_no = 1, epoch = 1 WHERE document_no = 0",
        "G3 G10",
        "attempt_intent 1.0.1: epoch 1 of shard 1",
    ),
}


async def test_a_run_in_which_everything_happened_proves(ledger: Ledger) -> None:
    run = await run_everything(ledger)
    proof = await prove(ledger, run.run_id, BOOK)
    assert {name: found.violations for name, found in proof.evidence.items()} == dict.fromkeys(GUARANTEES, ())
    assert proof.proved
    assert {name: found.checked for name, found in proof.evidence.items()} == {
        "G1": 2,
        "G2": 6,
        "G3": 1,
        "G4": 7,
        "G5": 8,
        "G6": 8,
        "G7": 6,
        "G8": 8,
        "G9": 2,
        "G10": 3,
    }


async def test_the_proof_is_one_json_object(ledger: Ledger) -> None:
    run = await run_everything(ledger)
    told = (await prove(ledger, run.run_id, BOOK)).to_json()
    assert told["proved"] is True
    assert told["guarantees"] == dict.fromkeys(GUARANTEES, True)
    assert told["evidence"]["G4"] == {"checked": 7, "violations": [], "says": told["evidence"]["G4"]["says"]}


@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_a_corruption_turns_its_guarantees_false_and_is_named(
    name: str, ledger: Ledger, ledger_url: str
) -> None:
    statements, fallen, named = CORRUPTIONS[name]
    run = await run_everything(ledger)
    sql(ledger_url, statements)
    proof = await prove(ledger, run.run_id, BOOK)
    assert [guarantee for guarantee, holds in proof.guarantees.items() if not holds] == fallen.split()
    assert not proof.proved
    violations = [violation for found in proof.evidence.values() for violation in found.violations]
    assert any(violation.startswith(named) for violation in violations), violations


async def test_an_unfinished_run_proves_and_says_what_is_missing(ledger: Ledger) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    await hand.answer_shard()
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 3))
    proof = await prove(ledger, run.run_id, BOOK)
    assert proof.proved, proof.to_json()
    assert "3 of 6 documents have not ended yet" in proof.evidence["G2"].says
    assert proof.evidence["G3"].checked == 0


async def test_a_late_outcome_leaves_the_proof_whole(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    late = Hand(ledger, run, 1, await runs.register_prices(ledger, BOOK.rows()))
    await late.record(Record(late.outcome(4, 1)))
    proof = await prove(ledger, run.run_id, BOOK)
    assert proof.proved, proof.to_json()
    assert sql(ledger_url, "SELECT granted FROM budget") == [(COST * 6 + pro_cost(ledger_url) + RESERVED,)]


def pro_cost(url: str) -> int:
    return int(sql(url, "SELECT sum(cost_pico) FROM attempt WHERE tier = 'pro'")[0][0])


#: What Postgres would have stamped, had its clock been an hour ahead until just before these rows and then set right.
CLOCK_SET_BACK = {
    "an ending": "UPDATE document SET recorded_at = recorded_at - interval '1 hour'",
    "a later attempt": "UPDATE attempt_intent SET intended_at = intended_at - interval '1 hour' WHERE attempt_no > 1",
    "another lane": "UPDATE attempt_intent SET intended_at = intended_at - interval '1 hour' WHERE epoch > 1",
    "a result of the same text": "UPDATE document SET text_digest = (SELECT text_digest FROM document"
    " WHERE document_no = 0), recorded_at = recorded_at - interval '1 hour' WHERE document_no = 2",
}


@pytest.mark.parametrize("rows", CLOCK_SET_BACK)
async def test_a_clock_that_was_set_back_breaks_no_guarantee(rows: str, ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, CLOCK_SET_BACK[rows])
    proof = await prove(ledger, run.run_id, BOOK)
    proof.evidence.pop("G3")  # a text is covered by the digest
    assert proof.proved, proof.to_json()


async def test_rows_that_the_digest_does_not_cover_are_counted(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    assert "not covered" not in (await prove(ledger, run.run_id, BOOK)).evidence["G3"].says
    late = Hand(ledger, run, 1, await runs.register_prices(ledger, BOOK.rows()))
    await late.record(Record(late.outcome(4, 1)))
    assert "; 1 rows are stamped later" in (await prove(ledger, run.run_id, BOOK)).evidence["G3"].says


async def test_a_failed_shard_leaves_the_proof_whole(ledger: Ledger) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.intend(hand.intent(lease, 1))
    assert await leases.fail(ledger, run.run_id, hand.lane_id, lease, "input_changed")
    await hand.answer_shard()
    await hand.leave()
    assert await runs.settle(ledger, run.run_id) is not None
    proof = await prove(ledger, run.run_id, BOOK)
    assert proof.proved, proof.to_json()


async def test_an_auditor_cannot_prove_because_it_reads_no_table(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    async with opened(SecretStr(ledger_url), Role.AUDITOR) as auditor:
        with pytest.raises(Exception, match="may not do that"):
            await prove(auditor, run.run_id, BOOK)


async def test_there_is_no_proof_of_a_run_that_is_not_there(ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="there is no run 7"):
        await prove(ledger, 7, BOOK)
