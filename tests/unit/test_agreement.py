"""When two answers say the same: what is normalised, what never is, and how a job says which."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas.agreement import Match, Rule, Tolerance, agree, default_match, fold, parse_match
from schemas.answers import Answer
from schemas.errors import ConfigurationError
from schemas.jobs import Confidence, find_agreement
from tasks.jobs import load_job

CENT = Tolerance(Decimal("0.01"))

JOB = """\
name: bills
input: {path: data/*.parquet, id: id, text: text}
answer: answer.py:Bill
ladder: [flash, pro]
confidence: {field: surety}
budget: 5 USD
"""
BILL = """\
from datetime import date
from decimal import Decimal
from enum import StrEnum
from pydantic import BaseModel

class Kind(StrEnum):
    BILL = "bill"

class Bill(BaseModel):
    kind: Kind
    paid: bool
    pages: int
    amount: float
    tax: Decimal | None
    due: date
    name: str
    tags: list[str]
    notes: str | None
    surety: float
"""
COMPARED = ("kind", "paid", "pages", "amount", "tax", "due", "name", "tags", "notes")


def write_bills(root: Path, lines: str = "") -> None:
    folder = root / "jobs" / "bills"
    folder.mkdir(parents=True)
    for name, text in {"job.yaml": JOB + lines, "prompt.md": "Read it. JSON.", "answer.py": BILL}.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("match", "one", "other"),
    [
        (Rule.EXACT, 1, 1.0),
        (Rule.EXACT, {"a": 1, "b": [True]}, {"b": [True], "a": 1.0, "c": None}),
        (CENT, 0.1, 0.11),  # as floats they are 0.009999… apart, or more
        (CENT, 1.1, 1.11),
        (CENT, "12.50", 12.5),
        (CENT, None, None),
        (CENT, "n/a", "n/a"),
        (Rule.DATE, "2026-11-30", "30 November 2026"),
        (Rule.DATE, "2026-11-30", "Nov. 30th, 2026"),
        (Rule.DATE, "2026/11/30", "30.11.2026"),
        (Rule.DATE, "2026-11-30T00:00:00Z", "20261130"),
        (Rule.DATE, "2026-11-30T01:00:00+01:00", "2026-11-30"),
        (Rule.DATE, "Soon.", "soon"),
        (Rule.TEXT, "ACME  Ltd.", "acme ltd"),
        (Rule.TEXT, "ﬁve e-mails", "FIVE e‑mails"),  # a ligature and a hyphen that does not break
        (Rule.TEXT, "Straße", "STRASSE"),
        (Rule.TEXT, "it’s “here”", "its here"),
        (Rule.SET, ["b", "A ", "a"], ["a", "b."]),
        (Rule.SET, [{"k": "X", "n": [1, 2]}], [{"n": [2, 1.0], "k": "x"}]),
        (Rule.IGNORE, "this", {"or": "that"}),
    ],
)
def test_these_say_the_same(match: Match, one: object, other: object) -> None:
    assert agree(match, one, other)
    assert agree(match, other, one)


@pytest.mark.parametrize(
    ("match", "one", "other"),
    [
        (Rule.EXACT, 1, True),
        (Rule.EXACT, 1, "1"),
        (Rule.EXACT, "a", "A"),
        (Rule.EXACT, [1, 2], [2, 1]),
        (Rule.EXACT, {"a": 1}, [["a", 1]]),
        (CENT, 0.1, 0.1100001),
        (CENT, "1e999999", "1e999998"),
        (CENT, 1, True),
        (CENT, 1, None),
        (CENT, "nan", 1),
        (Rule.DATE, "2026-11-30", "2026-12-01"),
        (Rule.DATE, "11/12/2026", "12/11/2026"),
        (Rule.DATE, "11/12/2026", "2026-11-12"),  # it may be December
        (Rule.DATE, "0001-01-01T00:00:00+14:00", "0001-01-01"),
        (Rule.TEXT, "1.5", "15"),
        (Rule.TEXT, "-5", "5"),
        (Rule.TEXT, "5 %", "5"),
        (Rule.TEXT, "C#", "C"),
        (Rule.TEXT, "New York", "Newyork"),
        (Rule.TEXT, "", None),
        (Rule.TEXT, "A-", "A"),
        (Rule.TEXT, "5-", "5"),
        (Rule.TEXT, "- 5 EUR", "5 EUR"),
        (Rule.TEXT, "10²", "102"),
        (Rule.SET, ["BBB-"], ["BBB"]),
        (Rule.SET, {}, []),
        (Rule.SET, ["a"], ["a", "b"]),
        (Rule.SET, ["a"], "a"),
        (Rule.SET, {"a": "x"}, {"b": "x"}),
    ],
)
def test_these_do_not(match: Match, one: object, other: object) -> None:
    assert not agree(match, one, other)
    assert not agree(match, other, one)


def test_a_list_of_a_few_values_is_a_set_unless_two_of_them_fold_into_one() -> None:
    def of(*values: str) -> dict[str, object]:
        return {"type": "array", "items": {"$ref": "#/$defs/few"}, "$defs": {"few": {"enum": list(values)}}}

    assert default_match(of("A", "B"), of("A", "B")) is Rule.SET
    assert default_match(of("Pro", "pro"), of("Pro", "pro")) is Rule.EXACT


@given(st.text())
@example("C.\u0327")
@example("a.-b")
def test_what_is_folded_stays_so(text: str) -> None:
    assert fold(fold(text)) == fold(text)


def test_a_job_compares_by_its_schema_all_but_the_self_report(tmp_path: Path) -> None:
    write_bills(tmp_path)
    assert load_job("bills", tmp_path).agreement.rules == (
        ("amount", Rule.EXACT),
        ("due", Rule.DATE),
        ("kind", Rule.EXACT),
        ("name", Rule.TEXT),
        ("notes", Rule.TEXT),
        ("pages", Rule.EXACT),
        ("paid", Rule.EXACT),
        ("tags", Rule.SET),
        ("tax", Tolerance(Decimal(0))),
    )


def test_what_a_job_says_of_a_field_holds(tmp_path: Path) -> None:
    write_bills(tmp_path, "match: {amount: {tolerance: 0.01}, notes: ignore, surety: exact, name: exact}\n")
    agreement = load_job("bills", tmp_path).agreement
    rules = dict(agreement.rules)
    assert (rules["amount"], rules["name"], rules["surety"]) == (CENT, Rule.EXACT, Rule.EXACT)
    assert "notes" not in agreement.fields
    first: dict[str, Any] = {"kind": "bill", "amount": 10.0, "name": "Acme", "tax": "1.0", "notes": "a"}
    last = first | {"amount": 10.01, "tax": "1.00", "notes": "b", "surety": 0.5, "name": "ACME"}
    assert agreement.differing(first, last) == ("name", "surety")
    assert agreement.differing(first, first) == ()
    assert agreement.differing(None, last) == agreement.differing(first, None) == agreement.fields


def test_fields_whose_confidence_counts_are_those_that_are_compared_and_one_may_be_added() -> None:
    class Bill(BaseModel):
        name: str
        tags: list[str]
        notes: str

    answer, confidence = Answer.from_model(Bill), Confidence(fields=("tags.0",))
    assert find_agreement(answer, confidence, {}).fields == ("tags",)
    assert find_agreement(answer, confidence, {"notes": Rule.TEXT}).fields == ("notes", "tags")


def test_a_field_s_default_follows_references_and_unions() -> None:
    class Kind(StrEnum):
        BILL = "bill"

    class Line(BaseModel):
        text: str

    class Bill(BaseModel):
        kind: Kind | None
        line: Line
        number: int | None
        anything: Any

    schema = Bill.model_json_schema()
    found = {name: default_match(field, schema) for name, field in schema["properties"].items()}
    assert found == {"kind": Rule.EXACT, "line": Rule.SET, "number": Rule.EXACT, "anything": Rule.SET}
    old = {"definitions": {"K": {"enum": ["x"]}}}
    assert default_match({"$ref": "#/definitions/K"}, old) is Rule.EXACT
    assert default_match({"$ref": "#/nowhere"}, old) is default_match(True, old) is Rule.SET


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("match: {nmae: text}", "job.yaml:7: match.nmae: the answer has no field 'nmae'; did you mean name?"),
        ("match:\n  name: same", "job.yaml:8: match.name: 'same' is no way to compare two values; write exact, date"),
        ("match: {amount: {tolerance: much}}", "job.yaml:7: match.amount: 'much' is no tolerance; write by how"),
        ("match: {amount: {tolerance: -1}}", "job.yaml:7: match.amount: '-1' is no tolerance"),
        ("match: {amount: {tolerance: 1, of: 2}}", "job.yaml:7: match.amount: {'tolerance': '1', 'of': '2'} is no"),
        ("match: {pages: date}", "job.yaml:7: match.pages: `date` does not compare values of type integer; write ex"),
        ("match: {tags: {tolerance: 1}}", "job.yaml:7: match.tags: `{tolerance: 1}` does not compare values of type"),
        ("match: {name: set}", "job.yaml:7: match.name: `set` does not compare values of type string; write text"),
        ("match: text", "job.yaml:7: match: must be a mapping"),
        (f"match: {{{', '.join(f'{name}: ignore' for name in COMPARED)}}}", "job.yaml:7: match: ignores every field"),
    ],
)
def test_a_rule_that_says_nothing_is_refused_on_its_line(tmp_path: Path, line: str, expected: str) -> None:
    write_bills(tmp_path, line + "\n")
    with pytest.raises(ConfigurationError) as caught:
        load_job("bills", tmp_path)
    found = [str(problem).removeprefix("jobs/bills/") for problem in caught.value.problems]
    assert any(problem.startswith(expected) for problem in found), found


def test_a_rule_is_read_as_it_is_spelled() -> None:
    for match in (*Rule, CENT):
        said: object = {"tolerance": match.most} if isinstance(match, Tolerance) else match.value
        assert parse_match(said) == match
