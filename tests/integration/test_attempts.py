"""Intents and outcomes: what is permitted is durable, leased and not answered; what is recorded is counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from schemas.attempts import Purpose, Reply, Signal
from schemas.ladder import PastAttempt, Verdict
from schemas.records import DocumentState, Outcome, Record, ResultKey, StoredAnswer
from tasks.ledger import attempts, leases, runs
from tasks.ledger.attempts import Fenced, PaidAnswer, Permitted, Reusable
from tasks.ledger.connection import Ledger, PoisonValue
from tasks.ledger.runs import Run
from tests.ledgers import AT, COST, JOB, RESERVED, Hand, opening, run_everything, sql, text_digest, value


@pytest.fixture
async def hand(ledger: Ledger) -> Hand:
    """A lane of a fresh run of six documents in two shards."""
    return await Hand.join(ledger, await runs.open_run(ledger, opening()))


async def second_run(ledger: Ledger, **changes: Any) -> Hand:
    """A lane of one more run, of another selection."""
    return await Hand.join(ledger, await runs.open_run(ledger, opening(selection={"second": True}, **changes)))


async def test_a_permitted_intent_is_durable_with_its_worst_case(hand: Hand, ledger_url: str) -> None:
    lease = (await hand.claim()).lease
    assert await hand.intend(hand.intent(lease, 0), hand.intent(lease, 1)) == [Permitted(), Permitted()]
    rows = sql(
        ledger_url, "SELECT document_no, attempt_no, tier, purpose, epoch, lane_id, reserved FROM attempt_intent"
    )
    assert rows == [(n, 1, "flash", "answer", 1, hand.lane_id, RESERVED) for n in (0, 1)]


async def test_a_newer_epoch_fences_the_old_one_and_only_its_shard(hand: Hand, ledger_url: str) -> None:
    old, kept = (await hand.claim()).lease, (await hand.claim()).lease
    sql(ledger_url, "UPDATE shard SET lease_epoch = 2 WHERE shard_no = 0")
    assert await hand.intend(hand.intent(old, 0), hand.intent(kept, 3)) == [Fenced(), Permitted()]
    assert value(ledger_url, "SELECT array_agg(document_no) FROM attempt_intent") == [3]


async def test_a_shard_of_another_lane_is_fenced_although_the_epoch_is_right(hand: Hand) -> None:
    lease = (await hand.claim()).lease
    other = await Hand.join(hand.ledger, hand.run)
    assert await other.intend(other.intent(lease, 0)) == [Fenced()]


async def test_repeating_an_intent_whose_commit_was_lost_changes_nothing(hand: Hand, ledger_url: str) -> None:
    lease = (await hand.claim()).lease
    for _ in range(2):
        permits = await hand.intend(hand.intent(lease, 0), hand.intent(lease, 1, text_digest=text_digest(1)))
        assert permits == [Permitted(), Permitted()]
    assert value(ledger_url, "SELECT count(*) FROM attempt_intent") == 2


async def test_an_attempt_number_that_another_lane_used_is_not_permitted(hand: Hand) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    await hand.leave()
    heir = await Hand.join(hand.ledger, hand.run)
    new = (await heir.claim()).lease
    assert await heir.intend(heir.intent(new, 0), heir.intent(new, 1)) == [Fenced(), Permitted()]


async def test_a_text_with_a_committed_result_is_reused_and_not_sent(hand: Hand, ledger_url: str) -> None:
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    twin = hand.intent(lease, 1, text_digest=text_digest(0))
    assert await hand.intend(twin) == [ResultKey(hand.run.run_id, 0)]
    assert value(ledger_url, "SELECT count(*) FROM attempt_intent WHERE document_no = 1") == 0


async def test_an_intent_that_is_durable_is_permitted_although_its_text_was_answered_since(hand: Hand) -> None:
    """The answer to its commit was lost; were it reused now, an attempt would stay open that nobody makes."""
    lease = (await hand.claim()).lease
    twin = hand.intent(lease, 1, text_digest=text_digest(0))
    assert await hand.intend(twin) == [Permitted()]
    await hand.answer(lease, 0)
    assert await hand.intend(twin) == [Permitted()]


async def test_results_of_earlier_runs_are_reused_the_oldest_first(hand: Hand) -> None:
    await hand.answer_shard()
    later = await second_run(hand.ledger)
    lease = (await later.claim()).lease
    intents = [later.intent(lease, number, text_digest=text_digest(number)) for number in range(2)]
    assert await later.intend(*intents) == [ResultKey(hand.run.run_id, 0), ResultKey(hand.run.run_id, 1)]


@pytest.mark.parametrize(
    ("tier", "confidence", "is_reused"),
    [("flash", 0.85, True), ("flash", 0.84, False), ("flash", None, True), ("pro", 0.1, True)],
)
async def test_a_result_counts_if_it_is_sure_enough_or_from_the_last_tier(
    tier: str, confidence: float | None, is_reused: bool, hand: Hand
) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0, tier=tier))
    await hand.record(Record(hand.outcome(0, tier=tier), hand.result(lease, 0, tier=tier, confidence=confidence)))
    permits = await hand.intend(hand.intent(lease, 1, text_digest=text_digest(0)))
    assert permits == [ResultKey(hand.run.run_id, 0) if is_reused else Permitted()]


async def test_simulated_answers_are_never_reused_for_real_ones_nor_the_other_way(hand: Hand) -> None:
    await hand.answer_shard()
    simulated = await second_run(hand.ledger, is_simulated=True)
    lease = (await simulated.claim()).lease
    await simulated.answer(lease, 0)  # permitted, although the real run has a result
    reusable = Reusable(JOB.prompt_version, "pro", JOB.escalate.below)
    for is_simulated, run in ((False, hand.run), (True, simulated.run)):
        found = await attempts.find_results_now(
            hand.ledger, [text_digest(0)], replace(reusable, is_simulated=is_simulated)
        )
        assert found == {text_digest(0): ResultKey(run.run_id, 0)}


async def test_a_result_of_another_prompt_version_or_whose_answer_was_purged_does_not_count(
    hand: Hand, ledger_url: str
) -> None:
    await hand.answer_shard()
    other = Reusable("sha256:other", "pro", JOB.escalate.below)
    assert await attempts.find_results_now(hand.ledger, [text_digest(0)], other) == {}
    sql(ledger_url, "UPDATE document SET answer = NULL")
    same = replace(other, prompt_version=JOB.prompt_version)
    assert await attempts.find_results_now(hand.ledger, [text_digest(0)], same) == {}


async def test_what_is_recorded_is_counted_and_repeating_it_counts_nothing(hand: Hand, ledger_url: str) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0), hand.intent(lease, 1))
    records = [
        Record(hand.outcome(0), hand.result(lease, 0)),
        Record(hand.outcome(1, signal=Signal.LOST, verdict=None, usage=None)),
    ]
    for _ in range(3):
        assert await hand.record(*records) == set()
    counters = sql(
        ledger_url, "SELECT done, results, reused, attempts, cost, bounds, hit, miss, output, escalated FROM lane"
    )
    assert counters == [(1, 1, 0, 2, COST, RESERVED, 640, 100, 5, 0)]
    assert sql(ledger_url, "SELECT document_no, bound, because FROM attempt_unknown") == [(1, RESERVED, "lost")]


async def test_an_ending_needs_the_lease_and_the_paid_answer_is_kept_for_the_heir(
    hand: Hand, ledger_url: str
) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    await leases.bury_dead(hand.ledger, hand.run.run_id, grace_s=0)
    assert await hand.record(Record(hand.outcome(0), hand.result(lease, 0))) == {lease}
    assert value(ledger_url, "SELECT count(*) FROM document") == 0
    assert value(ledger_url, "SELECT cost FROM attempt_outcome") == COST
    paid = await attempts.find_paid_answer(hand.ledger, hand.run.run_id, 0, Verdict.ACCEPTED)
    answer = StoredAnswer('{"colour":"red"}', {"colour": "red"}, 0.9, "logprobs")
    assert paid == PaidAnswer("flash", 1, answer)
    history = await attempts.find_past_attempts(hand.ledger, hand.run.run_id, 0, 5)
    assert history == {0: [PastAttempt(1, "flash", Purpose.ANSWER, None, Signal.ANSWERED, Verdict.ACCEPTED)]}


async def test_a_paid_answer_is_found_by_its_verdict_though_another_came_later(hand: Hand) -> None:
    lease = (await hand.claim()).lease
    accepted, invalid = StoredAnswer("accepted", {"colour": "red"}), StoredAnswer("invalid")
    for attempt_no, verdict, stored in ((1, Verdict.ACCEPTED, accepted), (2, Verdict.INVALID_ANSWER, invalid)):
        await hand.intend(hand.intent(lease, 0, attempt_no))
        await hand.record(Record(hand.outcome(0, attempt_no, verdict=verdict, answer=stored)))

    async def find(verdict: Verdict) -> PaidAnswer | None:
        return await attempts.find_paid_answer(hand.ledger, hand.run.run_id, 0, verdict)

    assert await find(Verdict.ACCEPTED) == PaidAnswer("flash", 1, accepted)
    assert await find(Verdict.INVALID_ANSWER) == PaidAnswer("flash", 2, invalid)
    assert await find(Verdict.LOW_CONFIDENCE) is None


async def test_only_the_lost_lease_of_several_is_reported(hand: Hand, ledger_url: str) -> None:
    lost, kept = (await hand.claim()).lease, (await hand.claim()).lease
    sql(ledger_url, "UPDATE shard SET lease_epoch = 2 WHERE shard_no = 0")
    reason = {"reason": "empty_text"}
    endings = [hand.ending(lease, n, DocumentState.DEAD_LETTER, **reason) for lease, n in ((lost, 0), (kept, 3))]
    assert await hand.record(*(Record(ending=ending) for ending in endings)) == {lost}
    assert value(ledger_url, "SELECT array_agg(document_no) FROM document") == [3]
    assert value(ledger_url, "SELECT done FROM lane") == 1


async def test_history_holds_what_did_not_end_with_attempts_in_flight_as_lost(ledger: Ledger) -> None:
    run: Run = await run_everything(ledger)
    assert await attempts.find_past_attempts(ledger, run.run_id, 0, 5) == {}
    assert await attempts.find_endings(ledger, run.run_id, 1, 4) == {1, 2, 3, 4}
    hand = await second_run(ledger)
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 1))
    await hand.record(Record(hand.outcome(1, signal=Signal.RATE_LIMITED, verdict=None, usage=None)))
    await hand.intend(hand.intent(lease, 1, 2, "pro", purpose=Purpose.RETRY, reason="rate_limited"))
    assert await attempts.find_past_attempts(ledger, hand.run.run_id, 0, 2) == {
        1: [
            PastAttempt(1, "flash", Purpose.ANSWER, None, Signal.RATE_LIMITED, None),
            PastAttempt(2, "pro", Purpose.RETRY, "rate_limited", Signal.LOST, None),
        ]
    }


async def test_whatever_the_provider_says_can_be_stored(hand: Hand, ledger_url: str) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    odd = "a\0b\ud800"
    reply = Reply(Signal.ANSWERED, AT, AT, 200, odd, None, None, odd, odd, odd, odd, detail=odd)
    answer = StoredAnswer(odd, {"number": 2**70})
    await hand.record(Record(Outcome(0, 1, reply, Verdict.INVALID_ANSWER, None, None, RESERVED, answer=answer)))
    stored = sql(
        ledger_url, "SELECT finish_reason, served_model, fingerprint, provider_id, detail FROM attempt_outcome"
    )
    assert stored == [("a\ufffdb?",) * 5]
    assert sql(ledger_url, "SELECT content, answer FROM answer") == [("a\ufffdb?", {"number": 2**70})]


@pytest.mark.parametrize("poison", ["\0", "\ud800"])
async def test_a_value_that_postgres_refuses_is_the_rows_fault_and_nothing_of_the_batch_stays(
    poison: str, hand: Hand, ledger_url: str
) -> None:
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0), hand.intent(lease, 1))
    good = Record(hand.outcome(0), hand.result(lease, 0))
    bad = Record(hand.outcome(1), hand.result(lease, 1, answer={"colour": poison}))
    with pytest.raises(PoisonValue) as caught:
        await hand.record(good, bad)
    assert "colour" not in str(caught.value)
    assert value(ledger_url, "SELECT count(*) FROM attempt_outcome") == 0
    assert await hand.record(good) == set()  # the connection is fit for the next one
    assert value(ledger_url, "SELECT done FROM lane") == 1
