"""Replies: which ones are answers, what is stored of them, and what a repair tells the model."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from schemas.answers import LONGEST_PROBLEM, MOST_PROBLEMS, Answer, AnswerRejected

TEXT = "Copies must retain\n  this notice."


class Topic(StrEnum):
    DELIVERY = "delivery"
    PAYMENT = "payment"


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    topic: Topic
    quote: str = ""
    score: float = 0

    @field_validator("quote")
    @classmethod
    def _occurs(cls, quote: str, info: ValidationInfo) -> str:
        assert info.context is not None
        if " ".join(quote.split()) not in " ".join(info.context["text"].split()):
            raise ValueError("the quote does not occur in the document")
        if quote == "Copies":
            raise KeyError(quote)
        return quote


MODEL = Answer.from_model(Ticket)
SCHEMA = Answer.from_schema(
    "ticket",
    {
        "type": "object",
        "properties": {
            "topic": {"enum": ["delivery", "payment"]},
            "day": {"type": "string", "format": "date"},
            "score": {"type": "number"},
        },
        "required": ["topic"],
        "additionalProperties": False,
    },
)
BOTH = pytest.mark.parametrize("answer", [MODEL, SCHEMA], ids=["model", "schema"])


def problems_of(answer: Answer, reply: str) -> tuple[str, ...]:
    with pytest.raises(AnswerRejected) as caught:
        answer.check(reply, "d1", TEXT)
    return caught.value.problems


@BOTH
@pytest.mark.parametrize(
    "reply",
    [
        '{"topic": "payment", "score": 0}',
        '  {"topic": "payment", "score": 0}\n\n',
        '```json\n{"topic": "payment", "score": 0}\n```',
        '```\n{"topic": "payment", "score": 0}\n```\n',
        '```JSON {"topic": "payment", "score": 0}```',
        '{"topic": "delivery", "topic": "payment", "score": 0}',
    ],
)
def test_an_object_is_an_answer_bare_or_in_a_fence(answer: Answer, reply: str) -> None:
    found = answer.check(reply, "d1", TEXT)
    assert (found["topic"], found["score"]) == ("payment", 0)
    assert type(found["topic"]) is str


@BOTH
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", "the reply was blank"),
        (" \n\t ", "the reply was blank"),
        ("```json\n```", "the reply was blank"),
        ("Sure! Here it is", "not valid JSON"),
        ('{"topic": "payment"', "not valid JSON"),
        ('{"topic": "payment"} and more', "not valid JSON"),
        ('{"topic": "payment", "score": NaN}', "not valid JSON"),
        ('{"topic": "payment", "score": -Infinity}', "not valid JSON"),
        ('{"topic": "payment", "score": 1e999}', "not valid JSON"),
        ('["payment"]', "the JSON must be one object"),
        ("null", "the JSON must be one object"),
        ('{"a":' * 150 + "1" + "}" * 150, "the JSON is nested more than 100 deep"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_rejected_with_what_to_send(answer: Answer, reply: str, expected: str) -> None:
    (problem,) = problems_of(answer, reply)
    assert problem.startswith(expected)


@BOTH
def test_a_wrong_value_names_the_field_and_the_choice(answer: Answer) -> None:
    (problem,) = problems_of(answer, '{"topic": "weather"}')
    assert problem.startswith("topic: ")
    assert "delivery" in problem
    assert "weather" not in problem


@BOTH
def test_a_missing_and_a_surplus_field_are_both_reported(answer: Answer) -> None:
    found = " ".join(problems_of(answer, '{"other": 1}'))
    assert "topic" in found
    assert "other" in found or "additionalProperties" in found


def test_a_schema_checks_formats() -> None:
    assert problems_of(SCHEMA, '{"topic": "payment", "day": "soon"}') == ('day: must fit {"format":"date"}',)


def test_a_model_may_ground_a_quote_in_the_text() -> None:
    assert MODEL.check('{"topic": "payment", "quote": "must retain this"}', "d1", TEXT)["quote"] == "must retain this"
    found = problems_of(MODEL, '{"topic": "payment", "quote": "must keep this"}')
    assert found == ("quote: the quote does not occur in the document",)


def test_a_validator_that_breaks_costs_the_answer_and_not_the_lane() -> None:
    found = problems_of(MODEL, '{"topic": "payment", "quote": "Copies"}')
    assert found == ("the answer could not be checked (KeyError)",)


def test_defaults_are_part_of_the_stored_answer() -> None:
    assert MODEL.check('{"topic": "payment"}', "d1", TEXT) == {"topic": "payment", "quote": "", "score": 0}


class Free(BaseModel):
    said: str


@pytest.mark.parametrize(
    ("reply", "stored"),
    [
        (r'{"said": "a\u0000b"}', "a\ufffdb"),
        (r'{"said": "a\ud800b"}', "a\ufffdb"),
        (r'{"said": "\udc00\ud83d\ude00"}', "\ufffd\U0001f600"),
        (r'{"said": "\ud83d\ud83d\ude00"}', "\ufffd\U0001f600"),
        (r'{"said": "\\u0000"}', r"\u0000"),
        (r'{"said": "\\\u0000"}', "\\\ufffd"),
        ('{"said": "a\ud800b"}', "a\ufffdb"),
    ],
)
def test_what_postgres_refuses_is_replaced(reply: str, stored: str) -> None:
    assert Answer.from_model(Free).check(reply, "d1", "") == {"said": stored}
    schema = Answer.from_schema("free", {"type": "object"})
    assert schema.check(reply, "d1", "") == {"said": stored}
    json.dumps(stored, ensure_ascii=False).encode()


class Many(BaseModel):
    rows: list[Annotated[int, Field(json_schema_extra={"note": "x" * 500})]]


def test_a_repair_stays_short_however_wrong_the_answer_is() -> None:
    found = problems_of(Answer.from_model(Many), json.dumps({"rows": ["x"] * 50}))
    assert len(found) == MOST_PROBLEMS
    wide = Answer.from_schema("wide", {"type": "object", "properties": {"a": {"enum": ["x" * 500]}}})
    (problem,) = problems_of(wide, '{"a": 1}')
    assert len(problem) == LONGEST_PROBLEM


def test_a_problem_never_repeats_what_was_said() -> None:
    secret = "the document said this"
    found = problems_of(SCHEMA, json.dumps({"topic": secret, "score": secret, "day": secret}))
    assert not any(secret in problem for problem in found)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ([], "one JSON object"),
        ({"type": "array"}, '"type": "object" at the top'),
        ({}, '"type": "object" at the top'),
        ({"type": "objekt"}, "not a valid JSON Schema"),
        ({"type": "object", "properties": {"a": {"$ref": "https://example.org/a.json"}}}, "points outside the file"),
        ({"type": "object", "properties": {"a": {"$ref": "other.json"}}}, "points outside the file"),
    ],
)
def test_a_schema_that_cannot_be_relied_on_is_refused(schema: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Answer.from_schema("x", schema)


class Tree(BaseModel):
    value: int
    below: list[Tree] = []


def test_a_model_may_refer_to_itself() -> None:
    tree = Answer.from_model(Tree)
    assert tree.fields == ("below", "value")
    assert tree.check('{"value": 1, "below": [{"value": 2}]}', "d1", "")["below"][0]["value"] == 2


def test_the_schema_text_is_canonical() -> None:
    assert MODEL.schema_json == json.dumps(json.loads(MODEL.schema_json), sort_keys=True, separators=(",", ":"))
