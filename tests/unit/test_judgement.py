"""Judging replies: valid, sure enough, and what happens where neither is so."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from schemas.answers import Answer
from schemas.attempts import Reply, Signal, Token
from schemas.documents import Document
from schemas.jobs import TIERS, Confidence, Escalate, Input, Job
from schemas.judgement import judge
from schemas.ladder import Verdict
from schemas.money import Money

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"], "type": "string"}},
    "required": ["colour"],
}
JOB = Job(
    name="colours",
    folder=Path("jobs/colours"),
    input=Input(path="x.parquet", id="id", text="text"),
    prompt="Say the colour, in JSON.",
    answer=Answer.from_schema("colour", SCHEMA),
    ladder=(TIERS["flash"], TIERS["pro"]),
    budget=Money.parse("1 USD"),
    concurrency={"flash": 1, "pro": 1},
    escalate=Escalate(below=Decimal("0.85")),
    confidence=Confidence(fields=("colour",)),
)
DOCUMENT = Document(1, "d1", "a red rose")


def answered(probability: float, content: str = '{"colour":"red"}') -> Reply:
    """A reply whose value token has this probability and whose other tokens are certain."""
    tokens = (Token('{"colour":"', 0.0), Token("red", math.log(probability)), Token('"}', 0.0))
    return Reply(Signal.ANSWERED, NOW, NOW, 200, content=content, tokens=tokens)


def test_a_sure_answer_is_accepted_with_its_confidence() -> None:
    judged = judge(JOB, DOCUMENT, answered(0.9), rung=0)
    assert judged.verdict is Verdict.ACCEPTED
    assert judged.answer == {"colour": "red"}
    assert judged.measured is not None
    assert judged.measured.value == pytest.approx(0.9)


def test_an_unsure_answer_escalates_and_is_kept() -> None:
    judged = judge(JOB, DOCUMENT, answered(0.8), rung=0)
    assert (judged.verdict, judged.answer) == (Verdict.LOW_CONFIDENCE, {"colour": "red"})


def test_a_pilot_escalates_even_a_sure_answer_and_one_without_a_number_but_not_the_last_tier_s() -> None:
    pilot = replace(JOB, is_pilot=True)
    silent = Reply(Signal.ANSWERED, NOW, NOW, 200, content='{"colour":"red"}')
    for reply in (answered(0.99), answered(0.1), silent):
        judged = judge(pilot, DOCUMENT, reply, rung=0)
        assert (judged.verdict, judged.answer) == (Verdict.CALIBRATION, {"colour": "red"})
        assert judge(pilot, DOCUMENT, reply, rung=1).verdict is Verdict.ACCEPTED
    assert judge(pilot, DOCUMENT, answered(0.9, content="red"), rung=0).verdict is Verdict.INVALID_ANSWER


def test_where_a_run_keeps_a_promise_every_valid_first_answer_waits() -> None:
    job = replace(JOB, escalate=Escalate(target=Decimal("0.9"), delta=Decimal("0.05")))
    assert [judge(job, DOCUMENT, answered(sure), rung=0).verdict for sure in (0.1, 0.99)] == [Verdict.HELD] * 2
    assert judge(job, DOCUMENT, answered(0.1), rung=1).verdict is Verdict.ACCEPTED


def test_on_the_last_tier_an_unsure_answer_is_accepted() -> None:
    assert judge(JOB, DOCUMENT, answered(0.1), rung=1).verdict is Verdict.ACCEPTED


def test_an_answer_that_does_not_fit_is_invalid_on_every_tier_and_says_why() -> None:
    reply = Reply(Signal.ANSWERED, NOW, NOW, 200, content='{"colour":"mauve"}')
    for rung in (0, 1):
        judged = judge(JOB, DOCUMENT, reply, rung)
        assert judged.verdict is Verdict.INVALID_ANSWER
        assert judged.problems


def test_without_logprobs_or_a_field_a_valid_answer_is_never_low() -> None:
    reply = Reply(Signal.ANSWERED, NOW, NOW, 200, content='{"colour":"red"}')
    judged = judge(JOB, DOCUMENT, reply, rung=0)
    assert judged.verdict is Verdict.ACCEPTED
    assert judged.measured is not None
    assert judged.measured.value is None


@pytest.mark.parametrize(
    ("signal", "verdict"),
    [
        (Signal.BLANK, Verdict.BLANK),
        (Signal.TRUNCATED, Verdict.TRUNCATED),
        (Signal.LOST, None),
        (Signal.RATE_LIMITED, None),
    ],
)
def test_what_is_no_answer_gets_the_verdict_of_its_signal(signal: Signal, verdict: Verdict | None) -> None:
    judged = judge(JOB, DOCUMENT, Reply(signal, NOW, NOW), rung=0)
    assert (judged.verdict, judged.answer) == (verdict, None)
