"""The ladder's one rule: what each reply makes of a document, and that replayed history stands where it was lived."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.attempts import UNKNOWN_BILLING, Purpose, Signal
from schemas.ladder import (
    INTERRUPTIONS,
    UNKNOWN_RETRIES,
    Accept,
    Again,
    DeadLetter,
    Hold,
    PastAttempt,
    Position,
    Step,
    Stop,
    Verdict,
    advance,
    release,
    stand,
)

WITH_TEXT = (Signal.ANSWERED, Signal.BLANK, Signal.TRUNCATED)
TWO = ("flash", "pro")
THREE = ("flash", "flash-thinking", "pro")
LADDER = (*THREE, "pro-thinking")
CameTo = tuple[Signal, Verdict | None]
LOST: CameTo = (Signal.LOST, None)
INTERRUPTED: CameTo = (Signal.INTERRUPTED, None)
LOW: CameTo = (Signal.ANSWERED, Verdict.LOW_CONFIDENCE)
INVALID: CameTo = (Signal.ANSWERED, Verdict.INVALID_ANSWER)
BLANK: CameTo = (Signal.BLANK, Verdict.BLANK)


def made(position: Position, came_to: CameTo, ladder: tuple[str, ...] = LADDER) -> PastAttempt:
    """The row of an attempt that was made from there."""
    tier = ladder[position.rung]
    return PastAttempt(position.attempts + 1, tier, position.purpose, position.reason, *came_to)


def first(came_to: CameTo) -> PastAttempt:
    return PastAttempt(1, "flash", Purpose.ANSWER, None, *came_to)


def retry(attempt_no: int, came_to: CameTo, tier: str = "flash") -> PastAttempt:
    return PastAttempt(attempt_no, tier, Purpose.RETRY, "lost", *came_to)


def repair(attempt_no: int, of: Verdict, came_to: CameTo) -> PastAttempt:
    return PastAttempt(attempt_no, "flash", Purpose.REPAIR, of.value, *came_to)


def stands(*history: PastAttempt, on: tuple[str, ...] = TWO) -> Position:
    step = stand(history, on)
    assert isinstance(step, Again)
    return step.position


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


def test_an_answer_of_a_pilot_goes_to_the_last_tier_whatever_lies_between() -> None:
    calibration = (Signal.ANSWERED, Verdict.CALIBRATION)
    position = position_after(calibration, rungs=4)
    assert (position.rung, position.purpose, position.reason) == (3, Purpose.ANSWER, "calibration")
    assert stands(first(calibration), on=LADDER).rung == 3
    assert position_after(INVALID, INVALID, calibration, rungs=4).rung == 3  # the tier between had to answer first
    assert after(calibration, calibration, rungs=2) == DeadLetter("calibration")  # nothing is above: it ends


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
    truncated = first((Signal.TRUNCATED, Verdict.TRUNCATED))
    position = stands(truncated, repair(2, Verdict.TRUNCATED, (signal, None)))
    assert (position.attempts, position.amends) == (2, Verdict.TRUNCATED)
    assert (position.purpose, position.reason) == (Purpose.RETRY, signal.value)


def test_the_next_attempt_is_numbered_after_the_last_one_that_left() -> None:
    assert stands(first(LOST), retry(4, (Signal.RATE_LIMITED, None))).attempts == 4


def test_an_accepted_answer_that_came_late_is_not_asked_for_again() -> None:
    """Its lane was fenced, the next one lost a reply, and only then the first one's came."""
    accepted = (Signal.ANSWERED, Verdict.ACCEPTED)
    assert stand([first(accepted), retry(2, LOST)], TWO) == Accept()
    assert stand([first((Signal.REFUSED, None)), retry(2, accepted)], TWO) == Accept()


def test_a_refusal_that_came_late_ends_the_document_all_the_same() -> None:
    assert stand([first((Signal.REFUSED, None)), retry(2, LOST)], TWO) == DeadLetter("refused_by_provider")


@pytest.mark.parametrize("ladder", [TWO, THREE])
@pytest.mark.parametrize("came_to", [LOW, LOST, INTERRUPTED, INVALID, (Signal.RATE_LIMITED, None)])
def test_a_retry_that_a_late_reply_overtook_takes_no_tier_away(ladder: tuple[str, ...], came_to: CameTo) -> None:
    """Attempt 1 was lost to the lane that made attempt 2, and came late: unsure. The next tier was not asked yet."""
    position = stands(first(LOW), retry(2, came_to), on=ladder)
    assert (position.rung, position.attempts, position.purpose) == (1, 2, Purpose.ANSWER)
    assert (position.unknowns, position.interruptions) == (came_to == LOST, 0)
    last = PastAttempt(3, ladder[1], Purpose.ANSWER, "low_confidence", *LOW)
    step = stand([first(LOW), retry(2, came_to), last], ladder)
    assert step == DeadLetter("low_confidence") if ladder == TWO else isinstance(step, Again)


