"""Estimates: exact arithmetic over stated assumptions or the job's own history."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from schemas.answers import Answer
from schemas.documents import Shard
from schemas.estimates import (
    BYTES_PER_TOKEN,
    FRAME_TOKENS,
    MILLION,
    PRIMING_ATTEMPTS,
    THINKING_TOKENS,
    Estimate,
    History,
    OffPeakEstimate,
    PastRun,
    PastTier,
    Size,
    estimate,
    expect_pilot,
    measure_answer,
    measure_prefix,
)
from schemas.jobs import TIERS, Input, Job, When
from schemas.money import Money
from schemas.pricing import load_price_book
from schemas.work_hours import Asked
from tasks import report
from tasks.samples import spread

OFF_PEAK = datetime(2026, 11, 25, 5, tzinfo=UTC)
PEAK = datetime(2026, 11, 25, 2, tzinfo=UTC)
SCHEMA = {
    "type": "object",
    "properties": {"topic": {"type": "string", "enum": ["a", "other"]}, "sure": {"type": "number"}},
}
SIZE = Size(documents=1_000, to_send=1_000, sampled=10, sampled_bytes=40_000)
#: Two tiers whose figures are easy to follow: 1,000 cached tokens, 100 not, 10 out; a tenth goes up.
HISTORY = History(
    (PastRun(500, (PastTier("flash", 500, 500_000, 50_000, 5_000), PastTier("pro", 50, 50_000, 5_000, 500)), 1.0),),
    is_simulated=False,
)


def test_an_estimate_by_a_run_that_has_not_ended_says_that_it_is_likely_too_low() -> None:
    for is_partial in (False, True):
        history = replace(HISTORY, is_partial=is_partial)
        said = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), history).assumptions
        assert ("too low" in " ".join(said)) is is_partial


def make_job(**changes: object) -> Job:
    job = Job(
        name="tickets",
        folder=Path("jobs/tickets"),
        input=Input(path="data/*.parquet", id="id", text="text"),
        prompt="Sort these. Answer with JSON.",
        answer=Answer.from_schema("Answer", SCHEMA),
        ladder=(TIERS["flash"], TIERS["pro"]),
        budget=Money.parse("1 USD"),
        concurrency={"flash": 10, "pro": 10},
        tolerance=Decimal("0.01"),
    )
    return replace(job, **changes)  # type: ignore[arg-type]  # the fields are checked where they are used


def test_the_expected_cost_is_tokens_times_prices_plus_priming() -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), HISTORY)
    flash = 1_000 * (1_000 * 3_000 + 100 * 150_000 + 10 * 600_000) + PRIMING_ATTEMPTS * 1_000 * (150_000 - 3_000)
    pro = 100 * (1_000 * 22_000 + 100 * 660_000 + 10 * 1_980_000) + PRIMING_ATTEMPTS * 1_000 * (660_000 - 22_000)
    assert [each.cost.pico for each in found.tiers] == [flash, pro]
    assert found.cost.pico == flash + pro


def test_where_nothing_is_known_the_ends_are_the_cheapest_and_the_dearest_way_whatever_the_hour() -> None:
    job = make_job()
    prefix, document, answer = measure_prefix(job), FRAME_TOKENS + 1_000, measure_answer(SCHEMA, job.ladder[0])
    low = 1_000 * (prefix * 3_000 + document * 150_000 + answer * 600_000)
    flash = 1_010 * ((prefix + document) * 300_000 + answer * 1_200_000)
    pro = 1_000 * ((prefix + document) * 1_320_000 + answer * 3_960_000)
    for instant in (OFF_PEAK, PEAK):
        found = estimate(job, SIZE, load_price_book(), Asked(instant))
        assert (found.level, found.low.pico, found.high.pico) == (None, low, flash + pro)
        assert "no interval" in notes(found)


def test_earlier_runs_give_an_interval_and_those_that_say_less_give_none() -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), HISTORY)
    assert found.level == 90
    assert found.cost.pico / 2 < found.low.pico < found.cost.pico < found.high.pico < 2 * found.cost.pico
    first = replace(HISTORY, runs=(replace(HISTORY.runs[0], limit=500),))
    stand_in = replace(HISTORY, is_stand_in=True)
    for unsound in (replace(HISTORY, is_partial=True), replace(HISTORY, is_of_other_prompt=True), stand_in, first):
        other = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), unsound)
        assert (other.level, other.cost) == (None, found.cost)
        assert other.high.pico > found.high.pico
    sound = replace(first, runs=(*first.runs, replace(HISTORY.runs[0], limit=1_000)))  # one of them had all of these
    assert estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), sound).level == 90


def test_a_run_that_reaches_into_peak_hours_is_priced_by_the_share_of_its_work_there() -> None:
    """At 05:00 UTC the peak is an hour away. 1,000 documents, ten at a time: 72 s each make two hours."""
    slow = PastTier("flash", 500, 500_000, 50_000, 5_000, seconds=500 * 72)
    history = replace(HISTORY, runs=(replace(HISTORY.runs[0], tiers=(slow,)),))
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), history)
    cheap = 1_000 * (1_000 * 3_000 + 100 * 150_000 + 10 * 600_000)
    priming = PRIMING_ATTEMPTS * 1_000 * (150_000 - 3_000)
    assert found.lasts == timedelta(hours=2)
    assert found.cost.pico == cheap * 3 // 2 + priming
    assert "deepseek-flash peak 50 %" in notes(found)
    waits = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK, When.OFF_PEAK), history)
    assert waits.cost.pico == cheap + priming
    due = OFF_PEAK + timedelta(hours=2)  # 53 of the 120 minutes are off-peak, and too far from the peak to touch it
    hurried = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK, When.OFF_PEAK, due), history)
    assert hurried.cost.pico == cheap * (53 + 2 * 67) // 120 + priming


def test_history_weighs_runs_and_not_only_their_documents() -> None:
    """A run of a million documents is one run: the next may be like a smaller one."""
    large = PastRun(1_000_000, (PastTier("flash", 1_000_000, 0, 100 * 1_000_000, 0),), 1.0)
    small = PastRun(1_000, (PastTier("flash", 1_000, 0, 200 * 1_000, 0),), 1.0)
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), History((small, large), False))
    assert 140 < found.tiers[0].tokens.miss < 150


def test_peak_hours_double_the_expected_cost() -> None:
    cheap, dear = (
        estimate(make_job(), SIZE, load_price_book(), Asked(instant), HISTORY).cost.pico
        for instant in (OFF_PEAK, PEAK)
    )
    assert dear == 2 * cheap


def notes(found: Estimate) -> str:
    return str(report.estimate_table(found, make_job().budget).caption)


def test_in_a_peak_it_says_what_the_run_costs_now_and_when_it_would_cost_half() -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(PEAK), HISTORY)
    then = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), HISTORY).cost
    assert found.off_peak == OffPeakEstimate(datetime(2026, 11, 25, 4, 0, 5, tzinfo=UTC), then)
    assert f"now {found.cost}, from 12:00 Beijing (04:00 UTC) {then}, with --off-peak" in notes(found)
    assert report.estimate_json(found)["off_peak"] == {
        "begins": "2026-11-25T04:00:05+00:00",
        "cost_pico": then.pico,
        "saves_pico": then.pico,
    }


def test_off_peak_it_says_that_off_peak_prices_hold() -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), HISTORY)
    assert found.off_peak == OffPeakEstimate(OFF_PEAK, found.cost)
    assert "off-peak prices hold now" in notes(found)


def test_shortly_before_a_peak_a_run_that_waits_begins_after_it() -> None:
    """The guard is the ladder's longest deadline, 300 s, and two minutes."""
    shortly = datetime(2026, 11, 25, 5, 53, tzinfo=UTC)
    found = estimate(make_job(), SIZE, load_price_book(), Asked(shortly), HISTORY)
    assert found.off_peak == OffPeakEstimate(datetime(2026, 11, 25, 10, 0, 5, tzinfo=UTC), found.cost)
    assert f"now {found.cost}, from 18:00 Beijing (10:00 UTC) {found.cost}" in notes(found)


