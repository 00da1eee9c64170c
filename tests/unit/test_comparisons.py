"""Are intervals of a comparison honest, and does it say what follows from them? No law is the estimator's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest

from schemas.agreement import Agreement, Rule
from schemas.comparisons import Comparison, Poll, Result, Variant, bound_difference, compare, find_needed
from schemas.money import Currency
from schemas.signals import bound_share
from tasks.comparison_report import comparison_json, comparison_markdown, comparison_report

AGREEMENT = Agreement((("colour", Rule.EXACT),))
BANDS = frozenset({"off_peak"})


def make_variant(name: str, results: Sequence[Result | None], bands: frozenset[str] = BANDS) -> Variant:
    return Variant(name, len(name), tuple(results), 1000, bands)


def make_result(is_right: bool | None = True, pico: int | None = 1000, colour: str | None = None) -> Result:
    said = colour or ("red" if is_right else "blue")
    return Result({"colour": said}, is_right, pico, cached=0.5, seconds=1.0)


def make_poll(*variants: Variant) -> Poll:
    return Poll("colours", AGREEMENT, 5000, Currency.USD, False, variants)


def compared(*variants: Variant) -> Comparison:
    return compare(make_poll(*variants), Random(0))


@pytest.mark.parametrize(
    ("better", "worse"), [(0.0, 0.0), (0.01, 0.01), (0.03, 0.0), (0.1, 0.05), (0.3, 0.3), (0.0, 0.2)]
)
def test_at_least_nine_of_ten_paired_intervals_hold_the_true_difference(better: float, worse: float) -> None:
    random, trials, held = Random(7), 100, 0
    for _ in range(trials):
        values = random.choices((1, -1, 0), (better, worse, 1 - better - worse), k=120)
        found = bound_difference(values, random)
        assert found is not None
        held += found.low <= better - worse <= found.high
    assert held >= 84  # nine of ten, less what chance may take of a hundred


def test_at_least_nine_of_ten_paired_intervals_hold_the_true_difference_in_cost() -> None:
    """Long documents are dear to both, and one in thirty climbs, in one of them or in both."""
    random, trials, held = Random(3), 50, 0
    mean = 1000.0 * 1.1331  # of the lengths: e^(0.5^2 / 2)
    truth = 0.1 * mean + (0.04 - 0.03) * 9000
    for _ in range(trials):
        first, second = [], []
        for _ in range(60):
            length = int(random.lognormvariate(6.9078, 0.5))
            first.append(make_result(pico=length + 9000 * (random.random() < 0.03)))
            second.append(make_result(pico=int(1.1 * length) + 9000 * (random.random() < 0.04)))
        (found,) = compare(make_poll(make_variant("a", first), make_variant("b", second)), random).differences
        assert found.pico is not None
        held += found.pico.low <= truth <= found.pico.high
    assert held >= 41


def test_what_is_dearer_and_better_is_said_with_what_a_right_answer_costs() -> None:
    first = [make_result(is_right=number % 2 == 0, pico=1_000_000) for number in range(200)]
    second = [make_result(is_right=number % 10 != 0, pico=2_000_000) for number in range(200)]
    found = compared(make_variant("job", first), make_variant("b", second))
    (difference,) = found.differences
    assert (difference.better, difference.worse) == (100, 20)
    assert difference.right is not None
    assert difference.right.mean == Fraction(80, 200)
    assert difference.pico is not None
    assert difference.pico.mean == 1_000_000
    assert difference.agreement is not None
    assert difference.agreement.count == 80
    told, *others = found.notes
    assert told.startswith("b costs $0.00100 more per 1,000 documents (")
    assert " and is right 40.0 points more often (" in told
    assert told.endswith("than job: $0.00000250 for each answer more that is right")
    assert others == []
    (same, *_) = compared(make_variant("b", second), make_variant("job", first)).notes
    assert same.startswith("job costs $0.00100 less per 1,000 documents (")
    assert " and is right 40.0 points less often (" in same


def test_what_cannot_be_told_says_how_many_documents_could() -> None:
    rights = [True, False] * 100
    first = [make_result(each) for each in rights]
    second = [make_result(not each if number in (3, 5, 8) else each) for number, each in enumerate(rights)]
    notes = compared(make_variant("job", first), make_variant("b", second)).notes
    assert "no difference in cost between job and b can be told from 200 documents" in notes[0]
    assert "no difference in being right between job and b can be told from 200 documents with a label" in notes[1]
    sought, number = find_needed([1, 1, -1] + [0] * 197) or (0, 0)
    assert notes[1].endswith(f"to tell a difference of 1.0 points, about {number:,} would be needed")
    assert (sought, number) == (0.01, 1100)
    # Of so many like these, most samples do tell the difference.
    random, told = Random(1), 0
    for _ in range(40):
        values = random.choices((1, -1, 0), (0.02, 0.01, 0.97), k=find_needed([1] * 4 + [-1] * 2 + [0] * 194)[1])  # type: ignore[index]  # they differ
        told += (found := bound_difference(values, random)) is not None and found.low > 0
    assert 20 <= told <= 39
    assert find_needed([0] * 200) is None
    (_, same) = compared(make_variant("job", first), make_variant("b", first)).notes
    assert same.endswith("on these, both are right on the very same ones")


def test_what_is_not_known_is_left_out_and_said() -> None:
    first = [make_result(None) for _ in range(20)]
    second: list[Result | None] = [replace(make_result(None), pico=None) for _ in range(15)] + [None] * 5
    second[0] = replace(make_result(None), answer=None, pico=None)
    found = compared(make_variant("job", first), make_variant("run 3", second, frozenset({"peak"})))
    assert [each.documents for each in found.figures] == [20, 15]
    assert [each.without_result for each in found.figures] == [0, 1]
    (difference,) = found.differences
    assert difference.agreement is not None
    assert (difference.agreement.count, difference.agreement.of, difference.pico, difference.right) == (
        14,
        15,
        None,
        None,
    )
    told = "\n".join(found.notes)
    assert "what run 3 costs beside job is not known" in told
    assert "run 3 has had 15 of the 20 documents" in told
    assert "booked at different hours" in told
    assert "no document has a label" in told


def test_a_comparison_of_three_is_shown_whole_and_names_that_chance_has_three_chances() -> None:
    three = (
        make_variant(name, [make_result(number % 3 > 0) for number in range(30)]) for name in ("job", "b", "c|d")
    )
    found = compared(*three)
    assert len(found.differences) == 3
    assert "each of the 3 pairs is held against chance by itself" in found.notes[-1]
    shown = comparison_markdown(found)
    assert "c\\|d" in shown
    low, high = (f"{end * 100:.1f}" for end in (bound_share(20, 30).low, bound_share(20, 30).high))
    assert f"66.7 %, {low} to {high}" in shown.replace("\u00a0", " ")
    assert len(comparison_report(found)) > 4
    told = comparison_json(found)
    assert [each["name"] for each in told["variants"]] == ["job", "b", "c|d"]
    assert told["variants"][0]["right"]["count"] == 20
    assert told["differences"][0]["pico_per_1000_documents"]["mean"] == 0
