"""Runs: resumed when nothing changed, superseded when something did, settled once every shard has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from schemas.documents import Duplicate, InputFile, Manifest
from schemas.errors import ConfigurationError
from schemas.jobs import Escalate
from schemas.money import Currency
from tasks.ledger import connection, leases, runs
from tasks.ledger.connection import Ledger
from tasks.ledger.digests import compute_digest
from tests.ledgers import (
    BOOK,
    CAP,
    JOB,
    RESERVED,
    Hand,
    in_blocks,
    lane_ledger,
    make_manifest,
    opening,
    run_everything,
    sql,
    value,
)


async def test_a_new_run_has_its_manifest_and_its_duplicates(ledger: Ledger, ledger_url: str) -> None:
    manifest = make_manifest(7, duplicates=[Duplicate(6, 0, False)])
    run = await runs.open_run(ledger, opening(manifest=manifest))
    assert (run.job, run.state, run.documents, run.cap, run.is_resumed) == ("colours", "running", 7, CAP, False)
    assert await runs.find_run(ledger, run.run_id) == run
    shards = sql(ledger_url, "SELECT first_document_no, document_count, state, lease_epoch FROM shard ORDER BY 1")
    assert shards == [(0, 3, "open", 0), (3, 3, "open", 0), (6, 1, "open", 0)]
    assert sql(ledger_url, "SELECT path, size, rows FROM input_file") == [("documents.parquet", 1000, 7)]
    assert sql(ledger_url, "SELECT document_no, of_document_no, is_same_text FROM duplicate") == [(6, 0, False)]
    assert sql(ledger_url, "SELECT kind, detail FROM run_event") == [("opened", {"documents": 7, "cap": CAP})]


async def test_the_same_unfinished_run_is_resumed(ledger: Ledger, ledger_url: str) -> None:
    first = await runs.open_run(ledger, opening())
    await runs.change_state(ledger, first.run_id, "paused", "budget")
    again = await runs.open_run(ledger, opening())
    assert again == replace(first, is_resumed=True)
    assert sql(ledger_url, "SELECT state, reason FROM run") == [("running", None)]
    kinds = sql(ledger_url, "SELECT kind FROM run_event ORDER BY event_id")
    assert kinds == [("opened",), ("paused",), ("resumed",)]


@pytest.mark.parametrize("cap", [CAP * 2, CAP // 2])
async def test_resuming_with_another_budget_changes_the_cap_and_says_so(
    cap: int, ledger: Ledger, ledger_url: str
) -> None:
    await runs.open_run(ledger, opening())
    again = await runs.open_run(ledger, opening(cap=cap))
    assert (again.run_id, again.cap) == (1, cap)
    assert sql(ledger_url, "SELECT detail FROM run_event WHERE kind = 'cap_changed'") == [({"cap": cap, "was": CAP},)]


async def test_a_resume_says_how_many_documents_had_ended(ledger: Ledger, ledger_url: str) -> None:
    first = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, first)
    await hand.answer_shard()
    await hand.leave()
    await runs.open_run(ledger, opening())
    assert sql(ledger_url, "SELECT detail FROM run_event WHERE kind = 'resumed'") == [({"documents": 3},)]


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "its prompt": lambda: {"job": replace(JOB, prompt="Which colour, in JSON?")},
    "its policy": lambda: {"job": replace(JOB, escalate=Escalate(below=Decimal("0.9")))},
    "its input": lambda: {
        "manifest": Manifest((InputFile(0, "documents.parquet", 1001, "1" * 64, 6),), make_manifest().shards, ())
    },
    "its shards": lambda: {"manifest": make_manifest(shard_rows=2)},
    "its currency": lambda: {"currency": Currency.CNY},
    "its provider": lambda: {"is_simulated": True},
}


@pytest.mark.parametrize("what", CHANGES)
async def test_an_unfinished_run_is_superseded_when_this_changed(what: str, ledger: Ledger, ledger_url: str) -> None:
    await runs.open_run(ledger, opening())
    new = await runs.open_run(ledger, opening(**CHANGES[what]()))
    assert (new.run_id, new.is_resumed) == (2, False)
    assert sql(ledger_url, "SELECT run_id, state FROM run ORDER BY 1") == [(1, "superseded"), (2, "running")]


async def test_another_selection_or_job_is_another_run_beside_the_first(ledger: Ledger, ledger_url: str) -> None:
    await runs.open_run(ledger, opening())
    await runs.open_run(ledger, opening(selection={"partitions": ["2026-01-01"]}))
    await runs.open_run(ledger, opening(job=replace(JOB, name="sizes")))
    assert sql(ledger_url, "SELECT DISTINCT state, count(*) OVER () FROM run") == [("running", 3)]


async def test_a_finished_run_is_not_resumed(ledger: Ledger) -> None:
    done = await run_everything(ledger)
    manifest = make_manifest(duplicates=[Duplicate(5, 0, is_same_text=True)])
    again = await runs.open_run(ledger, opening(manifest=manifest))
    assert (again.run_id, again.is_resumed) == (done.run_id + 1, False)


async def test_a_run_is_settled_only_when_every_shard_has_ended(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    await hand.answer_shard()
    assert await runs.settle(ledger, run.run_id) is None
    lease = (await hand.claim()).lease
    assert await runs.settle(ledger, run.run_id) is None
    assert sql(ledger_url, "SELECT state, ended_at FROM run, lane") == [("running", None)]
    await leases.fail(ledger, run.run_id, hand.lane_id, lease, "input_changed")
    digest = await runs.settle(ledger, run.run_id)
    assert digest is not None
    assert digest.startswith("sha256:")
    assert sql(ledger_url, "SELECT state, ledger_digest, finished_at IS NOT NULL FROM run") == [
        ("done", digest, True)
    ]


async def test_settling_ends_the_lanes_that_are_still_there_and_closes_every_grant(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    await Hand.join(ledger, run)
    for _ in range(2):
        await hand.answer_shard()
    assert await runs.settle(ledger, run.run_id)
    assert value(ledger_url, "SELECT count(*) FROM lane WHERE ended_at IS NULL") == 0
    granted, spent = sql(ledger_url, "SELECT granted, cost_pico FROM budget, run_cost")[0]
    assert granted == spent > 0


async def test_settling_twice_gives_the_same_digest_and_one_event(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    stored = value(ledger_url, "SELECT ledger_digest FROM run")
    assert await runs.settle(ledger, run.run_id) == stored
    assert value(ledger_url, "SELECT count(*) FROM run_event WHERE kind = 'done'") == 1


async def test_a_paused_run_whose_shards_have_ended_is_done(ledger: Ledger) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    for _ in range(2):
        await hand.answer_shard()
    await runs.change_state(ledger, run.run_id, "paused", "interrupted")
    assert await runs.settle(ledger, run.run_id)
    assert (await runs.find_run(ledger, run.run_id)).state == "done"


async def test_the_digest_covers_the_rows_until_its_instant_and_no_later_ones(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await run_everything(ledger)
    until, settled = sql(ledger_url, "SELECT finished_at, ledger_digest FROM run")[0]

    async def digest() -> str:
        async with ledger.transaction() as connection:
            return await compute_digest(connection, run.run_id, until)

    assert await digest() == settled
    sql(
        ledger_url,
        "INSERT INTO attempt_unknown (run_id, document_no, attempt_no, bound, because) VALUES (1, 0, 9, 1, '')",
    )
    assert await digest() == settled
    sql(ledger_url, "UPDATE attempt_outcome SET output = output + 1 WHERE document_no = 0")
    assert await digest() != settled


async def test_price_rows_are_registered_once_and_keep_their_ids(ledger: Ledger, ledger_url: str) -> None:
    ids = await runs.register_prices(ledger, BOOK.rows())
    assert await runs.register_prices(ledger, BOOK.rows()) == ids
    assert set(ids) == {price.name for price in BOOK.rows()}
    assert value(ledger_url, "SELECT count(*) FROM price") == len(ids)


async def test_a_price_row_that_changed_since_attempts_were_booked_by_it_is_refused(ledger: Ledger) -> None:
    price, *_ = BOOK.rows()
    await runs.register_prices(ledger, [price])
    with pytest.raises(ConfigurationError, match="a price row never changes") as caught:
        await runs.register_prices(ledger, [replace(price, output_pico=price.output_pico + 1)])
    assert price.name in str(caught.value)


async def test_an_event_told_twice_is_there_once_and_those_without_a_key_are_all_there(
    ledger: Ledger, ledger_url: str
) -> None:
    first, other = [await runs.open_run(ledger, opening(selection={"partitions": [day]})) for day in ("1", "2")]
    for run, kind in ((first, "primed"), (first, "again"), (other, "elsewhere")):
        await runs.note(ledger, run.run_id, kind, {"tier": "flash"}, key="primed flash")
    for state in ("paused", "running", "paused"):
        await runs.change_state(ledger, first.run_id, state)
    kinds = sql(ledger_url, "SELECT run_id, kind FROM run_event ORDER BY event_id")
    paused = [(1, "paused"), (1, "running"), (1, "paused")]
    assert kinds == [(1, "opened"), (2, "opened"), (1, "primed"), (2, "elsewhere"), *paused]


async def test_labels_may_be_added_again(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    assert not await runs.has_labels(ledger, run.run_id)
    for _ in range(2):
        await runs.add_labels(ledger, run.run_id, in_blocks([(0, "red")], [(1, "blue")]))
    assert await runs.has_labels(ledger, run.run_id)
    assert sql(ledger_url, "SELECT document_no, label FROM label ORDER BY 1") == [(0, "red"), (1, "blue")]


async def test_labels_may_be_long_in_coming(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be far away, and a transaction that waits for them is not one that a lane forgot."""

    async def slow_blocks() -> AsyncIterator[list[tuple[int, str]]]:
        yield [(0, "red")]
        await asyncio.sleep(0.5)
        yield [(1, "blue")]

    monkeypatch.setattr(connection, "_SESSION", ("idle_in_transaction_session_timeout TO '100ms'",))
    async with lane_ledger(ledger_url, answer_within_s=0.4) as ledger:
        run = await runs.open_run(ledger, opening())
        await runs.add_labels(ledger, run.run_id, slow_blocks())
        assert await runs.has_labels(ledger, run.run_id)


