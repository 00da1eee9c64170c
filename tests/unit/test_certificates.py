"""The promise holds: by every layout and every sample of small populations, and by 20,000 draws of larger ones.

Which answers differ is fixed, and the order is frozen; only the draw is chance. So the share of samples that break a
promise can be counted, and must be what the tail says, to the last sample.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import accumulate, combinations, product
from pathlib import Path
from time import perf_counter

import pytest

from schemas.certificates import (
    Candidate,
    Certificate,
    Fate,
    Finding,
    Place,
    Subject,
    certify,
    check,
    find_cut,
    freeze,
    order_hash,
)
from schemas.promises import (
    Plan,
    Promise,
    allowance,
    caution,
    cut_for,
    draw,
    plan,
    smallest_allowed,
    usual_size,
)
from schemas.tails import binomial, hypergeometric, roughly
from schemas.thresholds import streaming_allowance, streaming_threshold

ROOT = Path(__file__).parents[2]
USUAL = Promise.parse("0.95", "0.05")
SUBJECT = Subject(("deepseek-flash", "deepseek-pro"), "sha256:prompt")


def left_wrong(errors: Sequence[int], sampled: set[int] | frozenset[int], cut: int) -> int:
    """Accepted answers that differ from Pro's and that nobody asked Pro about."""
    return sum(rank < cut and rank not in sampled for rank in errors)


def cut_at(errors: Sequence[int], sampled: set[int] | frozenset[int], planned: Plan) -> int:
    return find_cut(planned, [Finding("answer", tuple(rank for rank in errors if rank in sampled))])


@pytest.mark.parametrize("population", range(1, 9))
def test_no_layout_breaks_the_promise_in_more_samples_than_the_tail_says(population: int) -> None:
    """Every layout of disagreements, every sample, every B and c: 2^M layouts, 2^M samples."""
    ranks = range(population)
    layouts = [[rank for rank in ranks if bits >> rank & 1] for bits in range(2**population)]
    for size in range(population + 1):
        samples = [frozenset(sample) for sample in combinations(ranks, size)]
        for passed in range(size + 1):
            planned = Plan(USUAL, population, 0, size, passed)
            for errors in layouts:
                left = Counter(left_wrong(errors, sample, cut_at(errors, sample, planned)) for sample in samples)
                hold_the_layout_to_its_tail(population, size, passed, len(errors), left)


def hold_the_layout_to_its_tail(population: int, size: int, passed: int, errors: int, left: Counter[int]) -> None:
    """A layout with enough disagreements fails in exactly the tail's samples; with fewer, in those of a lower c."""
    for allowed in range(population - passed):
        broken = sum(count for wrong, count in left.items() if wrong > allowed)
        tail = hypergeometric(population, allowed + 1 + passed, size, passed)
        spare = min(passed, errors - allowed - 1)
        exact = hypergeometric(population, allowed + 1 + spare, size, spare).ways if spare >= 0 else 0
        assert tail.of == left.total()
        assert broken == exact <= tail.ways


def test_the_allowance_is_the_greatest_whose_tail_is_within_delta() -> None:
    for population, size in ((7, 4), (12, 7), (30, 11), (60, 40)):
        for allowed, delta in product(range(population), (Fraction(1, 20), Fraction(1, 4), Fraction(1, 3))):
            within = [
                c
                for c in range(min(size, population - allowed - 1) + 1)
                if counted(population, allowed + 1 + c, size, c) <= delta
            ]
            assert within == list(range(len(within))), "the tail must not fall as c grows"
            assert allowance(population, allowed, size, delta) == (within[-1] if within else None)


@cache
def counted(population: int, marked: int, drawn: int, most: int) -> Fraction:
    """The tail, added up from its definition."""
    ways = sum(math.comb(marked, x) * math.comb(population - marked, drawn - x) for x in range(min(most, drawn) + 1))
    return Fraction(ways, math.comb(population, drawn))


