"""History: what a job's earlier runs say about the next one, and nothing of other jobs or of simulated money."""

from __future__ import annotations

from dataclasses import replace

from pydantic import SecretStr

from schemas.estimates import History, PastTier
from schemas.jobs import Job
from schemas.ladder import Verdict
from schemas.records import Record
from tasks.ledger import runs
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.history import find_history
from tests.ledgers import JOB, USAGE, Hand, opening, run_everything, sql


async def find(url: str, job: Job = JOB, *, is_simulated: bool = False) -> History | None:
    """As an auditor, who reads nothing but views."""
    async with opened(SecretStr(url), Role.AUDITOR) as ledger:
        return await find_history(ledger, job, is_simulated=is_simulated)


async def test_history_is_attempts_and_tokens_by_run_and_tier(ledger: Ledger, ledger_url: str) -> None:
    """Five documents were sent, once each at flash and one at pro too; of two more attempts nobody knows the cost,
    so that they count as attempts like the others."""
    await run_everything(ledger)
    found = await find(ledger_url)
    assert found is not None
    assert (len(found.runs), found.documents) == (1, 5)
    assert (found.is_simulated, found.is_partial, found.is_of_other_prompt) == (False, False, False)
    assert {(each.tier, each.attempts, each.hit, each.miss, each.output) for each in found.runs[0].tiers} == {
        ("flash", 7, 7 * USAGE.hit, 7 * USAGE.miss, 7 * USAGE.output),
        ("pro", 1, USAGE.hit, USAGE.miss, USAGE.output),
    }
    assert found.runs[0].squared_spread > 0
    assert all(isinstance(each, PastTier) and each.seconds >= 0 for each in found.runs[0].tiers)


async def test_history_is_read_from_stored_sums_and_says_what_the_rows_say(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET sent_at = completed_at - interval '3 s' WHERE hit IS NOT NULL")
    sql(ledger_url, "DELETE FROM run_sums")
    by_rows = await find(ledger_url)
    sql(ledger_url, "SELECT sum_up(1)")
    sql(ledger_url, "UPDATE attempt_intent SET tier = 'another'")  # nobody looks
    found = await find(ledger_url)
    assert found == by_rows is not None
    assert [each.seconds for each in found.runs[0].tiers if each.tier == "flash"] == [7 * 3]
    sql(ledger_url, "UPDATE run_sums SET waits = NULL")  # summed before waits were
    sql(
        ledger_url, "UPDATE attempt_intent SET tier = CASE WHEN reason = 'low_confidence' THEN 'pro' ELSE 'flash' END"
    )
    assert await find(ledger_url) == by_rows


async def test_a_run_that_has_not_ended_counts_only_where_none_has_and_says_so(
    ledger: Ledger, ledger_url: str
) -> None:
    """What climbs comes last: by half a run it looks as if hardly anything climbed."""
    half = await Hand.join(ledger, await runs.open_run(ledger, opening(selection={"partitions": ["half"]})))
    await half.intend(half.intent((await half.claim()).lease, 0))
    await half.record(Record(half.outcome(0, verdict=Verdict.LOW_CONFIDENCE)))
    found = await find(ledger_url)
    assert found is not None
    assert (found.documents, found.is_partial) == (1, True)
    await run_everything(ledger)
    found = await find(ledger_url)
    assert found is not None
    assert (found.documents, found.is_partial) == (5, False)


async def test_another_prompt_s_runs_count_only_where_there_is_none_of_this_one(
    ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    found = await find(ledger_url, replace(JOB, prompt="Which colour is it? JSON."))
    assert found is not None
    assert (found.documents, found.is_of_other_prompt) == (5, True)


async def test_history_is_of_this_job_and_this_kind_of_money(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    assert await find(ledger_url, is_simulated=True) is None
    assert await find(ledger_url, replace(JOB, name="another")) is None


async def test_a_run_of_the_first_documents_only_is_told_from_others(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    for selection, limit in (('{"limit": 5}', 5), ('{"limit": null}', None)):
        sql(ledger_url, "UPDATE run SET selection = selection || %s::jsonb", selection)
        found = await find(ledger_url)
        assert found is not None
        assert [run.limit for run in found.runs] == [limit]


async def test_documents_that_cost_nothing_are_a_history(ledger: Ledger, ledger_url: str) -> None:
    """As on a machine of one's own, whose tokens have a price of nothing."""
    await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET cost = 0")
    sql(ledger_url, "DELETE FROM attempt_unknown")
    sql(ledger_url, "UPDATE attempt_intent SET reserved = 0")
    sql(ledger_url, "DELETE FROM run_sums")
    found = await find(ledger_url)
    assert found is not None
    assert (found.documents, found.runs[0].squared_spread) == (5, 0)


async def test_a_sample_is_no_history(ledger: Ledger, ledger_url: str) -> None:
    """It has more long documents than there are."""
    asked = await runs.open_run(ledger, opening(selection={"partitions": [], "sample": 50}))
    hand = await Hand.join(ledger, asked)
    await hand.answer_shard()
    assert await find(ledger_url) is None
