"""What a signal is worth, held against the definitions: every pair, every threshold, the binomial sums in floats."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.signals import LEVEL, Scored, accept, auc, bound_share, brier, tied

SCORED = st.lists(st.builds(Scored, st.sampled_from([-2.0, 0.1, 0.5, 0.9, 1.0]), st.booleans()), max_size=25)


@given(SCORED)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(scored: list[Scored]) -> None:
    pairs = [
        Fraction((right.score > wrong.score) * 2 + (right.score == wrong.score), 2)
        for right in scored
        for wrong in scored
        if right.agrees and not wrong.agrees
    ]
    assert auc(scored) == (Fraction(sum(pairs), len(pairs)) if pairs else None)


@given(SCORED, st.integers(0, 5))
def test_no_lower_threshold_would_have_held(scored: list[Scored], allowed: int) -> None:
    found = accept(scored, allowed)
    held = []
    for least in {each.score for each in scored}:
        taken = [each for each in scored if each.score >= least]
        wrong = sum(not each.agrees for each in taken)
        if wrong <= allowed:
            held.append((len(taken), wrong, least))
    assert (found.count, found.disagreements, found.least) == max(held, default=(0, 0, None))


def test_brier_and_ties() -> None:
    scored = [Scored(0.9, True), Scored(0.9, False), Scored(0.5, True)]
    assert brier(scored) == pytest.approx((0.01 + 0.81 + 0.25) / 3)
    assert brier([*scored, Scored(-3, True)]) is brier([]) is None
    assert tied(scored) == Fraction(2, 3)
    assert tied([]) is None


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (183, 200), (500, 1000)])
def test_the_interval_is_clopper_and_pearson_s(count: int, of: int) -> None:
    """By the sums of the binomial distribution itself, in floats, at the ends that were found and a step beyond."""
    found, tail = bound_share(count, of), (100 - LEVEL) / 200 + 1e-12

    def at_most(most: int, share: float) -> float:
        return math.fsum(math.comb(of, n) * share**n * (1 - share) ** (of - n) for n in range(most + 1))

    assert found.low <= count / of <= found.high
    if count:
        assert 1 - at_most(count - 1, found.low) <= tail < 1 - at_most(count - 1, found.low + 0.0001)
    else:
        assert found.low == 0
    if count < of:
        assert at_most(count, found.high) <= tail < at_most(count, found.high - 0.0001)
    else:
        assert found.high == 1
