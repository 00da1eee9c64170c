"""The ladder: where a document stands on it, and what one reply makes of that.

`advance` is the only rule. A lane applies it to each reply as it comes; a resumed lane applies it to the ledger's
rows (`stand`) and so stands where the killed one stood, without paying again for what was answered. The table
of signals is the design's (`ledger.md`, "What a reply means").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from schemas.attempts import UNKNOWN_BILLING, Purpose, Signal

#: After a reply that may have been billed and was lost, a document is tried this many times more (G6).
UNKNOWN_RETRIES = 2
#: An interrupted reply is discarded, and may be billed: this many on one tier, then one tier up.
INTERRUPTIONS = 3


class Verdict(StrEnum):
    """What we decided about a reply that carried text, or should have. Transport failures have none."""

    ACCEPTED = "accepted"
    INVALID_ANSWER = "invalid_answer"
    LOW_CONFIDENCE = "low_confidence"
    CALIBRATION = "calibration"  # valid, and however sure: the last tier is to answer the same document
    BLANK = "blank"
    TRUNCATED = "truncated"
    HELD = "held"  # valid, and waits until its run is certified


@dataclass(frozen=True, slots=True)
class Position:
    """Where a document stands: its tier by rung, what was tried, and what the next attempt is for.

    `amends` says how the next attempt differs from a plain one: it repairs an invalid answer, nudges after a
    blank one, or allows more tokens after a truncated one. Each is done once per tier (`amended`). `unknowns` are
    counted over all tiers, `interruptions` on this one, `retries` since the last reply that was weighed.
    """

    rung: int = 0
    attempts: int = 0
    unknowns: int = 0
    retries: int = 0
    interruptions: int = 0
    amended: frozenset[Verdict] = frozenset()
    amends: Verdict | None = None
    purpose: Purpose = Purpose.ANSWER
    reason: str | None = None

    @property
    def is_entry(self) -> bool:
        """Whether the next attempt is the first on its tier."""
        return self.purpose in (Purpose.ANSWER, Purpose.PRIMING)


@dataclass(frozen=True, slots=True)
class Accept:
    """The answer is the document's result."""


@dataclass(frozen=True, slots=True)
class Hold:
    """The answer waits for the certificate of its run, which makes it the result or sends the document up."""


@dataclass(frozen=True, slots=True)
class Again:
    """Another attempt, from this position."""

    position: Position


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The document ends without a result."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The provider refuses everything: the run must pause; the document is untouched."""

    reason: str


Step = Accept | Hold | Again | DeadLetter | Stop


def advance(position: Position, signal: Signal, verdict: Verdict | None, rungs: int) -> Step:
    """What one finished attempt makes of a document on a ladder of `rungs` tiers."""
    now = replace(_count(position, signal), amends=None)
    match signal:
        case Signal.ANSWERED | Signal.BLANK | Signal.TRUNCATED:
            return _weigh(now, verdict or Verdict(signal.value), rungs)
        case Signal.INTERRUPTED:
            spent = now.interruptions >= INTERRUPTIONS
            return _climb(now, signal.value, rungs) if spent else _retry(position, now, signal)
        case Signal.RATE_LIMITED | Signal.UNAVAILABLE | Signal.NOT_SENT:
            return _retry(position, now, signal)
        case Signal.FAILED | Signal.LOST | Signal.MALFORMED:
            return DeadLetter(signal.value) if now.unknowns > UNKNOWN_RETRIES else _retry(position, now, signal)
        case Signal.REFUSED | Signal.REJECTED:
            return DeadLetter(signal.value)
        case Signal.UNAUTHORISED | Signal.NO_BALANCE:
            return Stop(signal.value)
    assert_never(signal)


def _count(position: Position, signal: Signal) -> Position:
    """The same position with one attempt more that came to this."""
    return replace(
        position,
        attempts=position.attempts + 1,
        unknowns=position.unknowns + (signal in UNKNOWN_BILLING),
        interruptions=position.interruptions + (signal is Signal.INTERRUPTED),
    )


def _retry(before: Position, now: Position, signal: Signal) -> Again:
    """The same attempt once more: what it amends stays, its purpose and reason say that it is a retry."""
    return Again(
        replace(now, amends=before.amends, retries=now.retries + 1, purpose=Purpose.RETRY, reason=signal.value)
    )


