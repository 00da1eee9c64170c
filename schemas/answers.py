"""Answers: alone responsible for whether a model's reply is an answer that may be stored.

An answer's shape is a pydantic model or a JSON Schema. Either way a reply must be one JSON object, bare or in one
Markdown code fence (models add one now and then, and it is harmless). NaN and Infinity are not JSON and are
refused; of a key given twice the last counts. Postgres stores neither NUL nor a lone surrogate, so they are
replaced by U+FFFD before anything else looks at the text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from jsonschema import SchemaError
from jsonschema import ValidationError as SchemaViolation
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails
from referencing.exceptions import Unresolvable

from schemas.errors import FarthingError

#: Bounds of what a repair tells the model, so that a repair's price stays predictable.
MOST_PROBLEMS = 10
LONGEST_PROBLEM = 200
#: Deeper JSON is refused: no real answer needs it, and every reader of it recurses.
DEEPEST = 100

_REFERENCES = ("$ref", "$dynamicRef")
_FENCED = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# An odd number of backslashes before the u makes it an escape; pairs of surrogates are one real character.
_ESCAPES = re.compile(r"\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_UNSTORABLE_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2})")

Checker = Callable[[str, str, str], dict[str, Any]]


class AnswerRejected(FarthingError):
    """A reply that is not an answer; each of `problems` is fit to be sent to the model in a repair.

    A problem names the place and the rule, and never repeats what the model or the document said (G15).
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_shorten(problem) for problem in problems[:MOST_PROBLEMS])
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Answer:
    """The shape of a job's answers: its name, its JSON Schema in canonical JSON, and the check of one reply."""

    name: str
    schema_json: str
    _check: Checker

    @classmethod
    def from_model(cls, model: type[BaseModel]) -> Answer:
        """An answer that `model` validates, with the context {"document_id", "text"} for its own validators.

        Raises ValueError if the model has no JSON Schema, or is not an object.
        """
        try:
            schema = model.model_json_schema()
        except PydanticUserError as error:
            raise ValueError(f"{model.__name__} has no JSON Schema: {error.message}") from None
        return cls(model.__name__, _canonical_object_schema(schema), _model_checker(model))

    @classmethod
    def from_schema(cls, name: str, schema: object) -> Answer:
        """An answer that fits a JSON Schema (2020-12 unless `$schema` says otherwise; `format` is checked).

        Raises ValueError if it is no valid schema, not of an object, or refers to another file.
        """
        if not isinstance(schema, dict):
            raise ValueError("a JSON Schema file holds one JSON object")
        if strangers := sorted({ref for ref in _references(schema) if not ref.startswith("#")}):
            raise ValueError(f"$ref {strangers[0]!r} points outside the file; copy what it means under $defs")
        if not isinstance(schema.get("$schema", ""), str):
            raise ValueError("$schema must be text; remove it, and the schema is read as 2020-12")
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"not a valid JSON Schema: {error.json_path}: {error.message}") from None
        validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
        _follow_references(validator, schema)
        return cls(name, _canonical_object_schema(schema), _schema_checker(validator))

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema, keys sorted: a fresh copy each time."""
        copy: dict[str, Any] = orjson.loads(self.schema_json)
        return copy

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the answer's top-level fields, sorted."""
        return tuple(self.properties)

    @property
    def properties(self) -> Mapping[str, Any]:
        """The JSON Schema of each top-level field, by its name, sorted."""
        found: Mapping[str, Any] = _object_schema(self.schema).get("properties", {})
        return found

    def check(self, text: str, document_id: str, document_text: str) -> dict[str, Any]:
        """The answer in `text`, as plain JSON values fit for Postgres. Raises AnswerRejected."""
        cleaned = _storable_json(text)
        _read_object(cleaned)
        return self._check(cleaned, document_id, document_text)