@pytest.mark.parametrize("of", [INVALID, BLANK])
def test_a_plain_retry_is_no_failed_repair(of: CameTo) -> None:
    verdict = of[1]
    assert verdict is not None
    position = stands(first(of), retry(2, of))
    assert (position.rung, position.attempts, position.amends) == (0, 2, verdict)
    assert position.purpose is Purpose.REPAIR
    assert stands(first(of), retry(2, of), repair(3, verdict, of)).rung == 1


def test_a_retry_of_a_repair_is_the_repair() -> None:
    history = [first(INVALID), repair(2, Verdict.INVALID_ANSWER, LOST), retry(3, INVALID)]
    assert stands(*history).rung == 1


def test_a_repair_of_what_came_first_fails_though_something_else_came_late() -> None:
    history = [first(BLANK), retry(2, INVALID), repair(3, Verdict.INVALID_ANSWER, INVALID)]
    assert stands(*history).rung == 1


def test_a_lost_retry_does_not_undo_a_repair_that_is_due() -> None:
    position = stands(first(INVALID), retry(2, LOST))
    assert (position.amends, position.purpose, position.unknowns) == (Verdict.INVALID_ANSWER, Purpose.REPAIR, 1)


def test_interruptions_that_came_late_count_on_their_own_tier_only() -> None:
    assert stands(first(INTERRUPTED), retry(2, INTERRUPTED)).interruptions == 2
    assert stands(first(INTERRUPTED), retry(2, INTERRUPTED), retry(3, INTERRUPTED)).rung == 1
    position = stands(first(INVALID), retry(2, INTERRUPTED))
    assert (position.rung, position.amends, position.interruptions) == (0, Verdict.INVALID_ANSWER, 1)
    overtaken = [first(LOW), *(retry(n, INTERRUPTED) for n in range(2, 2 + INTERRUPTIONS))]
    assert (stands(*overtaken).rung, stands(*overtaken).interruptions) == (1, 0)


def test_what_was_lost_counts_though_a_late_reply_overtook_it() -> None:
    history = [first(LOW), retry(2, LOST), retry(3, LOST)]
    assert (stands(*history).rung, stands(*history).unknowns) == (1, UNKNOWN_RETRIES)
    step = stand([*history, PastAttempt(4, "pro", Purpose.ANSWER, "low_confidence", *LOST)], TWO)
    assert step == DeadLetter("lost")


def replies() -> st.SearchStrategy[CameTo]:
    def one(signal: Signal) -> st.SearchStrategy[CameTo]:
        if signal is Signal.ANSWERED:
            verdicts = (Verdict.ACCEPTED, Verdict.INVALID_ANSWER, Verdict.LOW_CONFIDENCE)
            return st.tuples(st.just(signal), st.sampled_from(verdicts))
        return st.just((signal, Verdict(signal.value) if signal in WITH_TEXT else None))

    return st.sampled_from(Signal).flatmap(one)


@given(st.lists(replies(), max_size=14), st.integers(1, 3))
def test_replaying_any_history_gives_the_step_that_living_it_gave(told: list[CameTo], rungs: int) -> None:
    step: Step = Again(Position())
    history: list[PastAttempt] = []
    for signal, verdict in told:
        if isinstance(step, Stop):
            step = stand(history, LADDER[:rungs])  # the run was paused here, and is resumed
        if not isinstance(step, Again):
            break
        history.append(made(step.position, (signal, verdict)))
        step = advance(step.position, signal, verdict, rungs)
        if not isinstance(step, Stop):
            assert stand(history, LADDER[:rungs]) == step
    assert [past.attempt_no for past in history] == list(range(1, len(history) + 1))


@given(st.lists(replies(), max_size=30), st.integers(1, 4))
def test_no_history_leaves_the_ladder_or_goes_down(told: list[CameTo], rungs: int) -> None:
    position = Position()
    for signal, verdict in told:
        step = advance(position, signal, verdict, rungs)
        if not isinstance(step, Again):
            break
        assert position.rung <= step.position.rung < rungs
        assert step.position.attempts == position.attempts + 1
        assert step.position.unknowns <= UNKNOWN_RETRIES
        position = step.position


