"""Confidence is about the value's own tokens, however the provider cut the text into tokens."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.attempts import Token
from schemas.confidence import VERBAL, Measured, confidence, field_confidence, self_reported
from schemas.jobs import Confidence, ConfidenceSignal
from schemas.spans import leaf_spans

CONTENT = '{"category": "Free Restricted", "confidence": 0.85}'

KEYS = st.text("abcé_\"\\{}[]:, 'x", min_size=1, max_size=6)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
#: Hypothesis builds its tables of characters within the first example, on a machine that others use too.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANSWERS = st.dictionaries(KEYS, VALUES, max_size=5)


def cut(content: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(content) + 1) for place in places} | {0, len(content)})
    return [content[start:end] for start, end in pairwise(ends)]


def leaves_of(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path → value, by walking the parsed answer: the slow and obvious way."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found = {}
    for name, child in children:
        found |= leaves_of(child, f"{path}.{name}" if path else str(name))
    return found or {path: value}


def dumps(answer: Any, indent: int | None, ascii_only: bool) -> str:
    return json.dumps(answer, indent=indent, ensure_ascii=ascii_only)


@unhurried
@given(answer=ANSWERS, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_every_span_holds_exactly_its_value(answer: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    content = dumps(answer, indent, ascii_only)
    spans = leaf_spans(content)
    expected = leaves_of(answer)
    assert spans.keys() == expected.keys()
    for path, span in spans.items():
        text = content[span.start : span.end]
        value = expected[path]
        whole = f'"{text}"' if isinstance(value, str) and value else text
        assert json.loads(whole) == value


@unhurried
@given(
    answer=ANSWERS.filter(bool),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    places=st.lists(st.integers(0, 10_000), max_size=60),
    data=st.data(),
)
def test_the_tokens_that_count_are_those_that_touch_the_value(
    answer: dict[str, Any], indent: int | None, ascii_only: bool, places: list[int], data: st.DataObject
) -> None:
    content = dumps(answer, indent, ascii_only)
    path = data.draw(st.sampled_from(sorted(leaves_of(answer))))
    span = leaf_spans(content)[path]
    tokens, start, expected = [], 0, 0.0
    for number, text in enumerate(cut(content, places)):
        logprob = -0.001 * (number + 1)
        tokens.append(Token(text, logprob))
        is_touching = any(span.start <= place < span.end for place in range(start, start + len(text)))
        expected += logprob if is_touching else 0.0
        start += len(text)
    # A path with a dot in a key may name more than one leaf; then the whole is less probable than this one.
    is_alone = not any(other.startswith(f"{path}.") for other in leaves_of(answer))
    found = field_confidence(content, tokens, [path])
    assert found is not None
    assert not is_alone or found == pytest.approx(math.exp(expected))


def tokens_of(*pairs: tuple[str, float]) -> tuple[Token, ...]:
    return tuple(Token(text, logprob) for text, logprob in pairs)


TOKENS = tokens_of(
    ('{"', -9),
    ("category", -9),
    ('": "', -9),
    ("Free", -0.1),
    (" Restricted", -0.3),
    ('", "', -9),
    ("confidence", -9),
) + tokens_of(('":', -9), (" ", -9), ("0", -0.05), (".85", -0.5), ("}", -9))


def test_a_value_counts_by_its_own_tokens_only() -> None:
    assert field_confidence(CONTENT, TOKENS, ["category"]) == pytest.approx(math.exp(-0.4))


def test_several_fields_count_by_the_least_sure() -> None:
    assert field_confidence(CONTENT, TOKENS, ["category", "confidence"]) == pytest.approx(math.exp(-0.55))


def test_a_fence_around_the_answer_does_not_shift_it() -> None:
    fenced = f"```json\n{CONTENT}\n```"
    tokens = tokens_of(("```json\n", -9)) + TOKENS + tokens_of(("\n```", -9))
    assert field_confidence(fenced, tokens, ["category"]) == pytest.approx(math.exp(-0.4))


def test_a_nested_field_is_named_by_a_dotted_path_and_a_list_counts_whole() -> None:
    tokens = tokens_of(('{"a": {"b": "', -9), ("x", -0.2), ('"}, "c": [', -9), ("1", -0.3), (", ", -9), ("22", -0.4))
    tokens += tokens_of(("]}", -9))
    content = "".join(token.text for token in tokens)
    assert field_confidence(content, tokens, ["a.b"]) == pytest.approx(math.exp(-0.2))
    assert field_confidence(content, tokens, ["c"]) == pytest.approx(math.exp(-0.7))
    assert field_confidence(content, tokens, ["c.1"]) == pytest.approx(math.exp(-0.4))


def test_an_empty_value_counts_by_its_quotes_or_brackets() -> None:
    tokens = tokens_of(('{"a": ', -9), ('""', -0.2), (', "b": ', -9), ("[]", -0.3), ("}", -9))
    content = "".join(token.text for token in tokens)
    assert field_confidence(content, tokens, ["a"]) == pytest.approx(math.exp(-0.2))
    assert field_confidence(content, tokens, ["b"]) == pytest.approx(math.exp(-0.3))


def test_of_a_key_given_twice_the_last_counts() -> None:
    tokens = tokens_of(('{"a": {"b": ', -9), ("1", -1), ('}, "a": {"c": ', -9), ("2", -0.2), ("}}", -9))
    content = "".join(token.text for token in tokens)
    assert json.loads(content) == {"a": {"c": 2}}
    assert field_confidence(content, tokens, ["a"]) == pytest.approx(math.exp(-0.2))


@pytest.mark.parametrize(
    ("content", "tokens", "fields"),
    [
        (CONTENT, TOKENS, ["missing"]),
        (CONTENT, TOKENS, ["category", "missing"]),
        (CONTENT, TOKENS, ["category.inner"]),
        (CONTENT, TOKENS, []),
        (CONTENT, TOKENS[:-1], ["category"]),
        (CONTENT, (), ["category"]),
        ("", (), ["category"]),
        ("no JSON", tokens_of(("no JSON", -1)), ["category"]),
        ('{"category": ', tokens_of(('{"category": ', -1)), ["category"]),
        ('{"category" 1}', tokens_of(('{"category" 1}', -1)), ["category"]),
        ('{"category": [1 2]}', tokens_of(('{"category": [1 2]}', -1)), ["category"]),
        ('{"category": }', tokens_of(('{"category": }', -1)), ["category"]),
    ],
)
def test_what_cannot_be_aligned_has_no_confidence(content: str, tokens: tuple[Token, ...], fields: list[str]) -> None:
    assert field_confidence(content, tokens, fields) is None


def test_bottomless_json_is_not_followed() -> None:
    deep = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
    assert field_confidence(deep, tokens_of((deep, -1)), ["a"]) is None


@unhurried
@given(st.text('{}[]",:\\ax1 \n', max_size=40))
def test_text_that_is_no_json_never_breaks_the_scan(text: str) -> None:
    leaf_spans(text)
    leaf_spans("{" + text)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(word, number) for word, number in VERBAL.items()],
        ("Almost_Certain", 0.95),
        (0.85, 0.85),
        (0, 0.0),
        (1, 1.0),
        (95, None),
        (-0.1, None),
        (math.nan, None),
        (True, None),
        ("perhaps", None),
        (None, None),
        ([0.5], None),
    ],
)
def test_a_models_own_statement_becomes_a_number_or_nothing(value: object, number: float | None) -> None:
    assert self_reported(value) == number


ANSWER = {"category": "Free Restricted", "confidence": 0.85}
BY_TOKENS = Confidence(signal=ConfidenceSignal.LOGPROBS, fields=("category",), field="confidence")


@pytest.mark.parametrize(
    ("rule", "tokens", "measured"),
    [
        (BY_TOKENS, TOKENS, Measured(ConfidenceSignal.LOGPROBS, pytest.approx(math.exp(-0.4)))),
        (Confidence(field="confidence"), TOKENS, Measured(ConfidenceSignal.LOGPROBS, pytest.approx(math.exp(-0.4)))),
        (Confidence(), TOKENS, Measured(ConfidenceSignal.LOGPROBS, pytest.approx(math.exp(-0.55)))),
        (BY_TOKENS, None, Measured(ConfidenceSignal.FIELD, 0.85)),
        (BY_TOKENS, TOKENS[1:], Measured(ConfidenceSignal.FIELD, 0.85)),
        (
            Confidence(signal=ConfidenceSignal.FIELD, field="confidence"),
            TOKENS,
            Measured(ConfidenceSignal.FIELD, 0.85),
        ),
        (
            Confidence(signal=ConfidenceSignal.FIELD, field="category"),
            TOKENS,
            Measured(ConfidenceSignal.VALIDATORS, None),
        ),
        (Confidence(fields=("category",)), None, Measured(ConfidenceSignal.VALIDATORS, None)),
        (
            Confidence(signal=ConfidenceSignal.VALIDATORS, field="confidence"),
            TOKENS,
            Measured(ConfidenceSignal.VALIDATORS, None),
        ),
    ],
)
def test_a_missing_signal_gives_way_to_the_next(
    rule: Confidence, tokens: tuple[Token, ...] | None, measured: Measured
) -> None:
    assert confidence(ANSWER, CONTENT, tokens, rule) == measured


def test_an_answer_without_a_number_is_never_low() -> None:
    assert not Measured(ConfidenceSignal.VALIDATORS, None).is_below(Decimal("0.99"))
    assert Measured(ConfidenceSignal.FIELD, 0.85).is_below(Decimal("0.86"))
    assert not Measured(ConfidenceSignal.FIELD, 0.85).is_below(Decimal("0.85"))