def _weigh(now: Position, verdict: Verdict, rungs: int) -> Step:
    match verdict:
        case Verdict.ACCEPTED:
            return Accept()
        case Verdict.HELD:
            return Hold()
        case Verdict.LOW_CONFIDENCE:
            return _climb(now, verdict.value, rungs)
        case Verdict.CALIBRATION:
            return _climb(replace(now, rung=max(now.rung, rungs - 2)), verdict.value, rungs)
        case Verdict.INVALID_ANSWER | Verdict.BLANK | Verdict.TRUNCATED if verdict in now.amended:
            return _climb(now, verdict.value, rungs)
        case Verdict.INVALID_ANSWER | Verdict.BLANK | Verdict.TRUNCATED:
            return Again(
                replace(
                    now,
                    amended=now.amended | {verdict},
                    amends=verdict,
                    retries=0,
                    purpose=Purpose.REPAIR,
                    reason=verdict.value,
                )
            )
    assert_never(verdict)


def _climb(now: Position, reason: str, rungs: int) -> Step:
    if now.rung + 1 >= rungs:
        return DeadLetter(reason)
    return Again(
        replace(
            now,
            rung=now.rung + 1,
            retries=0,
            interruptions=0,
            amended=frozenset(),
            amends=None,
            purpose=Purpose.ANSWER,
            reason=reason,
        )
    )


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """One attempt of an unfinished document as the ledger has it; an unknown one without outcome is `lost`.

    `tier`, `purpose` and `reason` are its intent's: what it was made as. `signal` and `verdict` are what it came to.
    """

    attempt_no: int
    tier: str
    purpose: Purpose
    reason: str | None
    signal: Signal
    verdict: Verdict | None


def stand(history: Iterable[PastAttempt], ladder: Sequence[str]) -> Step:
    """Where a document stands after its past attempts, in their order, on a ladder of tiers of these names.

    A reply may come late, when another lane, for which it was lost, has already made the next attempts: these were
    not made from where that reply leads. So each attempt is weighed from the position that it *was* made from, and
    the document stands where the furthest of them leads, of equals the latest. One that is overtaken only counts
    (attempts, unknowns, interruptions on its tier): it takes no tier and no amendment away. What a reply ended is
    over, whatever came after it, and an accepted answer is not paid for again (G5). Nor is one that is held, while
    nothing was tried above it.

    Raises ValueError for a row that no lane makes: a tier off the ladder, a repair of no verdict.
    """
    past = list(history)
    if any(attempt.verdict is Verdict.ACCEPTED for attempt in past):
        return Accept()
    made = furthest = Position()
    is_held = False
    for attempt in past:
        made = _made_from(attempt, ladder.index(attempt.tier), made)
        step = advance(made, attempt.signal, attempt.verdict, len(ladder))
        made = _count(made, attempt.signal)
        if isinstance(step, Stop):  # the run was paused and is resumed: the same attempt once more
            step = _retry(made, made, attempt.signal)
        if isinstance(step, Hold):
            is_held = True
            continue
        if not isinstance(step, Again):
            return step
        furthest = max(step.position, furthest, key=_progress)
    if is_held and furthest.rung == 0:
        return Hold()
    interruptions = made.interruptions if made.rung == furthest.rung else furthest.interruptions
    return Again(replace(furthest, attempts=made.attempts, unknowns=made.unknowns, interruptions=interruptions))


def release(history: Iterable[PastAttempt], ladder: Sequence[str], reason: str) -> Step:
    """Where a document stands whose held answer is not the last word: on the last tier, as it was left there."""
    past = list(history)
    if any(attempt.tier == ladder[-1] for attempt in past):
        return stand(past, ladder)
    unknowns = sum(attempt.signal in UNKNOWN_BILLING for attempt in past)
    attempts = max((attempt.attempt_no for attempt in past), default=0)
    return Again(Position(rung=len(ladder) - 1, attempts=attempts, unknowns=unknowns, reason=reason))


def _made_from(attempt: PastAttempt, rung: int, before: Position) -> Position:
    """The position that an attempt was made from; `before` is that of the one before it, which it counts already."""
    if rung != before.rung:
        before = replace(before, rung=rung, interruptions=0, amended=frozenset(), amends=None)
    now = replace(before, attempts=attempt.attempt_no - 1)
    match attempt.purpose:
        case Purpose.ANSWER | Purpose.PRIMING:
            return replace(now, amends=None, retries=0)
        case Purpose.REPAIR:
            verdict = Verdict(attempt.reason or "")
            return replace(now, amended=now.amended | {verdict}, amends=verdict, retries=0)
        case Purpose.RETRY:  # of what the one before it was made as
            return replace(now, retries=now.retries + 1)
    assert_never(attempt.purpose)


def _progress(position: Position) -> tuple[int, int]:
    """How far a position is: its rung, then what was amended there."""
    return position.rung, len(position.amended)