@dataclass
class Relay:
    """A document's history as lanes make it, one taking over from the other, and the replies that are still out."""

    ladder: tuple[str, ...]
    rows: list[PastAttempt] = field(default_factory=list)
    out: list[int] = field(default_factory=list)
    late: Counter[str] = field(default_factory=Counter)

    def take_over(self) -> Step:
        """A lane resumes from the rows; what has no reply yet is lost to it."""
        step = stand(self.rows, self.ladder)
        asked = {row.tier for row in self.rows}
        if isinstance(step, Again):
            assert asked >= set(self.ladder[: step.position.rung]), "a tier was not asked"
            assert step.position.attempts == len(self.rows)
            assert step.position.unknowns == self.unknowns <= UNKNOWN_RETRIES
            self.check_tier(step.position)
        if isinstance(step, DeadLetter) and step.reason in [*Verdict, "interrupted"]:
            assert asked == set(self.ladder), "a document ended and a tier was not asked"
        return step

    def check_tier(self, position: Position) -> None:
        """What was asked of the tier where the document stands, and of those above it, is not forgotten."""
        above = [row for row in self.rows if self.ladder.index(row.tier) > position.rung]
        here = [row for row in self.rows if row.tier == self.ladder[position.rung]]
        assert not above
        assert position.interruptions == sum(row.signal is Signal.INTERRUPTED for row in here) < INTERRUPTIONS
        assert Verdict.LOW_CONFIDENCE not in {row.verdict for row in here}
        assert bool(position.amended) == any(row.verdict for row in here)

    @property
    def unknowns(self) -> int:
        return sum(row.signal in UNKNOWN_BILLING for row in self.rows)

    def live(self, position: Position, told: list[CameTo], *, is_frozen: bool) -> Step:
        """A lane's attempts; if it freezes, the reply to one more is out. Its steps are what the rows say."""
        step: Step = Again(position)
        for came_to in told:
            if not isinstance(step, Again):
                return step
            self.rows.append(made(step.position, came_to, self.ladder))
            step = advance(step.position, *came_to, len(self.ladder))
            if not isinstance(step, Stop):
                assert stand(self.rows, self.ladder) == step
        if is_frozen and isinstance(step, Again):
            self.out.append(len(self.rows))
            self.rows.append(made(step.position, LOST, self.ladder))
        return step

    def arrive(self, which: int, came_to: CameTo) -> None:
        """One of the replies that are out comes, after later attempts were made."""
        overtaking = [at for at in self.out if at + 1 < len(self.rows)]
        if overtaking:
            at = overtaking[which % len(overtaking)]
            self.out.remove(at)
            self.rows[at] = replace(self.rows[at], signal=came_to[0], verdict=came_to[1])
            self.late[self.rows[at].tier] += 1


#: Mostly replies after which a document goes on: most others end it before anything is late.
ONWARD = st.sampled_from([LOW, INVALID, BLANK, INTERRUPTED, (Signal.RATE_LIMITED, None)]) | replies()
LEGS = st.lists(
    st.tuples(
        st.lists(ONWARD, max_size=3),
        st.sampled_from([True, True, False]),
        st.lists(st.tuples(st.integers(0, 3), ONWARD), max_size=2),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=300)
@given(LEGS, st.integers(1, 4))
def test_whatever_comes_late_no_tier_is_skipped_and_none_is_asked_too_often(
    legs: list[tuple[list[CameTo], bool, list[tuple[int, CameTo]]]], rungs: int
) -> None:
    relay = Relay(LADDER[:rungs])
    for told, is_frozen, arrivals in legs:
        step = relay.take_over()
        if not isinstance(step, Again):
            break
        relay.live(step.position, told, is_frozen=is_frozen)
        for which, came_to in arrivals:
            relay.arrive(which, came_to)
    weighed: dict[str, list[Verdict]] = {tier: [] for tier in relay.ladder}
    for row in relay.rows:
        weighed[row.tier] += [row.verdict] if row.verdict else []
    for tier, verdicts in weighed.items():
        amended = set(verdicts) & {Verdict.INVALID_ANSWER, Verdict.BLANK, Verdict.TRUNCATED}
        assert len(verdicts) <= 1 + len(amended) + relay.late[tier]
    assert relay.unknowns <= UNKNOWN_RETRIES + 1
    is_won = any(row.verdict is Verdict.ACCEPTED for row in relay.rows)
    assert (relay.take_over() == Accept()) == is_won


def held(*after: PastAttempt) -> list[PastAttempt]:
    return [PastAttempt(1, "flash", Purpose.ANSWER, None, Signal.ANSWERED, Verdict.HELD), *after]


def test_a_held_answer_waits_and_is_not_paid_for_again() -> None:
    assert advance(Position(), Signal.ANSWERED, Verdict.HELD, 2) == Hold()
    assert stand(held(), ["flash", "pro"]) == Hold()
    lost = PastAttempt(1, "flash", Purpose.ANSWER, None, Signal.LOST, None)
    answered = PastAttempt(2, "flash", Purpose.RETRY, "lost", Signal.ANSWERED, Verdict.HELD)
    assert stand([lost, answered], ["flash", "pro"]) == Hold()


def test_a_released_document_climbs_to_the_last_tier_once_and_stands_there_as_it_was_left() -> None:
    first = release(held(), ["flash", "pro"], "certified_sample")
    assert first == Again(Position(rung=1, attempts=1, reason="certified_sample"))
    lost = PastAttempt(2, "pro", Purpose.ANSWER, "certified_sample", Signal.LOST, None)
    again = release(held(lost), ["flash", "pro"], "certified_sample")
    assert isinstance(again, Again)
    assert (again.position.rung, again.position.attempts, again.position.purpose) == (1, 2, Purpose.RETRY)
    assert again.position.unknowns == 1
    answered = PastAttempt(2, "pro", Purpose.ANSWER, "certified_sample", Signal.ANSWERED, Verdict.ACCEPTED)
    assert release(held(answered), ["flash", "pro"], "certified_sample") == Accept()


def test_a_reused_first_answer_climbs_with_its_first_attempt() -> None:
    assert release([], ["flash", "pro"], "not_certified") == Again(Position(rung=1, reason="not_certified"))
