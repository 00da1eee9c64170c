"""The ladder's one rule: what each reply makes of a document, and that replayed history stands where it was lived."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.attempts import UNKNOWN_BILLING, Purpose, Signal
from schemas.ladder import (
    INTERRUPTIONS,
    UNKNOWN_RETRIES,
    Accept,
    Again,
    DeadLetter,
    PastAttempt,
    Position,
    Step,
    Stop,
    Verdict,
    advance,
    stand,
)

WITH_TEXT = (Signal.ANSWERED, Signal.BLANK, Signal.TRUNCATED)


def after(*replies: tuple[Signal, Verdict | None], rungs: int = 2) -> Step:
    """Where these replies, one after the other, leave a fresh document."""
    step: Step = Again(Position())
    for signal, verdict in replies:
        assert isinstance(step, Again), f"the document had ended: {step}"
        step = advance(step.position, signal, verdict, rungs)
    return step


def position_after(*replies: tuple[Signal, Verdict | None], rungs: int = 2) -> Position:
    step = after(*replies, rungs=rungs)
    assert isinstance(step, Again)
    return step.position


def test_an_accepted_answer_ends_the_document() -> None:
    assert after((Signal.ANSWERED, Verdict.ACCEPTED)) == Accept()


def test_low_confidence_goes_one_tier_up_with_its_reason() -> None:
    position = position_after((Signal.ANSWERED, Verdict.LOW_CONFIDENCE))
    assert (position.rung, position.purpose, position.reason) == (1, Purpose.ANSWER, "low_confidence")
    assert position.is_entry


@pytest.mark.parametrize(
    ("signal", "verdict"),
    [
        (Signal.ANSWERED, Verdict.INVALID_ANSWER),
        (Signal.BLANK, Verdict.BLANK),
        (Signal.TRUNCATED, Verdict.TRUNCATED),
    ],
)
def test_what_can_be_amended_is_amended_once_per_tier_then_escalated(signal: Signal, verdict: Verdict) -> None:
    once = position_after((signal, verdict))
    assert (once.rung, once.amends, once.purpose) == (0, verdict, Purpose.REPAIR)
    assert not once.is_entry
    twice = position_after((signal, verdict), (signal, verdict))
    assert (twice.rung, twice.amends, twice.reason, twice.amended) == (1, None, verdict.value, frozenset())
    assert after(*[(signal, verdict)] * 4) == DeadLetter(verdict.value)


def test_each_kind_of_amendment_has_its_own_turn_on_a_tier() -> None:
    position = position_after((Signal.ANSWERED, Verdict.INVALID_ANSWER), (Signal.BLANK, Verdict.BLANK))
    assert (position.rung, position.amends) == (0, Verdict.BLANK)


def test_a_blank_reply_without_verdict_counts_as_blank() -> None:
    assert after((Signal.BLANK, None)) == after((Signal.BLANK, Verdict.BLANK))


@pytest.mark.parametrize("signal", [Signal.RATE_LIMITED, Signal.UNAVAILABLE, Signal.NOT_SENT])
def test_an_unbilled_failure_is_retried_without_end_on_the_same_tier(signal: Signal) -> None:
    position = position_after(*[(signal, None)] * 40)
    assert (position.rung, position.attempts, position.retries) == (0, 40, 40)
    assert (position.purpose, position.reason) == (Purpose.RETRY, signal.value)


def test_a_retry_keeps_what_it_amends() -> None:
    position = position_after((Signal.TRUNCATED, Verdict.TRUNCATED), (Signal.RATE_LIMITED, None))
    assert (position.amends, position.purpose) == (Verdict.TRUNCATED, Purpose.RETRY)


@pytest.mark.parametrize("signal", sorted(UNKNOWN_BILLING))
def test_a_reply_that_may_have_been_billed_is_retried_twice(signal: Signal) -> None:
    assert position_after(*[(signal, None)] * UNKNOWN_RETRIES).unknowns == UNKNOWN_RETRIES
    assert after(*[(signal, None)] * (UNKNOWN_RETRIES + 1)) == DeadLetter(signal.value)


def test_unknowns_are_counted_over_all_tiers() -> None:
    lost, climb = (Signal.LOST, None), (Signal.ANSWERED, Verdict.LOW_CONFIDENCE)
    assert after(lost, climb, lost, lost) == DeadLetter("lost")


def test_an_interrupted_reply_is_tried_thrice_on_a_tier_then_one_up() -> None:
    interrupted = (Signal.INTERRUPTED, None)
    assert position_after(*[interrupted] * (INTERRUPTIONS - 1)).rung == 0
    up = position_after(*[interrupted] * INTERRUPTIONS)
    assert (up.rung, up.retries, up.reason) == (1, 0, "interrupted")
    assert after(*[interrupted] * 2 * INTERRUPTIONS) == DeadLetter("interrupted")


@pytest.mark.parametrize("other", [Signal.RATE_LIMITED, Signal.NOT_SENT])
def test_retries_for_other_reasons_are_no_interruptions(other: Signal) -> None:
    position = position_after(*[(other, None)] * 40, (Signal.INTERRUPTED, None), rungs=1)
    assert (position.rung, position.retries, position.interruptions) == (0, 41, 1)


def test_an_amended_attempt_in_between_does_not_forget_interruptions() -> None:
    interrupted, invalid = (Signal.INTERRUPTED, None), (Signal.ANSWERED, Verdict.INVALID_ANSWER)
    assert position_after(interrupted, interrupted, invalid, interrupted).rung == 1


@pytest.mark.parametrize("signal", [Signal.REFUSED, Signal.REJECTED])
def test_a_refusal_of_this_document_is_final(signal: Signal) -> None:
    assert after((signal, None)) == DeadLetter(signal.value)


@pytest.mark.parametrize("signal", [Signal.UNAUTHORISED, Signal.NO_BALANCE])
def test_a_refusal_of_everyone_stops_the_run_and_a_resumed_document_tries_the_same_again(signal: Signal) -> None:
    assert after((signal, None)) == Stop(signal.value)
    history = [PastAttempt(1, Signal.TRUNCATED, Verdict.TRUNCATED), PastAttempt(2, signal, None)]
    step = stand(history, 2)
    assert isinstance(step, Again)
    assert (step.position.attempts, step.position.amends) == (2, Verdict.TRUNCATED)
    assert (step.position.purpose, step.position.reason) == (Purpose.RETRY, signal.value)


def test_the_next_attempt_is_numbered_after_the_last_one_that_left() -> None:
    step = stand([PastAttempt(1, Signal.LOST, None), PastAttempt(4, Signal.RATE_LIMITED, None)], 2)
    assert isinstance(step, Again)
    assert step.position.attempts == 4


def test_an_accepted_answer_that_came_late_is_not_asked_for_again() -> None:
    """Its lane was fenced, the next one lost a reply, and only then the first one's came."""
    late = PastAttempt(1, Signal.ANSWERED, Verdict.ACCEPTED)
    assert stand([late, PastAttempt(2, Signal.LOST, None)], 2) == Accept()
    assert stand([PastAttempt(1, Signal.REFUSED, None), replace(late, attempt_no=2)], 2) == Accept()


