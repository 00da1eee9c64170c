"""What a signal is worth that says how sure an answer is: alone responsible for those figures.

A signal is a number for each answer of the first tier, the greater the surer. It is worth what it saves: how many of
the documents can keep their first answer (design: cascade.md, section 2). Shares are exact fractions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from schemas.tails import binomial, last_that_holds

#: In how many of 100 samples an interval of `bound_share` holds the share of all documents, or more.
LEVEL = 90
_TAIL = Fraction(100 - LEVEL, 200)
#: The ends of an interval are so many parts of one, rounded outwards.
_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer of the first tier: how sure it is, and whether the last tier says the same."""

    score: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class Share:
    """So many `of` so many that were drawn, and between which shares that of all documents is."""

    count: int
    of: int
    low: float
    high: float

    @property
    def share(self) -> Fraction:
        return Fraction(self.count, self.of)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a threshold accepts: answers as sure as `least`, or surer. None of them: `least` is None."""

    least: float | None
    count: int
    disagreements: int


def bound_share(count: int, of: int) -> Share:
    """Clopper and Pearson's interval (Biometrika 26, 1934), exact and never too narrow: it takes no normal curve.

    The documents were drawn without putting back, of which it is told nothing: it is a little wide. `of` is not 0.
    """
    low = last_that_holds(lambda part: _is_tail(of, _PARTS - part, of - count), 0, _PARTS) if count else 0
    high = last_that_holds(lambda part: not _is_tail(of, part, count), 0, _PARTS) + 1 if count < of else _PARTS
    return Share(count, of, low / _PARTS, high / _PARTS)


def _is_tail(of: int, part: int, most: int) -> bool:
    return binomial(of, Fraction(part, _PARTS), most).is_within(_TAIL)


def auc(scored: Iterable[Scored]) -> Fraction | None:
    """How often an answer that agrees is surer than one that does not, a tie being half; None without both kinds."""
    below = won = agreeing = 0  # won counts halves
    for _, group in groupby(sorted(scored, key=_score), key=_score):
        kinds = Counter(each.agrees for each in group)
        won += kinds[True] * (2 * below + kinds[False])
        below += kinds[False]
        agreeing += kinds[True]
    pairs = agreeing * below
    return Fraction(won, 2 * pairs) if pairs else None


def accept(scored: Iterable[Scored], allowed: int) -> Accepted:
    """The lowest threshold with at most so many disagreements among what it accepts. Ties are accepted together."""
    found, count, disagreements = Accepted(None, 0, 0), 0, 0
    for score, group in groupby(sorted(scored, key=_score, reverse=True), key=_score):
        kinds = Counter(each.agrees for each in group)
        count, disagreements = count + kinds.total(), disagreements + kinds[False]
        if disagreements > allowed:
            break
        found = Accepted(score, count, disagreements)
    return found


def brier(scored: Sequence[Scored]) -> float | None:
    """The mean squared distance of a probability from what came: 0 is all-knowing, and 0.25 says always one half.

    None without answers, and where the scores are no probabilities.
    """
    if not scored or not all(0 <= each.score <= 1 for each in scored):
        return None
    return sum((each.score - each.agrees) ** 2 for each in scored) / len(scored)


def tied(scored: Sequence[Scored]) -> Fraction | None:
    """The share of answers whose score is exactly that of another: no threshold parts them."""
    times = Counter(map(_score, scored))
    return Fraction(sum(count for count in times.values() if count > 1), len(scored)) if scored else None


def _score(each: Scored) -> float:
    return each.score
