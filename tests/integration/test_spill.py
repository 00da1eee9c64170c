"""The spill: what Postgres could not take waits on disk, and is recorded once by whoever resumes the run."""

from __future__ import annotations

from pathlib import Path

from schemas.ladder import Verdict
from schemas.records import DocumentState, Record, StoredAnswer
from tasks.ledger import leases, runs
from tasks.ledger.connection import Ledger
from tasks.ledger.proof import prove
from tasks.spill import Spill, load
from tests.ledgers import BOOK, Hand, opening, text_digest, value


async def begin(ledger: Ledger, folder: Path) -> tuple[Hand, list[Record], Spill]:
    """A lane with three attempts on their way, whose replies it cannot record."""
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    await hand.intend(*(hand.intent(lease, number, text_digest=text_digest(number)) for number in range(3)))
    unsure = StoredAnswer('{"colour":"grün"}', {"colour": "grün"}, 0.4, "logprobs")
    records = [
        Record(hand.outcome(0), hand.result(lease, 0)),
        Record(hand.outcome(1, verdict=Verdict.LOW_CONFIDENCE, answer=unsure)),
        Record(hand.outcome(2), hand.ending(lease, 2, DocumentState.DEAD_LETTER, reason="unstorable")),
    ]
    return hand, records, await Spill.of(ledger, folder, hand.run.run_id, hand.lane_id)


async def test_what_was_kept_is_recorded_with_its_results_and_the_file_goes(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.keep(records)
    spill.close()
    assert spill.path.stat().st_mode & 0o077 == 0
    assert await load(ledger, hand.run.run_id, tmp_path) == 3
    assert list(tmp_path.iterdir()) == []
    assert value(ledger_url, "SELECT count(*) FROM attempt WHERE billing = 'known'") == 3
    assert value(ledger_url, "SELECT array_agg(state ORDER BY document_no) FROM document") == [
        "result",
        "dead_letter",
    ]
    assert value(ledger_url, "SELECT answer ->> 'colour' FROM answer") == "grün"
    assert value(ledger_url, "SELECT text_digest FROM document WHERE document_no = 0") == text_digest(0)
    assert (await prove(ledger, hand.run.run_id, BOOK)).proved


async def test_what_had_become_durable_after_all_counts_once(ledger: Ledger, tmp_path: Path) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.keep(records)
    spill.close()
    await hand.record(*records[:2])
    await load(ledger, hand.run.run_id, tmp_path)
    proof = await prove(ledger, hand.run.run_id, BOOK)
    assert proof.proved, proof.to_json()


async def test_after_its_lane_was_buried_what_was_kept_makes_unknowns_known(
    ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.keep(records)
    spill.close()
    assert await leases.bury_dead(ledger, hand.run.run_id, grace_s=0) == 1
    await load(ledger, hand.run.run_id, tmp_path)
    assert value(ledger_url, "SELECT count(*) FROM attempt WHERE billing <> 'known'") == 0
    proof = await prove(ledger, hand.run.run_id, BOOK)
    assert proof.proved, proof.to_json()


async def test_a_living_lanes_file_is_left_alone(ledger: Ledger, tmp_path: Path) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.keep(records)
    assert await load(ledger, hand.run.run_id, tmp_path) == 0
    spill.keep([])
    assert list(tmp_path.iterdir()) == []


async def test_only_the_last_state_is_kept_and_a_torn_line_is_passed_over(ledger: Ledger, tmp_path: Path) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.keep(records)
    spill.keep(records[1:])
    spill.close()
    with spill.path.open("ab") as file:
        file.write(b'not JSON\n{"outcome": {"document_no"')
    assert await load(ledger, hand.run.run_id, tmp_path) == 2


async def test_another_ledgers_run_of_the_same_number_gets_nothing(ledger: Ledger, tmp_path: Path) -> None:
    hand, records, spill = await begin(ledger, tmp_path)
    spill.run = f"run-{hand.run.run_id}-0000000000000000"
    spill.keep(records)
    spill.close()
    assert await load(ledger, hand.run.run_id, tmp_path) == 0
    assert spill.path.exists()


async def test_a_disk_that_refuses_stops_nobody(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _hand, records, spill = await begin(ledger, tmp_path / "file" / "folder")
    spill.keep(records)
    spill.close()
