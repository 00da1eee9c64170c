"""When two answers say the same: alone responsible for that, field by field (design: cascade.md, "Agreement").

A difference that means nothing costs an escalation, so what may be normalised is; a difference that means something
and is overlooked breaks a promise. So in doubt answers differ: punctuation before a digit belongs to a number and
counts, a dash counts unless it joins two words, and numbers are compared by the decimals that JSON's parser shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import partial
from typing import Any, TypeAlias
from unicodedata import category, decomposition, normalize

#: English, as models write where nobody says otherwise.
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
_DAY_FIRST = re.compile(r"(?P<day>\d{1,2})(?:st|nd|rd|th)?[\s.-]+(?P<month>[a-z]{3,9})\.?,?[\s-]+(?P<year>\d{4})")
_MONTH_FIRST = re.compile(r"(?P<month>[a-z]{3,9})\.?\s+(?P<day>\d{1,2})(?:st|nd|rd|th)?,?\s+(?P<year>\d{4})")
_BY_DOTS = re.compile(r"(?P<day>\d{1,2})\.\s?(?P<month>\d{1,2})\.\s?(?P<year>\d{4})")
_BY_SLASHES = re.compile(r"(?P<year>\d{4})/(?P<month>\d{1,2})/(?P<day>\d{1,2})")
#: Punctuation that a word loses, and that which is as good as a letter; all other parts words.
_LOST, _MEANT = ".'’", "%‰&@#*/\\§"
#: A dash between two letters.
_JOINING = re.compile(r"(?<=[^\W\d_])-+(?=[^\W\d_])")
#: References that are followed, one behind another.
_DEEPEST = 20
#: What is beyond 10 to this power, or below its inverse, is no number that anybody compares.
_LARGEST = 400


class Rule(StrEnum):
    """How two values of a field are compared."""

    EXACT = "exact"
    DATE = "date"
    TEXT = "text"
    SET = "set"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Two numbers agree that differ by this much at most."""

    most: Decimal

    def __str__(self) -> str:
        return f"{{tolerance: {self.most}}}"


Match: TypeAlias = Rule | Tolerance

_CHOICE = f"{', '.join(rule.value for rule in Rule)} or {{tolerance: 0.01}}"
#: Which JSON types a rule can say something about. The others compare anything.
_COMPARES: Mapping[Rule | type[Tolerance], frozenset[str]] = {
    Rule.DATE: frozenset({"string"}),
    Rule.SET: frozenset({"array", "object"}),
    Tolerance: frozenset({"number", "integer", "string"}),
}


def parse_match(given: object) -> Match:
    """A rule as a job file writes it. Raises ValueError with what to write instead."""
    if isinstance(given, Rule | Tolerance):
        return given
    if isinstance(given, dict) and list(given) == ["tolerance"]:
        return Tolerance(_parse_tolerance(given["tolerance"]))
    if isinstance(given, str) and given in list(Rule):
        return Rule(given)
    raise ValueError(f"{given!r} is no way to compare two values; write {_CHOICE}")


def _parse_tolerance(given: object) -> Decimal:
    try:
        most = Decimal(str(given))
    except InvalidOperation:
        most = Decimal(-1)
    if not (most.is_finite() and most >= 0):
        raise ValueError(f"{given!r} is no tolerance; write by how much two numbers may differ, like 0.01")
    return most


def default_match(field: object, schema: Mapping[str, Any]) -> Match:
    """How values of a field are compared where the job does not say, by its part of an answer's JSON Schema.

    What can only be one of a few values, and numbers, exactly, but 1.0 is 1; numbers that may be text by their value;
    dates as dates; other text as text; lists, and objects with all that is in them, as sets, unless
    two of a few values that they may have would be one there.
    """
    parts = list(_alternatives(field, schema))
    if any("enum" in part or "const" in part for part in parts):
        return Rule.EXACT
    kinds = {kind for part in parts for kind in _kinds(part)}
    if kinds & _COMPARES[Rule.SET] or not kinds:
        return Rule.EXACT if any(_folds_two(part, schema) for part in parts) else Rule.SET
    if "string" not in kinds:
        return Rule.EXACT
    if "number" in kinds:  # how pydantic has a Decimal
        return Tolerance(Decimal(0))
    is_date = all(part.get("format") in ("date", "date-time") for part in parts if "string" in _kinds(part))
    return Rule.DATE if is_date else Rule.TEXT


