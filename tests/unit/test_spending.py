"""What attempts bought, and what a million of their tokens cost."""

from __future__ import annotations

import pytest

from schemas.spending import Cell, Cost, Sums, at_most


@pytest.mark.parametrize(
    ("signal", "verdict", "billing", "waste"),
    [
        ("answered", "accepted", "known", None),
        ("answered", "accepted", "unknown", None),  # its usage was missing, and its answer is the result
        ("answered", "low_confidence", "known", "unsure"),
        ("answered", "invalid_answer", "known", "failed"),
        ("timed_out", None, "unknown", "unknown"),
    ],
)
def test_waste_is_what_bought_no_result(signal: str, verdict: str | None, billing: str, waste: str | None) -> None:
    assert Cell("flash", "answer", None, signal, verdict, billing, Sums()).waste == waste


def test_tokens_that_nobody_can_price_are_not_free() -> None:
    assert Sums(miss_tokens=40_000, output_tokens=10_000, unknown_pico=9).pico_per_million is None
    assert Sums(miss_tokens=41_000, priced_tokens=1_000, cost_pico=3_000).pico_per_million == 3_000_000


@pytest.mark.parametrize(("percent", "pico"), [(1, 5), (25, 5), (26, 7), (50, 7), (75, 7), (76, 900), (100, 900)])
def test_so_many_percent_of_the_documents_cost_at_most(percent: int, pico: int) -> None:
    assert at_most([Cost(5, 1), Cost(7, 2), Cost(900, 1)], percent) == pico
    assert at_most([], percent) == 0