def canonical_json(value: object) -> str:
    """One text for one value: keys sorted, no spaces, characters as they are; NaN refused."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _model_checker(model: type[BaseModel]) -> Checker:
    def check(cleaned: str, document_id: str, document_text: str) -> dict[str, Any]:
        context = {"document_id": document_id, "text": document_text}
        try:
            return model.model_validate_json(cleaned, context=context).model_dump(mode="json", by_alias=True)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            raise AnswerRejected(*(_place(item["loc"]) + _rule(item) for item in problems)) from None
        except Exception as error:
            # A job's own validator broke on this one answer; that may cost the answer, never the lane.
            raise AnswerRejected(f"the answer could not be checked ({type(error).__name__})") from error

    return check


def _schema_checker(validator: Validator) -> Checker:
    def check(cleaned: str, document_id: str, document_text: str) -> dict[str, Any]:
        answer = _read_object(cleaned)
        violations = sorted(validator.iter_errors(answer), key=lambda violation: list(map(str, violation.path)))
        if violations:
            raise AnswerRejected(*map(_describe_violation, violations))
        return answer

    return check


def _rule(problem: ErrorDetails) -> str:
    """The broken rule in pydantic's words, or in those of the model's own validator."""
    if problem["type"].startswith("union_tag"):
        return "names none of the possible kinds"  # pydantic's message repeats the value
    return problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _describe_violation(violation: SchemaViolation) -> str:
    """The place and the rule; the library's own message would repeat the value, hence perhaps the document."""
    if violation.validator == "required":
        return f"{_place(tuple(violation.absolute_path))}{violation.message}"  # it names the missing key only
    rule = canonical_json({str(violation.validator): violation.validator_value})
    return f"{_place(tuple(violation.absolute_path))}must fit {rule}"


def _storable_json(text: str) -> str:
    """The JSON inside `text`, out of its fence, with what Postgres refuses replaced."""
    stripped = text.strip()
    if fenced := _FENCED.fullmatch(stripped):
        stripped = fenced[1].strip()
    if not stripped:
        raise AnswerRejected("the reply was blank; answer with one JSON object")
    return _ESCAPES.sub(_storable_escape, _UNSTORABLE.sub("\ufffd", stripped))


def _storable_escape(escape: re.Match[str]) -> str:
    return r"\ufffd" if _UNSTORABLE_ESCAPE.fullmatch(escape[0]) else escape[0]


def _read_object(cleaned: str) -> dict[str, Any]:
    try:
        value = orjson.loads(cleaned)
    except orjson.JSONDecodeError as error:
        raise AnswerRejected(f"not valid JSON: {error}; answer with one JSON object") from None
    if not isinstance(value, dict):
        raise AnswerRejected("the JSON must be one object, not a list or a bare value")
    _check_numbers_and_depth(value, DEEPEST)
    return value


def _check_numbers_and_depth(value: object, depth_left: int) -> None:
    if depth_left == 0:
        raise AnswerRejected(f"the JSON is nested more than {DEEPEST} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise AnswerRejected("the JSON holds a number that is too large")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_numbers_and_depth(inner, depth_left - 1)


def _canonical_object_schema(schema: Mapping[str, Any]) -> str:
    if _object_schema(schema).get("type") != "object":
        raise ValueError('the answer must be one JSON object: its schema needs "type": "object" at the top')
    return canonical_json(schema)


def _object_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The top-level schema itself; pydantic puts that of a self-referring model behind a `$ref`."""
    name, known = str(schema.get("$ref", "")).removeprefix("#/$defs/"), schema.get("$defs", {})
    found = known.get(name, schema) if isinstance(known, dict) else schema
    return found if isinstance(found, dict) else {}


def _follow_references(validator: Validator, schema: dict[str, Any]) -> None:
    """Raise ValueError for a `$ref` that leads nowhere or back to itself: else the first reply would, once paid."""
    for part in _referring_parts(schema):
        shown = next(repr(part[key]) for key in _REFERENCES if key in part)
        try:
            list(validator.evolve(schema=part).iter_errors(None))  # all of them, or it stops before it recurses
        except Unresolvable:
            raise ValueError(f"$ref {shown} leads nowhere; put what it means under $defs") from None
        except RecursionError:
            raise ValueError(f"$ref {shown} leads back to itself; say what it means") from None


def _references(schema: object) -> Iterator[str]:
    for part in _referring_parts(schema):
        yield from (part[key] for key in _REFERENCES if isinstance(part.get(key), str))


def _referring_parts(schema: object) -> Iterator[dict[str, Any]]:
    """Every part of the schema that refers to another."""
    if isinstance(schema, dict):
        if any(isinstance(schema.get(key), str) for key in _REFERENCES):
            yield schema
        for value in schema.values():
            yield from _referring_parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _referring_parts(value)


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(map(str, loc)) + ": " if loc else ""


def _shorten(problem: str) -> str:
    line = _UNSTORABLE.sub("\ufffd", " ".join(problem.split()))
    return line if len(line) <= LONGEST_PROBLEM else line[: LONGEST_PROBLEM - 1] + "…"
