"""What a user wants certified, and the sample that can certify it: alone responsible for that plan.

"95 % of my answers are what Pro would have said, with probability 0.95" is a promise. From it follow, in exact
integers, how many disagreements may remain, how many documents to ask Pro about, and how many disagreements among
those may be passed before the cut (design: cascade.md, section 1, steps 1, 3 and 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from hashlib import shake_256

from schemas.tails import Tail, hypergeometric, last_that_holds, roughly

#: The usual sample is so many times the square root of the documents, and at most this share of it more.
ROOTS, MORE = 5, Fraction(8, 100)
#: What share of all documents a sample may be so that one disagreement in it can be passed.
TO_PASS_ONE = Fraction(1, 10)
#: A larger share of all is never drawn, unless somebody says so.
MOST_DRAWN = Fraction(1, 2)
_WORD = 16


@dataclass(frozen=True, slots=True)
class Promise:
    """At least `target` of all answers are what the last tier would say, but for a chance of `delta`.

    Raises ValueError where that is no share and no chance. Fractions, since 0.95 is not a float: use `parse`.
    """

    target: Fraction
    delta: Fraction

    def __post_init__(self) -> None:
        if not (0 <= self.target <= 1 and 0 < self.delta < 1):
            raise ValueError(
                f"target {float(self.target):g} and delta {float(self.delta):g} promise nothing; "
                "write a target from 0 to 1, like 0.95, and a delta between 0 and 1, like 0.05"
            )

    @classmethod
    def parse(cls, target: str, delta: str) -> Promise:
        """From `0.95` and `0.05`, exactly as written. Raises ValueError where they are no numbers."""
        return cls(Fraction(target), Fraction(delta))

    def allowed(self, documents: int) -> int:
        """How many of the documents may differ: B."""
        return math.floor((1 - self.target) * documents)

    def shared_by(self, fields: int) -> Promise:
        """What each of several fields is held to by itself, so that, but for delta, none of them breaks the promise.

        Whole answers may then differ more often, since each field may elsewhere: a run promises whole answers.
        """
        return Promise(self.target, self.delta / fields)


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample of `size` documents, and at most how many disagreements in it the cut may pass: m and c.

    The pilot's documents have the last tier's answers already and are not among those that are drawn from. Without an
    `allowance` the sample certifies nothing, and every document goes to the last tier.
    """

    promise: Promise
    documents: int
    piloted: int
    size: int
    allowance: int | None
    fields: int = 1

    @property
    def population(self) -> int:
        """The documents that are drawn from: M."""
        return self.documents - self.piloted

    @property
    def allowed(self) -> int:
        """Disagreements that may remain: B."""
        return self.promise.allowed(self.documents)

    @property
    def tail(self) -> Tail | None:
        """The most that the promise can fail with, for each field. None: nothing is accepted, nothing can fail."""
        if self.allowance is None:
            return None
        return _tail(self.population, self.allowed, self.size, self.allowance)

    @property
    def risk(self) -> Decimal | None:
        """`tail`, rounded up for the record. Of ten million documents it takes seconds."""
        tail = self.tail
        return None if tail is None else tail.rounded_up()


def plan(promise: Promise, documents: int, *, piloted: int = 0, size: int | None = None, fields: int = 1) -> Plan:
    """The sample that keeps the promise; of the usual size unless told another.

    Where that is more than half of those that it is drawn from, none is: it would cost what it is to save.
    """
    population, allowed, each = documents - piloted, promise.allowed(documents), promise.shared_by(fields)
    drawn = _worthwhile(usual_size(each, documents, population), population) if size is None else size
    if not 0 <= drawn <= population:
        raise ValueError(f"{drawn} documents cannot be drawn from {population}; ask for at most {population}")
    return Plan(promise, documents, piloted, drawn, allowance(population, allowed, drawn, each.delta), fields)


def _worthwhile(size: int, population: int) -> int:
    return size if size <= population * MOST_DRAWN else 0


def allowance(population: int, allowed: int, size: int, delta: Fraction) -> int | None:
    """c: the most sampled disagreements that may be accepted, so that more than `allowed` others hardly ever are.

    The greatest c with P(Hyp(M, B + 1 + c, m) <= c) <= delta; the tail never falls when c grows (cascade.md, 1).
    """
    most = min(size, population - allowed - 1)
    if most < 0:  # every document may differ
        return size
    guess = last_that_holds(lambda c: roughly(population, allowed + 1 + c, size, c) <= delta, 0, most)
    found = last_that_holds(lambda c: _tail(population, allowed, size, c).is_within(delta), 0, most, guess)
    return found if found >= 0 else None


