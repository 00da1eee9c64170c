"""What an attempt says: the same prefix first, the text whole, what a repair adds after both; and its bound."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.tokens import load
from schemas.answers import Answer
from schemas.attempts import RunId
from schemas.calls import RejectedAnswer, attempt_key, compose, input_bound, is_too_large, max_tokens
from schemas.jobs import TIERS, Input, Job
from schemas.ladder import Position, Verdict
from schemas.money import Money

JOB = Job(
    name="colours",
    folder=Path("jobs/colours"),
    input=Input(path="x.parquet", id="id", text="text"),
    prompt="Say the colour, in JSON.",
    answer=Answer.from_schema("colour", {"type": "object", "properties": {"colour": {"type": "string"}}}),
    ladder=(TIERS["flash"], TIERS["pro"]),
    budget=Money.parse("1 USD"),
    concurrency={"flash": 1, "pro": 1},
    tolerance=Decimal(0),
)
REJECTED = RejectedAnswer('{"color": 1}', ("colour: field required",))


def said(position: Position, rejected: RejectedAnswer | None = None) -> list[tuple[str, str]]:
    call = compose(JOB, "a red rose", position, rejected, "1.2.3")
    return [(message.role, message.content) for message in call.messages]


@pytest.mark.parametrize("amends", [None, *Verdict])
def test_whatever_an_attempt_amends_it_begins_with_the_same_prefix_and_text(amends: Verdict | None) -> None:
    assert said(Position(amends=amends), REJECTED)[:2] == [("system", JOB.prefix), ("user", "a red rose")]


def test_a_repair_shows_the_answer_and_its_problems_after_the_document() -> None:
    *_, (role, answer), (asker, problems) = said(Position(amends=Verdict.INVALID_ANSWER), REJECTED)
    assert (role, answer) == ("assistant", '{"color": 1}')
    assert asker == "user"
    assert "colour: field required" in problems


def test_a_truncated_answer_gets_more_tokens_and_the_bound_knows() -> None:
    position = Position(amends=Verdict.TRUNCATED)
    call = compose(JOB, "x", position, None, "1.1.2")
    assert call.parameters["max_tokens"] == max_tokens(JOB, position) == 2 * TIERS["flash"].max_tokens


def test_the_upper_tier_is_another_model_with_its_own_parameters() -> None:
    call = compose(JOB, "x", Position(rung=1), None, "1.1.2")
    assert call.model == TIERS["pro"].model
    assert call.deadline_s == TIERS["pro"].deadline_s


@settings(deadline=None)  # the first example loads the tokenizer
@given(st.text(max_size=300))
def test_no_tokenizer_output_is_longer_than_the_bound(text: str) -> None:
    call = compose(JOB, text, Position(amends=Verdict.INVALID_ANSWER), REJECTED, "1.1.1")
    tokenizer = load()
    tokens = sum(len(tokenizer.encode(m.content, add_special_tokens=False).ids) for m in call.messages)
    assert tokens + 4 * len(call.messages) <= input_bound(call)


def test_only_what_cannot_fit_the_context_is_too_large() -> None:
    assert not is_too_large(JOB, "word " * 900_000)
    assert is_too_large(JOB, "x" * 8_000_001)
    assert is_too_large(replace(JOB), "☃" * 2_700_000)


def test_an_attempt_key_names_its_ledger_row() -> None:
    assert attempt_key(RunId(7), 12, 3) == "7.12.3"
