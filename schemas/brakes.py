"""The brakes of a lane: when to stop retrying for a while, and when to stop the run.

Pure: instants are seconds on a clock that the caller owns and passes in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from schemas.attempts import NOT_BILLED, UNKNOWN_BILLING, Signal

_SILENCE = frozenset({Signal.NOT_SENT, Signal.UNAVAILABLE, Signal.FAILED, Signal.LOST})
#: A whole reply that is no server error: whatever it says, somebody is there to say it.
_PROOF_OF_LIFE = frozenset(
    {
        Signal.ANSWERED,
        Signal.BLANK,
        Signal.TRUNCATED,
        Signal.REFUSED,
        Signal.INTERRUPTED,
        Signal.RATE_LIMITED,
        Signal.REJECTED,
        Signal.UNAUTHORISED,
        Signal.NO_BALANCE,
    }
)


#: The account, not the document, is refused: whatever is sent next will be, too.
_REFUSALS = frozenset({Signal.UNAUTHORISED, Signal.NO_BALANCE})

#: What a retry takes where the failure was not billed.
RETRY_PRICE = 5.0


@dataclass
class RetryBudget:
    """Retries that fail may not drown first tries (G12): a bucket that successes fill and retries empty.

    A retry of an unbilled failure takes 5, of one that may be billed 10, a success gives 1. A retry that is answered
    gives 5 back: else the thousands that one storm turned away would come back one in five seconds when nothing else
    is left. So retries in vain are at most a fifth of what succeeds, beyond what the bucket holds. A trickle of one
    a second lets a lane find out that the provider is back.
    """

    capacity: float = 500.0
    trickle_per_s: float = 1.0
    _level: float = 500.0
    _at_s: float = 0.0

    def succeed(self, *, is_answered_retry: bool = False) -> None:
        """A reply with usage came."""
        self._level = min(self.capacity, self._level + (RETRY_PRICE if is_answered_retry else 1))

    def take(self, signal: Signal, now_s: float) -> float:
        """Take what a retry after `signal` costs. 0: go; else seconds to wait before asking again."""
        price = 2 * RETRY_PRICE if signal in UNKNOWN_BILLING else RETRY_PRICE
        self._level = min(self.capacity, self._level + (now_s - self._at_s) * self.trickle_per_s)
        self._at_s = now_s
        if self._level >= price:
            self._level -= price
            return 0.0
        return (price - self._level) / self.trickle_per_s


@dataclass
class Breaker:
    """Opens when the provider is plainly not there, lets one probe through now and then, closes on any reply.

    Rules (design, ledger.md): nothing but failures for 30 s; five malformed replies in a minute. Open for
    `give_up_after_s`, or 20 rejected requests in a row, or over 1 % of at least 200, or a refusal of the account: the
    run stops.
    """

    open_after_s: float = 30.0
    probe_every_s: float = 5.0
    give_up_after_s: float = 600.0
    _failing_since_s: float | None = None
    _opened_s: float | None = None
    _next_probe_s: float = 0.0
    _malformed: deque[float] = field(default_factory=deque)
    _rejected_in_row: int = 0
    _rejected: int = 0
    _replies: int = 0
    _refusal: Signal | None = None

    def note(self, signal: Signal, now_s: float) -> None:
        """Take a finished attempt into account."""
        self._count_rejections(signal)
        if signal in _REFUSALS:
            self._refusal = signal
        if signal is Signal.MALFORMED:
            self._malformed.append(now_s)
        while self._malformed and self._malformed[0] < now_s - 60:
            self._malformed.popleft()
        if signal in _PROOF_OF_LIFE:
            if self._opened_s is not None and signal not in NOT_BILLED:
                self._malformed.clear()  # or a breaker that malformed replies opened would open again at once
            self._failing_since_s = None
            if not self._is_plainly_down(now_s):
                self._opened_s = None
        elif signal in _SILENCE and self._failing_since_s is None:
            self._failing_since_s = now_s
        if self._opened_s is None and self._is_plainly_down(now_s):
            self._opened_s, self._next_probe_s = now_s, now_s + self.probe_every_s

    def forget_silence(self) -> None:
        """After hours in which nothing was asked: that the provider was silent before says nothing about now."""
        self._failing_since_s = self._opened_s = None
        self._malformed.clear()

    def wait_s(self, now_s: float) -> float:
        """0: an attempt may start (when open: this one, as the probe). Else seconds to wait before asking again."""
        if self._opened_s is None:
            return 0.0
        if now_s >= self._next_probe_s:
            self._next_probe_s = now_s + self.probe_every_s
            return 0.0
        return self._next_probe_s - now_s

    def reason(self, now_s: float) -> str | None:
        """Why attempts wait, for people; None while closed."""
        if self._opened_s is None:
            return None
        since_s = self._opened_s if self._failing_since_s is None else self._failing_since_s
        return f"the provider has not answered for {now_s - since_s:.0f} s"

    def verdict(self, now_s: float) -> str | None:
        """Why the run must stop, if it must."""
        if self._refusal is not None:
            return self._refusal.value
        if self._opened_s is not None and now_s - self._opened_s > self.give_up_after_s:
            return "provider_down"
        if self._rejected_in_row >= 20 or (self._replies >= 200 and self._rejected * 100 > self._replies):
            return "requests_rejected"
        return None

    def _is_plainly_down(self, now_s: float) -> bool:
        is_dark = self._failing_since_s is not None and now_s - self._failing_since_s >= self.open_after_s
        return is_dark or len(self._malformed) >= 5

    def _count_rejections(self, signal: Signal) -> None:
        if signal is Signal.REJECTED:
            self._rejected_in_row += 1
            self._rejected += 1
        elif signal not in NOT_BILLED:
            self._rejected_in_row = 0
        self._replies += signal not in NOT_BILLED or signal is Signal.REJECTED