@pytest.mark.parametrize(
    "instant",
    [
        datetime(2026, 7, 1, 2, tzinfo=UTC),  # all hours cost the same
        datetime(2026, 12, 31, 15, 55, tzinfo=UTC),  # the price is known, and not whether the next hour is a peak
    ],
)
def test_where_there_is_no_off_peak_or_nobody_knows_it_nothing_is_said_of_it(instant: datetime) -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(instant), HISTORY)
    assert found.off_peak is None
    assert report.estimate_json(found)["off_peak"] is None
    assert "eak prices" not in notes(found)
    assert "Beijing" not in notes(found)


@pytest.mark.parametrize("to_send", [1, 2, 7, 1_000, 10_000_000])
@pytest.mark.parametrize("history", [None, HISTORY])
def test_low_expected_and_high_are_in_order(to_send: int, history: History | None) -> None:
    size = Size(to_send, to_send, 1, 777)
    for instant in (OFF_PEAK, PEAK):
        found = estimate(make_job(), size, load_price_book(), Asked(instant), history)
        assert found.low.pico <= found.cost.pico <= found.high.pico


def test_documents_that_are_not_sent_cost_nothing() -> None:
    found = estimate(make_job(), Size(1_000, 0, 0, 0), load_price_book(), Asked(OFF_PEAK))
    assert (found.documents, found.low.pico, found.cost.pico, found.high.pico) == (1_000, 0, 0, 0)


