"""Judging a reply: is it a valid answer, and is it sure enough to be accepted at this tier, or does it wait?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.answers import AnswerRejected
from schemas.attempts import Reply, Signal
from schemas.confidence import Measured, confidence
from schemas.documents import Document
from schemas.jobs import Job
from schemas.ladder import Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with what it rests on. `answer` is None where the text did not parse or did not validate."""

    verdict: Verdict | None
    answer: dict[str, Any] | None = None
    measured: Measured | None = None
    problems: tuple[str, ...] = ()


def judge(job: Job, document: Document, reply: Reply, rung: int) -> Judgement:
    """What `reply` is worth. The last tier's valid answer is accepted however unsure: nobody is above it."""
    match reply.signal:
        case Signal.BLANK:
            return Judgement(Verdict.BLANK)
        case Signal.TRUNCATED:
            return Judgement(Verdict.TRUNCATED)
        case Signal.ANSWERED:
            return _judge_answer(job, document, reply, rung)
        case _:
            return Judgement(None)


def _judge_answer(job: Job, document: Document, reply: Reply, rung: int) -> Judgement:
    content = reply.content or ""
    try:
        answer = job.answer.check(content, document.document_id, document.text)
    except AnswerRejected as rejection:
        return Judgement(Verdict.INVALID_ANSWER, problems=rejection.problems)
    measured = confidence(answer, content, reply.tokens, job.confidence)
    return Judgement(_weigh(job, measured, is_last=rung + 1 >= len(job.ladder)), answer, measured)


def _weigh(job: Job, measured: Measured, *, is_last: bool) -> Verdict:
    if is_last:
        return Verdict.ACCEPTED
    if job.is_pilot:
        return Verdict.CALIBRATION
    if job.escalate.below is None:
        return Verdict.HELD
    return Verdict.LOW_CONFIDENCE if measured.is_below(job.escalate.below) else Verdict.ACCEPTED
