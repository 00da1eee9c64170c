"""Attempts: what is sent, what came back, and what each kind of reply means for money and for the document.

One attempt is one HTTP request for one document at one tier. The table of signals is the design's
(`ledger.md`, "What a reply means").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType

RunId = NewType("RunId", int)
LaneId = NewType("LaneId", int)


class Purpose(StrEnum):
    """Why an attempt is made; its cost is reported under this name."""

    ANSWER = "answer"
    RETRY = "retry"
    REPAIR = "repair"
    PRIMING = "priming"


class Signal(StrEnum):
    """What one attempt came to. Every reply and every exception maps to exactly one of these."""

    ANSWERED = "answered"  # 200 with content and finish_reason stop
    BLANK = "blank"  # no choices, null content, or only white space (what JSON mode makes of non-JSON)
    TRUNCATED = "truncated"  # finish_reason length
    INTERRUPTED = "interrupted"  # insufficient_system_resource or aborted: the text is discarded
    REFUSED = "refused_by_provider"  # content_filter, or 400 "Content Exists Risk"
    RATE_LIMITED = "rate_limited"  # 429
    UNAVAILABLE = "unavailable"  # 502 503 529, and 500/504 that carry DeepSeek's own error JSON
    FAILED = "failed"  # 500 or 504 from something in between: it may have been billed
    NOT_SENT = "not_sent"  # connection refused, DNS, TLS, pool: nothing left this machine
    LOST = "lost"  # sent, but no whole reply: timeout, reset, cut body, bad UTF-8, over the size cap
    MALFORMED = "malformed"  # 200 with HTML, a list, null or an error object
    REJECTED = "rejected"  # 400 413 422
    UNAUTHORISED = "unauthorised"  # 401 403 404
    NO_BALANCE = "no_balance"  # 402


#: Signals after which the provider may have billed the attempt although no usage came back.
UNKNOWN_BILLING = frozenset({Signal.FAILED, Signal.LOST, Signal.MALFORMED})

#: Signals that are known not to be billed: the provider did no inference.
NOT_BILLED = frozenset(
    {
        Signal.RATE_LIMITED,
        Signal.UNAVAILABLE,
        Signal.NOT_SENT,
        Signal.REJECTED,
        Signal.UNAUTHORISED,
        Signal.NO_BALANCE,
    }
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Billed tokens in the provider's three buckets; `reasoning` is the part of `output` that was thinking."""

    hit: int
    miss: int
    output: int
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer with its natural log probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. The first is the shared prefix (`system`); the second is the document's text, whole."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that one HTTP request needs, besides the client.

    `attempt_key` names the ledger row (`run.document.attempt`); it is sent as X-Attempt to the sandbox only,
    since changed headers may break a real cache. `deadline_s` bounds the whole attempt.
    """

    model: str
    messages: tuple[Message, ...]
    parameters: dict[str, object]  # thinking, max_tokens, temperature, response_format, logprobs, user_id …
    deadline_s: float
    attempt_key: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What one attempt came to: a signal, and whatever the provider told us.

    Both instants are on the provider's clock, because tariffs change on it: `completed_at` is its own word (its Date
    header, whole seconds) where it sent one; the rest is this machine's clock, put right by what is known of the
    provider's. `usage` is None where the provider reported
    none or an impossible one: unknown, never zero. `detail` is safe to store and to show: it never holds
    document text, a key or a URL's credentials.
    """

    signal: Signal
    sent_at: datetime
    completed_at: datetime
    http_status: int | None = None
    content: str | None = None
    tokens: tuple[Token, ...] | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    served_model: str | None = None
    fingerprint: str | None = None
    provider_id: str | None = None
    retry_after_s: float | None = None
    ceiling: int | None = None  # the concurrency limit that a 429 body states
    usage_fault: str | None = None  # what cannot be true of a usage that came: why there is none here
    detail: str = field(default="", compare=False)
