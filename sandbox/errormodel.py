"""How often each emulated tier is wrong, invalid or blank, and how sure it sounds: the sandbox's stated assumption.

Every figure a sandbox run shows about quality follows from this page, so it is simulated and must be called so.
Outcomes depend on the seed, the document, the tier and the number of messages, never on the call: a run with
faults and retries ends with the same answers as one without.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from statistics import NormalDist
from types import MappingProxyType

_NORMAL = NormalDist()
#: How much of what makes a tier fail is the document's own difficulty, shared by all tiers.
SHARED = 0.6
#: The share of invalid answers that a repair message mends.
MENDED = 0.9


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """Shares of documents that one tier gets wrong, answers invalidly or not at all; Beta(a, b) of its confidence."""

    wrong: float
    invalid: float
    blank: float
    confidence_right: tuple[float, float]
    confidence_wrong: tuple[float, float]


DEFAULTS: Mapping[str, ErrorModel] = MappingProxyType(
    {
        "flash": ErrorModel(0.12, 0.010, 0.005, (14.0, 1.2), (4.0, 2.2)),
        "flash-thinking": ErrorModel(0.07, 0.006, 0.003, (16.0, 1.2), (4.0, 2.0)),
        "pro": ErrorModel(0.04, 0.002, 0.001, (24.0, 1.1), (5.0, 2.0)),
        "pro-thinking": ErrorModel(0.03, 0.002, 0.001, (26.0, 1.1), (5.0, 2.0)),
    }
)


class Form(StrEnum):
    """What shape an answer takes."""

    VALID = "valid"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    PROSE = "prose"
    BLANK = "blank"


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one document at one tier; `pick` in [0, 1) chooses among wrong answers."""

    is_wrong: bool
    form: Form
    pick: float


def draw(*key: object) -> float:
    """A number in [0, 1) that only the key decides."""
    seen = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(seen, "big") / 2**64


def decide(seed: int, sha: bytes, tier: str, turns: int, model: ErrorModel, hard: float | None) -> Fate:
    """The fate of a document. `hard` in [0, 1] is its difficulty as the answer key states it, else drawn."""
    return Fate(
        _is_wrong(seed, sha, tier, model, hard), _form(seed, sha, tier, turns, model), draw(seed, sha, tier, "pick")
    )


def _is_wrong(seed: int, sha: bytes, tier: str, model: ErrorModel, hard: float | None) -> bool:
    """A one-factor Gaussian copula: each tier keeps its own error rate, and hard documents fail at several."""
    shared = _normal(draw(seed, sha, "hard") if hard is None else hard)
    own = _normal(draw(seed, sha, tier, "wrong"))
    score = SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own
    return _NORMAL.cdf(score) > 1 - model.wrong


def _normal(share: float) -> float:
    return _NORMAL.inv_cdf(min(max(share, 1e-6), 1 - 1e-6))


def _form(seed: int, sha: bytes, tier: str, turns: int, model: ErrorModel) -> Form:
    """The first turn decides; after a repair message most invalid answers are mended, blanks are drawn anew."""
    first = _first_form(seed, sha, tier, model)
    if turns <= 1 or first is Form.VALID:
        return first
    again = draw(seed, sha, tier, turns, "again")
    if first is Form.BLANK:
        return Form.BLANK if again < model.blank else Form.VALID
    return Form.VALID if again < MENDED else first


def _first_form(seed: int, sha: bytes, tier: str, model: ErrorModel) -> Form:
    chance = draw(seed, sha, tier, "form")
    if chance < model.blank:
        return Form.BLANK
    if chance >= model.blank + model.invalid:
        return Form.VALID
    kind = draw(seed, sha, tier, "kind")
    return Form.MISSING_FIELD if kind < 0.4 else Form.WRONG_TYPE if kind < 0.8 else Form.PROSE


def draw_confidence(seed: int, sha: bytes, tier: str, field: str, is_right: bool, model: ErrorModel) -> float:
    """How sure a tier is of one field, kept off 0 and 1 so that its logarithm is finite and visible."""
    a, b = model.confidence_right if is_right else model.confidence_wrong
    beta = random.Random(repr((seed, sha, tier, field))).betavariate(a, b)
    return min(max(beta, 0.02), 0.9999)
