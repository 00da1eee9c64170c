"""How sure the model was of one answer: the measured number, and which signal it comes from.

Signals in order (design: cascade.md §2): the log probabilities of the answer's own tokens, else what the model
reports about itself, else only the fact that the answer passed its checks. Whatever the number is worth, only
cost may depend on it: a threshold's guarantee never does.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate

from schemas.attempts import Token
from schemas.jobs import Confidence, ConfidenceSignal
from schemas.spans import Span, leaf_spans

#: What people mean by these words (after the survey in Fagen-Ulmschneider, "Perception of Probability Words").
VERBAL: Mapping[str, float] = {
    "almost certain": 0.95,
    "highly likely": 0.9,
    "very likely": 0.85,
    "likely": 0.75,
    "probably": 0.7,
    "better than even": 0.6,
    "about even": 0.5,
    "probably not": 0.25,
    "unlikely": 0.2,
    "highly unlikely": 0.1,
    "almost no chance": 0.05,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The confidence of one answer, 0 to 1, and the signal it was read from.

    `value` is None where the answer is only known to be valid: no number, so never below a threshold.
    """

    signal: ConfidenceSignal
    value: float | None

    def is_below(self, threshold: Decimal | float) -> bool:
        return self.value is not None and self.value < float(threshold)  # Decimal("0.85") itself is above 0.85


def confidence(
    answer: Mapping[str, object], content: str, tokens: Sequence[Token] | None, rule: Confidence
) -> Measured:
    """Measure by the rule's signal, or by the next one down that this reply has."""
    if rule.signal is ConfidenceSignal.LOGPROBS and tokens is not None:
        named = rule.fields or tuple(name for name in answer if name != rule.field)
        value = field_confidence(content, tokens, named)
        if value is not None:
            return Measured(ConfidenceSignal.LOGPROBS, value)
    if rule.signal is not ConfidenceSignal.VALIDATORS and rule.field is not None:
        value = self_reported(_at(answer, rule.field))
        if value is not None:
            return Measured(ConfidenceSignal.FIELD, value)
    return Measured(ConfidenceSignal.VALIDATORS, None)


def field_confidence(content: str, tokens: Sequence[Token], fields: Iterable[str]) -> float | None:
    """The least probability among the fields' values: the product over the tokens that touch each value.

    Quotes, keys and braces do not count: they are nearly certain and would hide the doubt. None where a field is
    not in the content, or the tokens do not join to it. A field may be a dotted path; a list or object has the
    probability of all its values together.
    """
    ends = list(accumulate(len(token.text) for token in tokens))
    if not ends or "".join(token.text for token in tokens) != content:
        return None
    leaves = leaf_spans(content)
    logprobs = [_field_logprob([leaves[path] for path in _under(leaves, name)], tokens, ends) for name in fields]
    known = [logprob for logprob in logprobs if logprob is not None]
    return math.exp(min(known)) if known and len(known) == len(logprobs) else None


def _under(leaves: Mapping[str, Span], field: str) -> list[str]:
    return [path for path in leaves if path == field or path.startswith(f"{field}.")]


def _field_logprob(spans: Sequence[Span], tokens: Sequence[Token], ends: Sequence[int]) -> float | None:
    """The sum over the tokens that overlap any of the spans, each once; None where there is no span."""
    touched = {index for span in spans for index in _touched(span, tokens, ends)}
    return sum(tokens[index].logprob for index in touched) if touched else None


def _touched(span: Span, tokens: Sequence[Token], ends: Sequence[int]) -> range:
    """Indexes of the tokens with a character inside the span."""
    first = bisect_right(ends, span.start)
    return range(first, min(bisect_left(ends, span.end) + 1, len(tokens)))


def self_reported(value: object) -> float | None:
    """A model's own statement as a number: 0 to 1, or one of the verbal bins; None for anything else."""
    if isinstance(value, str):
        return VERBAL.get(" ".join(value.lower().replace("_", " ").split()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1 else None


def _at(answer: Mapping[str, object], path: str) -> object:
    value: object = answer
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