async def test_a_run_that_is_not_there_is_a_mistake_of_the_caller(ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="there is no run 7"):
        await runs.find_run(ledger, runs.RunId(7))


async def test_superseding_does_not_touch_what_was_paid(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    await hand.answer_shard()
    await runs.open_run(ledger, opening(job=replace(JOB, escalate=Escalate(below=Decimal("0.9")))))
    assert value(ledger_url, "SELECT results FROM run_cost WHERE run_id = 1") == 3
    assert await hand.intend(hand.intent((await hand.claim()).lease, 3, reserved=RESERVED))


@pytest.mark.parametrize("state", ["done", "superseded"])
async def test_a_run_that_is_over_stays_so_whoever_asks(ledger: Ledger, state: str, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    sql(ledger_url, f"UPDATE farthing.run SET state = '{state}'")
    assert await runs.change_state(ledger, run.run_id, "paused", "interrupted") is False
    assert (await runs.find_run(ledger, run.run_id)).state == state
    assert value(ledger_url, "SELECT count(*) FROM farthing.run_event WHERE kind = 'paused'") == 0


async def test_the_dead_lanes_of_a_superseded_run_are_buried_and_their_money_is_free(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await runs.open_run(ledger, opening())
    await Hand.join(ledger, run)
    sql(ledger_url, "UPDATE farthing.run SET state = 'superseded'")
    sql(ledger_url, "UPDATE farthing.lane SET heartbeat_at = now() - interval '1 hour'")
    await leases.bury_superseded(ledger, run.job)
    assert value(ledger_url, "SELECT count(*) FROM farthing.lane WHERE ended_at IS NULL") == 0
    assert value(ledger_url, "SELECT granted FROM farthing.budget") == 0


@pytest.mark.parametrize(("documents", "is_counted"), [(999, False), (1000, True)])
async def test_at_the_end_of_a_large_run_postgres_counts_again(
    ledger: Ledger, ledger_url: str, documents: int, is_counted: bool
) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    await hand.answer_shard()
    await runs.refresh_statistics(ledger, documents)
    counted = "SELECT count(*) > 0 FROM pg_stats WHERE tablename = 'attempt_outcome' AND attname = 'run_id'"
    assert value(ledger_url, counted) is is_counted


async def test_a_large_run_is_counted_before_its_sums_are_made(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    for _ in range(2):
        await hand.answer_shard()
    sql(ledger_url, "UPDATE run SET documents = 1000")
    assert await runs.settle(ledger, run.run_id)
    counted = "SELECT max(last_analyze) < (SELECT summed_at FROM run_sums) FROM pg_stat_user_tables"
    assert value(ledger_url, counted) is True


async def test_who_would_wait_for_a_vacuum_does_not_have_postgres_count(ledger: Ledger, ledger_url: str) -> None:
    await runs.open_run(ledger, opening())
    with psycopg.connect(ledger_url) as other:
        other.execute("LOCK TABLE farthing.attempt_outcome IN SHARE UPDATE EXCLUSIVE MODE")
        await runs.refresh_statistics(ledger, 1000)
    counted = "SELECT count(*) FROM pg_stats WHERE tablename = 'attempt_outcome'"
    assert value(ledger_url, counted) == 0


async def test_a_run_at_work_is_not_superseded_for_another_budget_alone(ledger: Ledger) -> None:
    """What it has in flight would be paid for twice."""
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    other = opening(job=replace(JOB, budget_name="january"))
    async with leases.alive(ledger, hand.lane_id):
        with pytest.raises(ConfigurationError, match="run 1 of colours is at work on the same documents"):
            await runs.open_run(ledger, other)
        await hand.leave()
        assert (await runs.open_run(ledger, other)).run_id == 2