def test_a_tail_is_what_its_definition_adds_up_to() -> None:
    for population in range(1, 12):
        for marked, drawn, most in product(range(population + 1), range(population + 1), range(-1, population + 1)):
            tail = hypergeometric(population, marked, drawn, most)
            exact = counted(population, marked, drawn, most) if most >= 0 else 0
            assert Fraction(tail.ways, tail.of) == exact
            assert roughly(population, marked, drawn, most) == pytest.approx(float(exact), rel=1e-7)
            assert 0 <= Fraction(tail.rounded_up()) - exact < Fraction(1, 10**12)


def test_a_binomial_tail_is_what_its_definition_adds_up_to() -> None:
    for drawn, share in product(range(9), (Fraction(0), Fraction(1, 20), Fraction(2, 3), Fraction(1))):
        parts = [math.comb(drawn, x) * share**x * (1 - share) ** (drawn - x) for x in range(drawn + 1)]
        for most, exact in enumerate(accumulate(parts)):
            tail = binomial(drawn, share, most)
            assert Fraction(tail.ways, tail.of) == exact


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(USUAL, 1_000)


@pytest.fixture(scope="module")
def draws(planned: Plan) -> list[frozenset[int]]:
    """20,000 samples as a run draws them."""
    return [frozenset(draw(b"draw%d" % number, planned.population, planned.size)) for number in range(20_000)]


def layouts(planned: Plan) -> dict[str, list[int]]:
    """Where disagreements may lie to do the most harm: as many as the proof speaks of, or more, anywhere."""
    assert planned.allowance is not None
    worst, everything = planned.allowed + 1 + planned.allowance, planned.population
    return {
        "the surest answers": list(range(worst)),
        "the least sure answers": list(range(everything - worst, everything)),
        "every tenth": list(range(0, everything, 10)),
        "all": list(range(everything)),
        "two blocks": [*range(planned.allowed), *range(500, 500 + worst)],
    }


@pytest.mark.parametrize("name", layouts(Plan(USUAL, 1_000, 0, 158, 3)))
def test_20_000_draws_break_the_promise_as_often_as_the_tail_says(
    planned: Plan, draws: list[frozenset[int]], name: str
) -> None:
    tail = planned.tail
    assert tail is not None
    broken = share_broken(layouts(planned)[name], draws, planned, within_the_allowance)
    expected = tail.ways / tail.of
    assert 0.04 < expected <= 0.05
    assert abs(broken - expected) <= 4 * math.sqrt(expected * (1 - expected) / len(draws))


Chooser = Callable[[list[int], frozenset[int], Plan], int]


def share_broken(errors: list[int], draws: list[frozenset[int]], planned: Plan, choose: Chooser) -> float:
    """In which share of the draws more differ above the chooser's cut than may, of those that were not drawn."""
    broken = 0
    for sampled in draws:
        ranks = sorted(sampled.intersection(errors))
        cut = choose(ranks, sampled, planned)
        broken += bisect_left(errors, cut) - bisect_left(ranks, cut) > planned.allowed
    return broken / len(draws)


def within_the_allowance(ranks: list[int], sampled: frozenset[int], planned: Plan) -> int:
    return find_cut(planned, [Finding("answer", tuple(ranks))])


def believe_the_sample(ranks: list[int], sampled: frozenset[int], planned: Plan) -> int:
    """95 % of the sample's answers agree: what people pick by hand."""
    seeming = math.floor(planned.size * (1 - planned.promise.target))
    return within_the_allowance(ranks, sampled, replace(planned, allowance=seeming))


