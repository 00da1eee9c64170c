"""Ledger rows on their way in: what a lane intends, what came of it, and how a document ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from schemas.attempts import Purpose, Reply
from schemas.ladder import Verdict


class DocumentState(StrEnum):
    """How a document ended (G2)."""

    RESULT = "result"
    DEAD_LETTER = "dead_letter"
    DUPLICATE = "duplicate"
    REUSED = "reused"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a shard: it holds while the shard's epoch is this one (G10)."""

    shard_no: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Intent:
    """An attempt that is about to be made. `reserved` is the most it can cost, in pico units.

    If a committed result for the text of that digest exists by then, the attempt is not permitted and the result
    is reused (G5).
    """

    document_no: int
    attempt_no: int
    lease: Lease
    tier: str
    purpose: Purpose
    reason: str | None
    grant_id: int
    price_id: int
    reserved: int
    text_digest: bytes


@dataclass(frozen=True, slots=True)
class ResultKey:
    """A document's result, by run and number."""

    run_id: int
    document_no: int


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer that was paid for and is not (yet) a result: rejected, or its lane lost the lease."""

    content: str
    answer: dict[str, Any] | None = None
    confidence: float | None = None
    confidence_signal: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """A document's terminal row."""

    document_no: int
    document_id: str
    lease: Lease
    state: DocumentState
    text_digest: bytes | None = None
    reason: str | None = None
    tier: str | None = None
    attempt_no: int | None = None
    answer: dict[str, Any] | None = None
    confidence: float | None = None
    confidence_signal: str | None = None
    of: ResultKey | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A first answer that waits for its run's certificate: of the document's own attempt, or an earlier result."""

    document_no: int
    lease: Lease
    confidence: float | None
    attempt_no: int | None = None
    of: ResultKey | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt came to. `cost` is None while unknown, and then `bound` is the most it can be."""

    document_no: int
    attempt_no: int
    reply: Reply
    verdict: Verdict | None
    price_id: int | None
    cost: int | None
    bound: int | None
    is_escalated: bool = False
    answer: StoredAnswer | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What becomes durable together for one document: an attempt's outcome, and its ending or that it waits."""

    outcome: Outcome | None = None
    ending: Ending | None = None
    held: Held | None = None

    @property
    def lease(self) -> Lease | None:
        """What the shard has to be held by for all of it to be kept; None: an outcome is a fact without."""
        return self.ending.lease if self.ending else self.held.lease if self.held else None
