"""Spend: an audit adds up what the rows say, for a run, a job or everything; progress adds up what lanes counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.errors import ConfigurationError
from schemas.money import Currency
from schemas.records import DocumentState, Record, ResultKey
from tasks.ledger import runs, spend
from tasks.ledger.connection import Ledger, Role, opened
from tests.ledgers import CAP, COST, JOB, RESERVED, USAGE, Hand, opening, run_everything, sql

#: Pro off-peak is 22,000 / 660,000 / 1,980,000 pico-dollars per token.
PRO_COST = 640 * 22_000 + 100 * 660_000 + 5 * 1_980_000
CONTRACT = (
    *("run", "job", "documents", "results", "dead_letters", "attempts", "cost_pico", "unknown_pico", "currency"),
    *("hit_tokens", "miss_tokens", "output_tokens", "prefix_hit_rate", "escalated", "tiers"),
)


async def audit(url: str, **scope: object) -> spend.Audit:
    """As an auditor, who reads nothing but views."""
    async with opened(SecretStr(url), Role.AUDITOR) as ledger:
        return await spend.audit(ledger, **scope)


async def test_an_audit_adds_up_what_happened(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    told = (await audit(ledger_url, run=run.run_id)).to_json()
    assert {name: told[name] for name in CONTRACT} == {
        "run": 1,
        "job": "colours",
        "documents": 6,
        "results": 4,
        "dead_letters": 1,
        "attempts": 8,
        "cost_pico": 5 * COST + PRO_COST,
        "unknown_pico": 2 * RESERVED,
        "currency": "USD",
        "hit_tokens": 6 * USAGE.hit,
        "miss_tokens": 6 * USAGE.miss,
        "output_tokens": 6 * USAGE.output,
        "prefix_hit_rate": 1.0,
        "escalated": 1,
        "tiers": {
            "flash": {
                **{"attempts": 7, "results": 3, "cost_pico": 5 * COST, "unknown_pico": 2 * RESERVED},
                **{"hit_tokens": 3200, "miss_tokens": 500, "output_tokens": 25},
            },
            "pro": {
                **{"attempts": 1, "results": 1, "cost_pico": PRO_COST, "unknown_pico": 0},
                **{"hit_tokens": 640, "miss_tokens": 100, "output_tokens": 5},
            },
        },
    }
    assert (told["state"], told["is_simulated"], told["budget_pico"]) == ("done", False, CAP)
    assert (told["duplicates"], told["reused"], told["unknown_attempts"]) == (1, 0, 2)
    assert told["results"] + told["dead_letters"] + told["duplicates"] == told["documents"]
    assert told["dead_letters_by_reason"] == {"refused_by_provider": 1}
    assert json.loads(json.dumps(told)) == told


async def test_an_audit_splits_the_spend_by_purpose_escalation_and_waste(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    found = await audit(ledger_url, run=run.run_id)
    assert found.by_purpose == {
        "answer": spend.PurposeSpend(5, 2 * COST + PRO_COST, 2 * RESERVED),
        "priming": spend.PurposeSpend(1, COST, 0),
        "retry": spend.PurposeSpend(2, 2 * COST, 0),
    }
    assert found.priming_pico == COST
    assert found.escalations == (spend.Escalation("pro", "low_confidence", 1, 1, 0, 1, 1, 0, 1, PRO_COST, 0),)
    assert set(found.accuracy) == {spend.Accuracy("flash", 1, 1), spend.Accuracy("pro", 1, 1)}
    assert set(found.waste) == {
        spend.Waste("flash", "answer", "lost", None, "unknown", 1, 0, RESERVED),
        spend.Waste("flash", "answer", "no reply", None, "unknown", 1, 0, RESERVED),
        spend.Waste("flash", "answer", "refused_by_provider", None, "known", 1, COST, 0),
    }
    # 4 flash hits after priming and 1 of pro, each of 640 tokens that did not cost the price of a miss
    assert found.saved_pico == 640 * (4 * (150_000 - 3_000) + (660_000 - 22_000))
    assert found.pico_per_1000_documents == round(1000 * found.cost_pico / 6)


async def test_a_job_is_the_sum_of_its_runs_and_the_ledger_the_sum_of_its_jobs(
    ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening(selection={"second": True})))
    lease = (await hand.claim()).lease
    reused = hand.ending(lease, 0, DocumentState.REUSED, of=ResultKey(hand.run.run_id - 1, 0))
    await hand.record(Record(ending=reused))
    other = await Hand.join(ledger, await runs.open_run(ledger, opening(job=replace(JOB, name="sizes"))))
    await other.leave()
    job = await audit(ledger_url, job="colours")
    assert (job.run, job.job, job.runs, job.state) == (None, "colours", (1, 2), None)
    assert (job.documents, job.results, job.reused, job.cost_pico) == (12, 5, 1, 5 * COST + PRO_COST)
    assert job.distinct_documents == 5  # that of the second run is one of the first, and so is the duplicate
    assert job.pico_per_1000_documents == round(1000 * job.cost_pico / 5)
    everything = await audit(ledger_url)
    assert (everything.run, everything.job, everything.runs) == (None, None, (1, 2, 3))
    assert (everything.documents, everything.cost_pico) == (18, job.cost_pico)


async def test_progress_and_audit_agree_about_attempts_that_a_dead_lane_left_open(
    ledger: Ledger, ledger_url: str
) -> None:
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.intend(hand.intent(lease, 1))
    sql(ledger_url, "UPDATE lane SET heartbeat_at = clock_timestamp() - interval '1 hour'")
    told, found = await spend.progress(ledger, run.run_id, counts_open=True), await audit(ledger_url, run=run.run_id)
    assert (told.attempts, told.cost_pico, told.unknown_pico) == (2, COST, RESERVED)
    assert (found.attempts, found.cost_pico, found.unknown_pico) == (2, COST, RESERVED)
    assert await spend.list_living_lanes(ledger) == []


async def test_an_empty_ledger_has_an_empty_audit(ledger_url: str) -> None:
    found = await audit(ledger_url)
    assert (found.run, found.currency, found.documents, found.cost_pico) == (None, None, 0, 0)
    assert (found.prefix_hit_rate, found.pico_per_1000_documents, found.tiers) == (None, None, {})


async def test_what_is_not_in_the_ledger_is_named_with_what_is(ledger: Ledger, ledger_url: str) -> None:
    await runs.open_run(ledger, opening())
    with pytest.raises(ConfigurationError, match="no run of job color in this ledger; jobs it knows: colours"):
        await audit(ledger_url, job="color")
    with pytest.raises(ConfigurationError, match="there is no run 7 in this ledger"):
        await audit(ledger_url, run=7)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"currency": Currency.CNY}, "two currencies .CNY, USD."), ({"is_simulated": True}, "two kinds of money")],
)
async def test_sums_of_unlike_money_are_refused(
    changes: dict[str, object], named: str, ledger: Ledger, ledger_url: str
) -> None:
    await runs.open_run(ledger, opening())
    await runs.open_run(ledger, opening(selection={"second": True}, **changes))
    with pytest.raises(ConfigurationError, match=f"{named}.* audit each job or run by itself"):
        await audit(ledger_url, job="colours")
    assert (await audit(ledger_url, run=2)).runs == (2,)


async def test_a_prefix_that_never_hit_has_a_rate_of_nought(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    await hand.record(Record(hand.outcome(0, usage=replace(USAGE, hit=0, miss=740))))
    assert (await audit(ledger_url, run=1)).prefix_hit_rate == 0


async def test_a_lost_cache_shows_in_rate_and_money(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    for number in range(3):
        usage = USAGE if number else replace(USAGE, hit=0, miss=740)
        await hand.intend(hand.intent(lease, number))
        await hand.record(Record(hand.outcome(number, usage=usage)))
    found = await audit(ledger_url, run=1)
    assert found.prefix_hit_rate == pytest.approx(2 / 3, abs=1e-6)
    assert found.lost_pico == 640 * (150_000 - 3_000)


async def test_corrections_are_reported_apart(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    sql(ledger_url, "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, -7, 'the export of May')")
    found = await audit(ledger_url, run=1)
    assert (found.adjusted_pico, found.cost_pico) == (-7, 5 * COST + PRO_COST)


async def test_progress_says_what_an_audit_says_once_the_run_is_done(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    counted, seen = await audit(ledger_url, run=run.run_id), await spend.progress(ledger, run.run_id)
    for name in (
        *("run", "job", "state", "documents", "results", "dead_letters", "reused", "escalated", "attempts", "done"),
        *("cost_pico", "unknown_pico", "hit_tokens", "miss_tokens", "output_tokens", "currency", "budget_pico"),
    ):
        assert getattr(seen, name) == getattr(counted, name), name
    assert (seen.lanes, seen.in_flight, seen.waiting_because) == (0, 0, None)
    assert [event.kind for event in seen.events] == ["done", "labelled", "opened"]
    assert json.loads(json.dumps(seen.to_json()))["done"] == 6


async def test_progress_shows_living_lanes_and_what_they_wait_for(ledger: Ledger, ledger_url: str) -> None:
    run = await runs.open_run(ledger, opening())
    assert (await spend.progress(ledger, run.run_id)).waiting_because == (
        "no lane is at work: run the same command to go on"
    )
    for _ in range(3):
        await Hand.join(ledger, run, amount=1)
    sql(ledger_url, "UPDATE lane SET in_flight = lane_id, waiting_because = 'priming' WHERE lane_id < 3")
    sql(ledger_url, "UPDATE lane SET heartbeat_at = now() - interval '1 minute' WHERE lane_id = 2")
    seen = await spend.progress(ledger, run.run_id)
    assert (seen.lanes, seen.in_flight, seen.waiting_because) == (2, 1, "priming")
    await runs.change_state(ledger, run.run_id, "paused", "budget")
    assert (await spend.progress(ledger, run.run_id)).waiting_because == "paused: budget"


async def test_runs_are_listed_newest_first_and_the_latest_is_found(ledger: Ledger) -> None:
    await run_everything(ledger)
    await runs.open_run(ledger, opening(selection={"second": True}))
    await runs.open_run(ledger, opening(job=replace(JOB, name="sizes")))
    assert [(run.run, run.job, run.done) for run in await spend.list_runs(ledger)] == [
        (3, "sizes", 0),
        (2, "colours", 0),
        (1, "colours", 6),
    ]
    assert [run.run for run in await spend.list_runs(ledger, "colours")] == [2, 1]
    with pytest.raises(ConfigurationError, match="there is no run 7"):
        await spend.progress(ledger, 7)


async def test_a_job_s_paused_runs_are_listed_with_their_selections(ledger: Ledger) -> None:
    await run_everything(ledger)
    for number, selection in enumerate(({"limit": 3}, {"limit": 4}, {"limit": 5}), start=2):
        run = await runs.open_run(ledger, opening(selection=selection))
        assert run.run_id == number
    for run_id in (2, 3):
        await runs.change_state(ledger, RunId(run_id), "paused", "budget")
    assert await spend.list_paused(ledger, "colours", is_simulated=False) == [(3, {"limit": 4}), (2, {"limit": 3})]
    assert await spend.list_paused(ledger, "colours", is_simulated=True) == []
    assert await spend.list_paused(ledger, "sizes", is_simulated=False) == []