def peek(ranks: list[int], sampled: frozenset[int], planned: Plan) -> int:
    """Look at the sample seven times as it comes, each time with all of delta, and keep the best cut."""
    arrivals = list(sampled)
    random.Random(sum(arrivals)).shuffle(arrivals)
    looks = [look_at(planned.size * part // 10) for part in range(4, 11)]
    seen = [frozenset(arrivals[: look.size]) for look in looks]
    return max(
        within_the_allowance([rank for rank in ranks if rank in some], some, look)
        for some, look in zip(seen, looks, strict=True)
    )


@cache
def look_at(size: int) -> Plan:
    return plan(USUAL, 1_000, size=size)


def train_on_the_sample(ranks: list[int], sampled: frozenset[int], planned: Plan) -> int:
    """A ranker that has seen the sample's disagreements puts them last, where they stop no cut."""
    return within_the_allowance(list(range(planned.population - len(ranks), planned.population)), sampled, planned)


@pytest.mark.parametrize(
    ("cheat", "at_least"), [(believe_the_sample, 0.2), (peek, 0.07), (train_on_the_sample, 0.99)]
)
def test_what_must_not_be_done_breaks_the_promise(
    planned: Plan, draws: list[frozenset[int]], cheat: Chooser, at_least: float
) -> None:
    """Negative controls: a harness that let these pass would let anything pass."""
    assert share_broken(layouts(planned)["every tenth"], draws[:3_000], planned, cheat) > at_least


def test_a_draw_has_every_set_equally_often_and_none_twice() -> None:
    drawn = Counter(draw(b"%d" % number, 6, 3) for number in range(20_000))
    assert set(drawn) == set(combinations(range(6), 3))
    expected = 20_000 / math.comb(6, 3)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in drawn.values())
    assert draw(b"seed", 10, 10) == tuple(range(10))
    assert draw(b"seed", 5, 0) == ()


def test_a_draw_is_the_same_in_years() -> None:
    """A certificate names its seed only: another algorithm would void every one that was ever issued."""
    assert draw(bytes(16), 10_000_000, 6) == (3_220_557, 6_200_480, 7_580_473, 7_860_994, 8_337_504, 9_620_334)


@pytest.mark.parametrize("documents", [1, 2, 20, 99, 300, 1_531, 10_000, 22_631])
@pytest.mark.parametrize("target", ["0.9", "0.95", "0.99", "0.995", "1"])
def test_the_usual_sample_certifies_and_wastes_nothing(documents: int, target: str) -> None:
    promise = Promise.parse(target, "0.05")
    found = plan(promise, documents, size=usual_size(promise, documents, documents))
    assert found.allowance is not None, "one that certifies nothing would be money for nothing"
    tail = found.tail
    assert tail is not None
    assert tail.is_within(promise.delta)
    # Two fewer: the size is sought with floats, and where a tail is delta exactly it may be one too many.
    fewer = allowance(documents, found.allowed, found.size - 2, promise.delta) if found.size > 1 else None
    assert fewer is None or fewer < found.allowance
    is_worth_a_second = found.allowance == 1 and found.size <= documents / 10
    assert found.size <= math.isqrt(25 * documents) * 1.08 or found.allowance == 0 or is_worth_a_second


@pytest.mark.parametrize(("documents", "size"), [(15, 0), (16, 7)])
def test_more_than_half_of_all_is_drawn_of_none(documents: int, size: int) -> None:
    found = plan(Promise.parse("0.75", "0.05"), documents)
    assert (found.size, found.allowance) == (size, 0 if size else None)
    assert find_cut(found, [Finding("answer", ())]) == (documents if size else 0)


def test_a_pilot_leaves_the_population_and_not_the_count() -> None:
    found = plan(USUAL, 10_000, piloted=400)
    assert (found.population, found.allowed) == (9_600, 500)


@pytest.mark.parametrize("size", [-1, 101])
def test_a_sample_that_cannot_be_drawn_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be drawn from 100"):
        plan(USUAL, 100, size=size)


def test_a_sample_too_small_to_certify_accepts_nothing() -> None:
    found = plan(USUAL, 10_000, size=20)
    assert (found.allowance, found.tail) == (None, None)
    assert find_cut(found, [Finding("answer", ())]) == 0


def test_a_target_is_what_was_written_and_not_the_nearest_float() -> None:
    assert USUAL.allowed(100) == 5
    assert math.floor((1 - 0.95) * 100) == 5
    assert Promise.parse("0.9", "0.05").allowed(10) == 1
    assert math.floor((1 - 0.9) * 10) == 0, "what a float makes of it"


@pytest.mark.parametrize(("target", "delta"), [("1.01", "0.05"), ("-0.1", "0.05"), ("0.9", "0"), ("0.9", "1")])
def test_a_promise_of_nothing_is_refused(target: str, delta: str) -> None:
    with pytest.raises(ValueError, match="write a target from 0 to 1"):
        Promise.parse(target, delta)


def test_ten_million_documents_are_planned_within_a_minute() -> None:
    start = perf_counter()
    found = plan(USUAL, 10_000_000)
    assert perf_counter() - start < 60
    assert found.allowed == 500_000
    assert 15_000 < found.size < 16_000


# The order


def test_the_order_is_by_confidence_invalid_answers_last_ties_by_the_salt() -> None:
    candidates = [Candidate(f"d{number}", (None, 1.0, 0.5)[number % 3]) for number in range(30)]
    orders = [[one.document for one in freeze(candidates, salt)] for salt in (b"a", b"b")]
    confidence = {one.document: one.confidence for one in candidates}
    for order in orders:
        assert [confidence[name] for name in order] == [1.0] * 10 + [0.5] * 10 + [None] * 10
    assert orders[0] != orders[1]
    assert orders[0] == [one.document for one in freeze(reversed(candidates), b"a")]


def test_an_order_has_one_hash_and_another_order_another() -> None:
    orders = [["a", "bc"], ["ab", "c"], ["bc", "a"], ["abc"], []]
    assert len({order_hash(order) for order in orders}) == len(orders)
    assert order_hash(iter(["a", "bc"])) == order_hash(["a", "bc"])


# The certificate


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    planned = plan(USUAL, 400, fields=2)
    sampled = draw(b"seed", 400, planned.size)
    findings = [Finding("a", sampled[5::9]), Finding("b", sampled[-20:])]
    order = order_hash(f"d{number}" for number in range(400))
    return certify(planned, SUBJECT, order, b"seed", findings, 0.7, planned.risk)


def test_a_certificate_as_issued_holds(certificate: Certificate) -> None:
    assert check(certificate, certificate.order, SUBJECT) == []
    assert 0 < certificate.cut < 400


def forgeries(issued: Certificate) -> Iterator[tuple[str, Certificate]]:
    planned, first = issued.plan, issued.findings[0]
    assert planned.allowance is not None
    assert issued.tail is not None
    yield "the cut is at", replace(issued, cut=issued.cut + 1)
    yield "the cut is at", replace(issued, findings=(replace(first, ranks=first.ranks[1:]), issued.findings[1]))
    yield "findings about 1 of 2 fields", replace(issued, findings=(first,))
    yield "not in order", replace(issued, findings=(replace(first, ranks=(*first.ranks, first.ranks[-1])), first))
    yield "the seed does not draw", replace(issued, seed=b"other".hex())
    yield "the sample allows", replace(issued, plan=replace(planned, allowance=planned.allowance + 1))
    yield "the sample allows", replace(issued, plan=replace(planned, promise=Promise.parse("0.95", "0.01")))
    yield "the chance to fail", replace(issued, tail=issued.tail / 2)


@pytest.mark.parametrize("number", range(8))
def test_a_certificate_that_was_changed_does_not_hold(certificate: Certificate, number: int) -> None:
    said, forged = list(forgeries(certificate))[number]
    assert any(said in problem for problem in check(forged, certificate.order, SUBJECT))


def test_a_certificate_is_void_in_another_order_for_another_model_or_prompt(certificate: Certificate) -> None:
    other = order_hash(["d0"])
    assert any("was certified" in problem for problem in check(certificate, other, SUBJECT))
    for changed in (replace(SUBJECT, models=("deepseek-flash", "x")), replace(SUBJECT, prompt_version="sha256:x")):
        assert any("new certificate" in problem for problem in check(certificate, certificate.order, changed))


def test_several_fields_share_delta_and_the_worst_one_cuts() -> None:
    one, two = plan(USUAL, 2_000, size=220), plan(USUAL, 2_000, size=220, fields=2)
    assert two.allowance == allowance(2_000, 100, 220, Fraction(1, 40))
    assert two.allowance is not None
    assert one.allowance is not None
    assert two.allowance < one.allowance
    assert find_cut(two, [Finding("a", ()), Finding("b", tuple(range(300, 320)))]) == 300 + two.allowance
    with pytest.raises(ValueError, match="the plan is for 2 fields"):
        find_cut(two, [Finding("a", ())])


# The other rules


def test_money_decides_the_cut_and_the_sample_what_can_be_certified_for_it() -> None:
    """Every layout and every sample again: more is left wrong than was certified in at most delta of the samples."""
    population, size, calls = 8, 4, 6
    cut, delta = cut_for(calls, population, size), Fraction(1, 5)
    assert cut == 6
    certified = [smallest_allowed(population, size, passed, delta) for passed in range(size + 1)]
    for bits in range(2**population):
        errors = [rank for rank in range(population) if bits >> rank & 1]
        samples = [frozenset(sample) for sample in combinations(range(population), size)]
        broken = 0
        for sampled in samples:
            passed = sum(rank < cut and rank in sampled for rank in errors)
            broken += left_wrong(errors, sampled, cut) > certified[passed]
        assert Fraction(broken, len(samples)) <= delta


@pytest.mark.parametrize(("calls", "cut"), [(30, 100), (31, 99), (100, 30), (130, 0), (1_000, 0)])
def test_more_money_than_the_sample_takes_is_for_the_least_sure(calls: int, cut: int) -> None:
    assert cut_for(calls, 100, 30) == cut
    with pytest.raises(ValueError, match="29 calls do not pay for a sample of 30"):
        cut_for(29, 100, 30)


def test_the_smallest_that_is_certified_is_what_the_allowance_would_have_allowed() -> None:
    for passed in range(8):
        allowed = smallest_allowed(500, 120, passed, USUAL.delta)
        found, fewer = (allowance(500, left, 120, USUAL.delta) for left in (allowed, allowed - 1))
        assert found is not None
        assert found >= passed
        assert fewer is None or fewer < passed


#: Kinds of documents that come: how sure, whether the tiers disagree, and how often. Ties are where rules go wrong.
STREAM = [
    (0.9, False, Fraction(3, 10)),
    (0.9, True, Fraction(2, 10)),
    (0.5, True, Fraction(1, 10)),
    (0.5, False, Fraction(1, 10)),
    (0.1, True, Fraction(3, 10)),
]


@pytest.mark.parametrize("target", ["0.79", "0.8", "0.71", "0.6", "0.3"])
def test_a_streaming_threshold_lets_more_differ_in_at_most_delta_of_all_calibrations(target: str) -> None:
    """Every calibration of five documents, each with its exact probability."""
    promise, count, broken = Promise.parse(target, "0.4"), 5, Fraction(0)
    for drawn in product(STREAM, repeat=count):
        above = streaming_threshold([sure for sure, differs, _ in drawn if differs], count, promise)
        wrong = sum((share for sure, differs, share in STREAM if differs and sure > above), Fraction(0))
        if wrong > 1 - promise.target:
            broken += math.prod((share for _, _, share in drawn), start=Fraction(1))
    assert broken <= promise.delta


def test_too_few_documents_certify_no_threshold() -> None:
    assert streaming_allowance(58, USUAL) is None
    assert streaming_allowance(59, USUAL) == 0  # 0.95^59 is the first power below 0.05
    assert streaming_threshold([], 58, USUAL) == math.inf
    assert streaming_threshold([], 59, USUAL) == -math.inf
    assert streaming_threshold([0.3, 0.8], 59, USUAL) == 0.8


@pytest.mark.parametrize(
    ("documents", "target", "is_warned"),
    [(299, "0.8", True), (300, "0.95", False), (2_999, "0.99", True), (3_000, "0.99", False)],
)
def test_people_are_told_where_a_guarantee_eats_the_saving(documents: int, target: str, is_warned: bool) -> None:
    planned = plan(Promise.parse(target, "0.05"), documents)
    said = caution(planned)
    assert (said is not None) == is_warned
    assert said is None or f"{planned.size:,} of {documents:,}" in said


@pytest.mark.parametrize(
    ("place", "fate"),
    [
        (Place(), Fate.WAIT),
        (Place(rank=3), Fate.WAIT),
        (Place(rank=3, is_sampled=True), Fate.SAMPLE),
        (Place(rank=3, cut=4), Fate.ACCEPT),
        (Place(rank=4, cut=4), Fate.ESCALATE),
        (Place(rank=3, is_sampled=True, cut=4), Fate.SAMPLE),
    ],
)
def test_what_becomes_of_a_waiting_document_follows_from_its_place(place: Place, fate: Fate) -> None:
    assert place.fate is fate
