"""Spend: an audit adds up what the rows say, for a run, a job or everything; progress adds up what lanes counted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.errors import ConfigurationError
from schemas.money import Currency, Money
from schemas.records import DocumentState, Record, ResultKey
from schemas.spending import Side, Sums
from tasks.exports import write_csv, write_parquet
from tasks.ledger import runs, spend
from tasks.ledger.breakdowns import DearDocument
from tasks.ledger.connection import Ledger, Role, opened
from tests.ledgers import AT, CAP, COST, JOB, RESERVED, USAGE, Hand, opening, run_everything, sql

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
        spend.Waste("flash", "answer", "lost", None, "unknown", 1, 0, RESERVED, "unknown"),
        spend.Waste("flash", "answer", "no reply", None, "unknown", 1, 0, RESERVED, "unknown"),
        spend.Waste("flash", "answer", "refused_by_provider", None, "known", 1, COST, 0, "failed"),
        spend.Waste("flash", "priming", "answered", "low_confidence", "known", 1, COST, 0, "unsure"),
    }
    assert found.hours == {"off_peak": spend.HoursSpend(6, 5 * COST + PRO_COST)}
    assert found.token_costs == spend.TokenCosts(
        hit_pico=640 * (5 * 3_000 + 22_000),
        miss_pico=100 * (5 * 150_000 + 660_000),
        output_pico=5 * (5 * 600_000 + 1_980_000),
        hit_tokens=6 * USAGE.hit,
        miss_tokens=6 * USAGE.miss,
        output_tokens=6 * USAGE.output,
    )
    # 4 flash hits after priming and 1 of pro, each of 640 tokens that did not cost the price of a miss
    assert found.saved_pico == 640 * (4 * (150_000 - 3_000) + (660_000 - 22_000))
    assert found.pico_per_1000_documents == round(1000 * found.cost_pico / 6)


async def test_the_views_that_an_audit_reads_say_what_the_plain_ones_say(ledger: Ledger, ledger_url: str) -> None:
    """`run_cost`, `tier_cost` and `waste` are written another way, for plain SQL."""
    run = await run_everything(ledger)
    found = await audit(ledger_url, run=run.run_id)
    names = (
        *("documents", "duplicates", "reused", "dead_letters", "attempts", "cost_pico", "unknown_pico", "hit_tokens"),
        *("unknown_attempts", "miss_tokens", "output_tokens", "reasoning_tokens", "priming_pico", "escalated"),
    )
    (row,) = sql(ledger_url, f"SELECT results + reused, {', '.join(names)} FROM run_cost")
    assert tuple(row) == (found.results, *(getattr(found, name) for name in names))
    tiers = sql(ledger_url, "SELECT tier, attempts, results, cost_pico, unknown_pico FROM tier_cost")
    assert {tier: (t.attempts, t.results, t.cost_pico, t.unknown_pico) for tier, t in found.tiers.items()} == {
        row[0]: tuple(row[1:]) for row in tiers
    }
    waste = sql(ledger_url, "SELECT count(*), sum(attempts), sum(cost_pico), sum(unknown_pico) FROM waste")
    wasted = [each for each in found.waste if each.kind != "unsure"]
    sums = [sum(getattr(each, name) for each in wasted) for name in ("attempts", "cost_pico", "unknown_pico")]
    assert tuple(waste[0]) == (len(wasted), *sums)


async def test_single_documents_have_their_costs_and_the_dearest_is_named(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    costs = (await audit(ledger_url, run=run.run_id, top=2)).document_costs
    dearest = COST + PRO_COST  # document 1, which was escalated; the other four that were sent cost COST each
    assert (costs.documents, costs.p50_pico, costs.p95_pico, costs.max_pico) == (5, COST, dearest, dearest)
    assert costs.mean_pico == round((5 * COST + PRO_COST) / 5)
    assert costs.dearest == (
        DearDocument(1, 2, "d2", "result", "flash", None, 2, COST, RESERVED),
        DearDocument(1, 4, "d4", "result", "flash", None, 2, COST, RESERVED),
    )
    named = (await audit(ledger_url, run=run.run_id, top=5)).document_costs.dearest
    assert named[2:] == (
        DearDocument(1, 1, "d1", "result", "pro", None, 2, dearest, 0),
        DearDocument(1, 0, "d0", "result", "flash", None, 1, COST, 0),
        DearDocument(1, 3, "d3", "dead_letter", "flash", "refused_by_provider", 1, COST, 0),
    )


@pytest.mark.parametrize("sides", [tuple(Side), *[(side,) for side in Side], (Side.PURPOSE, Side.TIER)])
async def test_the_lines_of_every_breakdown_add_up_to_the_whole(
    sides: tuple[Side, ...], ledger: Ledger, ledger_url: str
) -> None:
    await run_everything(ledger)
    found = await audit(ledger_url, by=sides)
    whole = sum((line.sums for line in found.lines), Sums())
    for name in ("attempts", "cost_pico", "unknown_pico", "hit_tokens", "miss_tokens", "output_tokens", "escalated"):
        assert getattr(whole, name) == getattr(found, name), name
    assert whole.hit_pico + whole.miss_pico + whole.output_pico == found.cost_pico
    assert len({line.names for line in found.lines}) == len(found.lines)
    assert {len(line.names) for line in found.lines} == {len(sides)}


async def test_a_breakdown_names_its_parts(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    found = await audit(ledger_url, by=(Side.HOURS, Side.MODEL))
    lines = {line.names: (line.sums.attempts, line.sums.cost_pico, line.sums.unknown_pico) for line in found.lines}
    assert lines == {
        ("not known", "deepseek-flash"): (2, 0, 2 * RESERVED),
        ("off_peak", "deepseek-flash"): (5, 5 * COST, 0),
        ("off_peak", "deepseek-v4-pro"): (1, PRO_COST, 0),
    }
    days = await audit(ledger_url, by=(Side.DAY,))
    assert [line.names for line in days.lines if line.sums.cost_pico] == [(f"{AT:%Y-%m-%d}",)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
async def test_an_export_adds_up_to_the_audit_and_holds_no_formula(
    kind: str, ledger: Ledger, ledger_url: str, tmp_path: Path
) -> None:
    await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET served_model = '=cmd|'' /C calc''!A0' WHERE document_no = 1")
    sql(ledger_url, "DELETE FROM run_sums")
    found = await audit(ledger_url, by=tuple(Side))
    path = tmp_path / f"spend.{kind}"
    if kind == "csv":
        write_csv(found, path)
        rows: list[dict[str, Any]] = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    else:
        write_parquet(found, path)
        rows = pq.read_table(path).to_pylist()
    assert list(rows[0])[:8] == ["job", "run", "day", "tier", "model", "purpose", "hours", "currency"]
    assert sum(int(row["cost_pico"]) for row in rows) == found.cost_pico
    assert sum(Decimal(row["cost"]) for row in rows) == Money(found.cost_pico, Currency.USD).decimal
    assert sum(Decimal(row["at_most"]) for row in rows) == Money(found.high_pico, Currency.USD).decimal
    assert {row["model"] for row in rows} == {"deepseek-flash", "'=cmd|' /C calc'!A0"}


async def test_a_job_is_the_sum_of_its_runs_and_the_ledger_the_sum_of_its_jobs(
    ledger: Ledger, ledger_url: str, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(spend, "COUNTED_UNASKED", 5)  # six ended, one of them in both runs
    uncounted = await audit(ledger_url, job="colours")
    assert uncounted == replace(job, distinct_documents=None)
    assert uncounted.pico_per_1000_documents is None
    assert await audit(ledger_url, job="colours", distinct=True) == job
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


async def test_tokens_without_a_price_are_in_no_effective_price(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    priced = await audit(ledger_url, run=run.run_id, by=(Side.TIER,))
    sql(
        ledger_url,
        "UPDATE attempt_outcome SET cost = NULL, price_id = NULL WHERE document_no = 0; DELETE FROM run_sums",
    )
    found = await audit(ledger_url, run=run.run_id, by=(Side.TIER,))
    assert (found.hit_tokens, found.unknown_pico) == (priced.hit_tokens, priced.unknown_pico + RESERVED)
    assert found.token_costs.hit_tokens == priced.token_costs.hit_tokens - USAGE.hit
    by_tier = {line.names: line.sums.pico_per_million for line in found.lines}
    assert by_tier == {line.names: line.sums.pico_per_million for line in priced.lines}
    assert found.pico_per_million_tokens == round(10**6 * found.cost_pico / (5 * 745))


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
    assert found.lost_pico == found.lost_whole_pico == 640 * (150_000 - 3_000)
    assert (found.expected_hit_tokens, found.real_hit_tokens) == (3 * 640, 2 * 640)


async def test_a_prefix_that_hit_in_part_is_no_whole_loss(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    for number in range(3):
        usage = USAGE if number else replace(USAGE, hit=512, miss=228)
        await hand.intend(hand.intent(lease, number))
        await hand.record(Record(hand.outcome(number, usage=usage)))
    found = await audit(ledger_url, run=1)
    assert (found.lost_pico, found.lost_whole_pico) == (128 * (150_000 - 3_000), 0)


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