def _tail(population: int, allowed: int, size: int, passed: int) -> Tail:
    if allowed + 1 + passed > population:
        return Tail(0, 1)
    return hypergeometric(population, allowed + 1 + passed, size, passed)


def usual_size(promise: Promise, documents: int, population: int) -> int:
    """About 5 sqrt(N), moved to where its tail comes close below delta. Any size keeps the promise; this is cheap.

    The fewest that have the allowance of 5 sqrt(N), or of half of all if that is less; or one more, if that is nearer
    and at most 8 % above. Where the first disagreement would decide alone, a second is worth up to a tenth of all
    (measured on SUPG's pairs: 0.188 of documents to Pro became 0.117, and 0.251 became 0.202). Where so few can
    certify nothing, the fewest that can.
    """
    if promise.allowed(documents) >= population:
        return 0
    start = min(math.isqrt(ROOTS**2 * documents), population // 2)
    passed = _guess_allowance(promise, documents, population, start)
    more = _fewest(promise, documents, population, max(passed, 0) + 1)
    if passed < 1 and more <= population * TO_PASS_ONE:
        return more
    fewest = _fewest(promise, documents, population, max(passed, 0))
    is_near = more <= start * (1 + MORE) and more - start < start - fewest
    return more if is_near else fewest


def _guess_allowance(promise: Promise, documents: int, population: int, size: int) -> int:
    allowed = promise.allowed(documents)
    return last_that_holds(
        lambda c: roughly(population, allowed + 1 + c, size, c) <= promise.delta,
        0,
        min(size, population - allowed - 1),
    )


def _fewest(promise: Promise, documents: int, population: int, passed: int) -> int:
    marked = promise.allowed(documents) + 1 + passed
    if marked > population:
        return population
    return 1 + last_that_holds(lambda m: roughly(population, marked, m, passed) > promise.delta, 0, population - 1)


def smallest_allowed(population: int, size: int, passed: int, delta: Fraction) -> int:
    """The fewest remaining disagreements that can be certified for a cut chosen beforehand, by the money: B.

    `passed` of the sample of `size` are disagreements above the cut. The same tail, solved for B (cascade.md, 1).
    """
    too_few = last_that_holds(
        lambda allowed: not _tail(population, allowed, size, passed).is_within(delta), 0, population
    )
    return too_few + 1


def cut_for(calls: int, population: int, size: int) -> int:
    """How many of the best can be accepted where money is for so many calls, the sample's included.

    Decided before the sample is drawn; what was sampled below the cut is then money left over. Raises ValueError
    where the money is too little for the sample.
    """
    if calls < size:
        raise ValueError(f"{calls} calls do not pay for a sample of {size}; allow more, or draw fewer")
    return max(0, population - (calls - size))


def draw(seed: bytes, population: int, size: int) -> tuple[int, ...]:
    """Exactly `size` of the ranks below `population`, each set as likely as any other, in order.

    Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987) over SHAKE-256, so that a certificate can be drawn again
    in years: `random` promises that of no sampling. 128 bits per number: no rank is likelier than another by 2^-100.
    The seed is drawn when the order is frozen, not before: an order that knew it could hide its disagreements.
    """
    words, taken = shake_256(seed).digest(_WORD * size), set[int]()
    for turn, last in enumerate(range(population - size, population)):
        word = int.from_bytes(words[_WORD * turn : _WORD * (turn + 1)], "big")
        pick = word * (last + 1) >> 8 * _WORD
        taken.add(last if pick in taken else pick)
    return tuple(sorted(taken))


def caution(planned: Plan) -> str | None:
    """What somebody should know before paying for a guarantee that eats most of what it saves; None: nothing."""
    documents, target = planned.documents, planned.promise.target
    if documents >= 300 and (target < Fraction(99, 100) or documents >= 3_000):
        return None
    return (
        f"a guarantee eats most of the saving here: it takes {planned.size:,} of {documents:,} documents to the last "
        "tier only to certify the others; with fewer than 300 documents, or a target of 0.99 and fewer than 3,000, "
        f"run more at once, ask for less than {Decimal(target.numerator) / target.denominator}, or use `below`"
    )