def test_a_refusal_that_came_late_ends_the_document_all_the_same() -> None:
    history = [PastAttempt(1, Signal.REFUSED, None), PastAttempt(2, Signal.LOST, None)]
    assert stand(history, 2) == DeadLetter("refused_by_provider")


def replies() -> st.SearchStrategy[tuple[Signal, Verdict | None]]:
    def one(signal: Signal) -> st.SearchStrategy[tuple[Signal, Verdict | None]]:
        if signal is Signal.ANSWERED:
            verdicts = (Verdict.ACCEPTED, Verdict.INVALID_ANSWER, Verdict.LOW_CONFIDENCE)
            return st.tuples(st.just(signal), st.sampled_from(verdicts))
        return st.just((signal, Verdict(signal.value) if signal in WITH_TEXT else None))

    return st.sampled_from(Signal).flatmap(one)


@given(st.lists(replies(), max_size=14), st.integers(1, 3))
def test_replaying_any_history_gives_the_step_that_living_it_gave(
    told: list[tuple[Signal, Verdict | None]], rungs: int
) -> None:
    step: Step = Again(Position())
    history: list[PastAttempt] = []
    for signal, verdict in told:
        if isinstance(step, Stop):
            step = stand(history, rungs)  # the run was paused here, and is resumed
        if not isinstance(step, Again):
            break
        history.append(PastAttempt(step.position.attempts + 1, signal, verdict))
        step = advance(step.position, signal, verdict, rungs)
        if not isinstance(step, Stop):
            assert stand(history, rungs) == step
    assert [past.attempt_no for past in history] == list(range(1, len(history) + 1))


@given(st.lists(replies(), max_size=30), st.integers(1, 4))
def test_no_history_leaves_the_ladder_or_goes_down(told: list[tuple[Signal, Verdict | None]], rungs: int) -> None:
    position = Position()
    for signal, verdict in told:
        step = advance(position, signal, verdict, rungs)
        if not isinstance(step, Again):
            break
        assert position.rung <= step.position.rung < rungs
        assert step.position.attempts == position.attempts + 1
        assert step.position.unknowns <= UNKNOWN_RETRIES
        position = step.position