def test_without_history_tokens_follow_from_bytes() -> None:
    job = make_job()
    found = estimate(job, SIZE, load_price_book(), Asked(OFF_PEAK))
    flash, pro = (each.tokens for each in found.tiers)
    assert flash.miss == FRAME_TOKENS + 4_000 // BYTES_PER_TOKEN
    assert flash.hit == pro.hit == measure_prefix(job) == -(-len(job.prefix.encode()) // BYTES_PER_TOKEN)
    assert flash.attempts_ppm > MILLION > pro.attempts_ppm > 0
    assert any("no history" in line for line in found.assumptions)


def test_a_tier_that_history_never_reached_is_expected_to_stay_unused() -> None:
    history = replace(HISTORY, runs=(replace(HISTORY.runs[0], tiers=HISTORY.runs[0].tiers[:1]),))
    flash, pro = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), history).tiers
    assert (flash.attempts, pro.attempts, pro.cost.pico) == (1_000, 0, 0)


def test_simulated_history_is_called_so() -> None:
    found = estimate(make_job(), SIZE, load_price_book(), Asked(OFF_PEAK), replace(HISTORY, is_simulated=True))
    assert any("simulated" in line for line in found.assumptions)


def test_a_pilot_is_expected_to_ask_each_document_at_both_ends_of_the_ladder() -> None:
    job = make_job(ladder=(TIERS["flash"], TIERS["flash-thinking"], TIERS["pro"]))
    book, asked = load_price_book(), Asked(OFF_PEAK)
    usual = estimate(make_job(), SIZE, book, asked)
    (flash, pro) = usual.tiers
    found = expect_pilot(job, SIZE, book, asked)
    assert 0.99 * (flash.cost.pico + 5 * pro.cost.pico) < found.pico < flash.cost.pico + 5 * pro.cost.pico
    assert found.pico < usual.high.pico  # by which a pilot is capped


def test_an_answer_is_measured_by_its_schema() -> None:
    longer = {**SCHEMA, "properties": {**SCHEMA["properties"], "quote": {"type": "string"}}}
    flash = TIERS["flash"]
    assert 0 < measure_answer(SCHEMA, flash) < measure_answer(longer, flash)
    assert measure_answer(SCHEMA, TIERS["flash-thinking"]) == measure_answer(SCHEMA, flash) + THINKING_TOKENS
    assert measure_answer(longer, flash.model_copy(update={"max_tokens": 5})) == 5


def test_a_schema_that_refers_to_itself_has_a_size() -> None:
    tree = {
        "$ref": "#/$defs/Node",
        "$defs": {"Node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Node"}}}},
    }
    assert measure_answer(tree, TIERS["flash"]) < 200


def test_a_sample_is_spread_over_the_input() -> None:
    shards = [Shard(number, 0, 0, 1, number, 1) for number in range(95)]
    assert [shard.shard_no for shard in spread(shards, 10)] == [0, 9, 19, 28, 38, 47, 57, 66, 76, 85]
    assert spread(shards[:3], 10) == shards[:3]
    assert spread([], 10) == []
