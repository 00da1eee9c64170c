"""How far off an estimate may be: alone responsible for intervals, from a sample of documents or from earlier runs.

Pure, and reproducible: the random numbers come in. Floats are in here only; sums of money are made whole outside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

#: Of 100 such intervals, so many hold the true value, or more.
LEVEL = 90
#: How many of 100 an interval leaves out at either end: not quite the half of what it may, since a sample is drawn
#: without putting back, from documents of unequal chances, and the theory is of neither.
_TAIL = 4
#: How often chance is asked: the ends of an interval move by some hundredths of its width from one seed to the next.
_DRAWS = 1000
#: How much runs of one job differ from one another in cost per document where too few of them say: a standard
#: deviation of the logarithm, and how many runs that assumption counts for.
USUAL_SPREAD, USUAL_WEIGHT = 0.15, 4
#: Student's t: 5 % lie above it, by degrees of freedom.
_T95 = {4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860}


@dataclass(frozen=True, slots=True)
class Interval:
    """Two ends, as factors or as means."""

    low: float
    high: float


def bound_mean(values: Sequence[float], least: float, most: float, random: Random) -> Interval:
    """Where the mean of a population lies of which `values` are a random sample, between `least` and `most`.

    Gaffke's bounds ("Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
    variable", Mathematical Methods of Statistics 14, 2005; also Learned-Miller and Thomas, arXiv:1905.06208): the
    quantiles of a mean with random weights (Dirichlet, all 1), where one more value stands for what was not seen, the
    most for the upper end and the least for the lower one. For values of two kinds, like documents that climb and
    those that do not, they are Clopper and Pearson's; for many values of about one size, Student's. So a share of 1 %
    that a sample of 50 has not seen is inside, which a bootstrap of these 50 would deny.
    """
    highs, lows = [], []
    kinds = Counter(values)
    for _ in range(_DRAWS):
        # Weights of equal values are added up: a sum of exponential variables is a gamma variable.
        weights = [random.gammavariate(count, 1.0) for count in kinds.values()]
        unseen = random.expovariate(1.0)
        total = sum(weights) + unseen
        seen = sum(weight * value for weight, value in zip(weights, kinds, strict=True))
        lows.append((seen + unseen * least) / total)
        highs.append((seen + unseen * most) / total)
    tail = _DRAWS * _TAIL // 100
    return Interval(sorted(lows)[tail], sorted(highs)[-1 - tail])


@dataclass(frozen=True, slots=True)
class PastCost:
    """What a document cost on average in an earlier run of so many, whose costs have this squared spread (variance
    over squared mean)."""

    mean: float
    documents: int
    squared_spread: float

    @property
    def doubt(self) -> float:
        """The variance of its logarithm, among runs of one job."""
        return USUAL_SPREAD**2 + self.squared_spread / max(1, self.documents)


def predict_mean(past: Sequence[PastCost], documents: int) -> Interval:
    """How far the next run's cost per document may be from what earlier ones lead to expect, as two factors.

    Runs are clusters: documents of one day are more alike than those of another, so a million of them in one run are
    still one run. Their logarithms are weighted by their inverse variance (random effects: DerSimonian and Laird,
    Controlled Clinical Trials 7, 1986). How much they really differ moves the assumed spread, as far as there are
    runs to say so (a moderated t: Smyth, Statistical Applications in Genetics and Molecular Biology 3(1), 2004).
    """
    weights = weigh(past)
    logs = [math.log(max(each.mean, 1e-9)) for each in past]
    total = sum(weights)
    mean = sum(weight * log for weight, log in zip(weights, logs, strict=True)) / total
    seen = sum(weight * (log - mean) ** 2 for weight, log in zip(weights, logs, strict=True))
    freedom = USUAL_WEIGHT + len(past) - 1
    squared_spread = max(each.squared_spread for each in past)
    doubt = USUAL_SPREAD**2 + squared_spread / max(1, documents) + 1 / total
    half = _quantile(freedom) * math.sqrt(doubt * (USUAL_WEIGHT + seen) / freedom)
    return Interval(math.exp(-half), math.exp(half))


def weigh(past: Sequence[PastCost]) -> list[float]:
    """How much each earlier run counts: a small one less."""
    return [1 / each.doubt for each in past]


def _quantile(freedom: int) -> float:
    return _T95[max((known for known in _T95 if known <= freedom), default=min(_T95))]