def _folds_two(part: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether a list's items can be one of a few values, of which two would be one to a set."""
    few = [each for item in _alternatives(part.get("items"), schema) for each in item.get("enum", ())]
    return len({_normal(each, fold, tuple) for each in few}) < len(few)


def refusal(match: Match, field: object, schema: Mapping[str, Any]) -> str | None:
    """Why a rule says nothing about values of a field, and what to write instead; None: it does."""
    kinds = {kind for part in _alternatives(field, schema) for kind in _kinds(part)}
    compares = _COMPARES.get(Tolerance if isinstance(match, Tolerance) else match)
    if compares is None or not kinds or kinds & compares:
        return None
    return (
        f"`{match}` does not compare values of type {' or '.join(sorted(kinds))}; "
        f"write {default_match(field, schema)}, or leave it out"
    )


def _alternatives(field: object, schema: Mapping[str, Any], left: int = _DEEPEST) -> Iterator[Mapping[str, Any]]:
    """What a value may be, references and unions resolved, null left out."""
    if not isinstance(field, Mapping):  # true: anything
        return
    several = [inner for name in ("anyOf", "oneOf", "allOf") for inner in field.get(name, ())]
    several += [_follow(field["$ref"], schema)] if "$ref" in field else []
    if left and several:
        for inner in several:
            yield from _alternatives(inner, schema, left - 1)
    elif field.get("type") != "null":
        yield field


def _follow(reference: str, schema: object) -> object:
    """The part of the schema that `#/$defs/Name` means; None where it means none."""
    for name in reference.split("/")[1:]:
        schema = schema.get(name) if isinstance(schema, Mapping) else None
    return schema


def _kinds(part: Mapping[str, Any]) -> set[str]:
    """Its JSON types but null; none where it does not say."""
    named = part.get("type", [])
    return set([named] if isinstance(named, str) else named) - {"null"}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Which fields of a job's answers are compared, and how. A promise is about all of these fields together."""

    rules: tuple[tuple[str, Match], ...]

    @classmethod
    def of(
        cls,
        properties: Mapping[str, object],
        schema: Mapping[str, Any],
        said: Mapping[str, Match],
        counted: Iterable[str],
    ) -> Agreement:
        """By an answer's JSON Schema: every field of which a rule is `said`, and by their defaults the `counted`."""
        rules = {name: default_match(properties.get(name), schema) for name in counted} | dict(said)
        return cls(tuple((name, rule) for name, rule in sorted(rules.items()) if rule is not Rule.IGNORE))

    @classmethod
    def from_json(cls, rules: Mapping[str, object]) -> Agreement:
        """As `to_json` wrote it."""
        return cls(tuple((name, parse_match(rule)) for name, rule in sorted(rules.items())))

    def to_json(self) -> dict[str, Any]:
        """The rules by field, as a job file writes them: what a certificate of a run rests on."""
        return {
            name: {"tolerance": str(rule.most)} if isinstance(rule, Tolerance) else rule.value
            for name, rule in self.rules
        }

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are compared: those that a promise covers, sorted."""
        return tuple(name for name, _ in self.rules)

    def differing(self, first: Mapping[str, Any] | None, last: Mapping[str, Any] | None) -> tuple[str, ...]:
        """The fields on which two parsed answers differ, sorted; all where one of them is missing.

        A field that an answer leaves out is as good as null.
        """
        if first is None or last is None:
            return self.fields
        return tuple(name for name, rule in self.rules if not agree(rule, first.get(name), last.get(name)))


def agree(match: Match, one: object, other: object) -> bool:
    """Whether two JSON values of one field say the same."""
    match match:
        case Tolerance(most):
            return _is_within(most, one, other)
        case Rule.IGNORE:
            return True
    key = _KEYS[match]
    return key(one) == key(other)


def _is_within(most: Decimal, one: object, other: object) -> bool:
    first, second = _number(one), _number(other)
    if first is None or second is None:
        return _exactly(one) == _exactly(other)
    return abs(first - second) <= most


def _number(value: object) -> Decimal | None:
    """A number as it was written, in digits or in text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return found if found.is_finite() and abs(found.adjusted()) <= _LARGEST else None


def _normal(value: object, spell: Callable[[str], str], gather: Callable[[list[Hashable]], Hashable]) -> Hashable:
    """A JSON value as something that equals whatever says the same: 1 and 1.0, but never 1 and true."""
    match value:
        case dict():
            entries = ((name, _normal(inner, spell, gather)) for name, inner in value.items() if inner is not None)
            return ("object", frozenset(entries))
        case list():
            return gather([_normal(inner, spell, gather) for inner in value])
        case str():
            return spell(value)
        case bool():
            return ("bool", value)
        case int() | float():
            return ("number", Decimal(str(value)))
    return None


def fold(text: str) -> str:
    """A text without what rarely means anything: NFKC, case, punctuation and spaces.

    What stands before a digit stays: it may be a sign or a decimal point. So does a dash that joins no two words, as
    in A-, and a power stays one.
    """
    plain = normalize("NFKC", normalize("NFKC", "".join(map(_lift, text))).casefold())
    kept = "".join(_soften(plain[at], plain[at + 1 : at + 2]) for at in range(len(plain)))
    composed = normalize("NFKC", kept)  # an accent may have lost what kept it from its letter
    return " ".join(_JOINING.sub(" ", composed).split())


def _lift(character: str) -> str:
    """NFKC makes an ordinary digit of a raised or lowered one."""
    return f"^{character}" if decomposition(character).startswith(("<super>", "<sub>")) else character


def _soften(character: str, following: str) -> str:
    if category(character) == "Pd":
        return "-"
    if not category(character).startswith("P") or following.isdigit() or character in _MEANT:
        return character
    return "" if character in _LOST else " "


def _dated(value: object) -> Hashable:
    """The instant of a date or a time, a date being its first and one without a zone in UTC; else as text."""
    instant = _parse_date(value) if isinstance(value, str) else None
    return instant or _normal(value, fold, tuple)


def _parse_date(text: str) -> datetime | None:
    """None also where it could be read in two ways, like 11/12/2026."""
    said = " ".join(text.split()).casefold()
    try:
        found = datetime.fromisoformat(said.upper())
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except ValueError:
        return _parse_written_date(said)
    except OverflowError:  # of the first or the last day that there is, in another zone
        return None


def _parse_written_date(said: str) -> datetime | None:
    for form in (_DAY_FIRST, _MONTH_FIRST, _BY_DOTS, _BY_SLASHES):
        if found := form.fullmatch(said):
            month = _month(found["month"])
            try:
                return datetime(int(found["year"]), month, int(found["day"]), tzinfo=UTC)
            except ValueError:
                return None
    return None


def _month(said: str) -> int:
    """Its number; 0, which is none, for a word that is no month."""
    if said.isdigit():
        return int(said)
    found = [number for number, name in enumerate(_MONTHS, 1) if said in (name, name[:3], name[:4])]
    return found[0] if found else 0


_exactly = partial(_normal, spell=str, gather=tuple)
_KEYS: Mapping[Rule, Callable[[object], Hashable]] = {
    Rule.EXACT: _exactly,
    Rule.DATE: _dated,
    Rule.TEXT: partial(_normal, spell=fold, gather=tuple),
    Rule.SET: partial(_normal, spell=fold, gather=frozenset),
}
