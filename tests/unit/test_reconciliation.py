"""Reconciling is exact: shares add up to the export, within bounds; what does not add up stays unknown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.attempts import Usage
from schemas.money import Currency
from schemas.pricing import Price, load_price_book, reservation
from schemas.reconciliation import (
    BookedTokens,
    Correction,
    Match,
    Reconciliation,
    Shared,
    Status,
    Unsettled,
    reconcile,
)
from schemas.statements import Bucket, Period, Statement, Used

BOOK = load_price_book()
FLASH, PRO = "deepseek-flash", "deepseek-v4-pro"
#: A Thursday: off-peak at six in the evening, peak from 01:00 to 04:00 UTC.
NOON, PEAK = datetime(2026, 9, 24, 18, tzinfo=UTC), datetime(2026, 9, 24, 2, tzinfo=UTC)
DAY = NOON.date()
DAY_START = datetime(2026, 9, 24, tzinfo=UTC)
WHOLE = (datetime(2026, 9, 1, tzinfo=UTC), datetime(2026, 9, 30, 23, tzinfo=UTC))


def price_at(instant: datetime, model: str = FLASH) -> Price:
    return BOOK.at(model, Currency.USD, instant)


def booked(instant: datetime, tokens: Usage, model: str = FLASH, user_id: str = "job-a") -> BookedTokens:
    price = price_at(instant, model)
    prices = Usage(price.hit_pico, price.miss_pico, price.output_pico)
    return BookedTokens(instant.date(), user_id, price.name, model, prices, tokens)


def unsettled(
    number: int, instant: datetime, bound: int = 10**9, model: str = FLASH, user: str = "job-a"
) -> Unsettled:
    return Unsettled(1, number, 1, user, model, bound, instant, is_open=False)


def used(instant: datetime, tokens: Usage, model: str = FLASH, user_id: str = "the account") -> list[Used]:
    price, hour = price_at(instant, model), instant.replace(minute=0, second=0)
    prices = (price.hit_pico, price.miss_pico, price.output_pico)
    return [
        Used(Period(hour, hour + timedelta(hours=1)), model, user_id, "", bucket, pico, count)
        for bucket, pico, count in zip(Bucket, prices, (tokens.hit, tokens.miss, tokens.output), strict=True)
        if count
    ]


def statement(*parts: Sequence[Used]) -> Statement:
    """These, between a first and a last hour of the month in which others were at work on other days."""
    edges = [used(start, Usage(0, 1, 0))[0] for start in WHOLE]
    return Statement((*(each for part in parts for each in part), *edges), (), ("e.zip (sha256:0)",))


def compare(
    ours: Sequence[BookedTokens], open_ones: Sequence[Unsettled], theirs: Statement, **options: bool
) -> Reconciliation:
    days = {each.day for each in ours} | {each.placed_at.date() for each in open_ones}
    days -= {start.date() for start in WHOLE}
    return reconcile(ours, open_ones, theirs, BOOK, Currency.USD, days, **{"is_alone": True} | options)


def statuses(found: Reconciliation) -> set[Status]:
    return {each.status for each in found.matches}


TOKENS = st.builds(Usage, st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 10**4))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([NOON, PEAK]), st.sampled_from([FLASH, PRO]), TOKENS, TOKENS, st.integers(0, 9))
    ),
    st.booleans(),
)
def test_what_unknown_attempts_were_billed_is_booked_to_the_token(
    attempts: list[tuple[datetime, str, Usage, Usage, int]], by_request: bool
) -> None:
    """Each is known and as billed, or unknown and within its bound; the export is a sum over all of them."""
    ours, open_ones, theirs = [], [], []
    for number, (instant, model, known, lost, minute) in enumerate(attempts):
        ours.append(booked(instant, known, model))
        price = price_at(instant, model)
        bound = price.cost(lost) + reservation(price, 10 * number + 2, 2)  # room for what rounding gives another
        open_ones.append(unsettled(number, instant + timedelta(minutes=minute), bound, model))
        user = "job-a" if by_request else "the account"
        theirs += [*used(instant, known, model, user), *used(instant, lost, model, user)]
    found = compare(ours, open_ones, statement(theirs))
    assert found.is_by_user is (by_request and bool(theirs))
    if not any("above their bounds" in why for why in found.left):
        assert found.left == {}
        assert found.is_clean
        assert found.closed_pico == sum(price_at(at, model).cost(lost) for at, model, _, lost, _ in attempts)
        assert found.ours_pico + found.closed_pico == found.theirs_pico
        assert len({each.of for each in found.closings}) == len(attempts)
    assert all(0 <= each.amount_pico <= each.of.bound_pico for each in found.closings)


def test_an_attempt_at_the_edge_of_the_hours_or_the_day_is_closed_where_it_was_billed() -> None:
    """Sent in peak hours, or before midnight, and billed after."""
    before_end = datetime(2026, 9, 24, 3, 55, tzinfo=UTC)
    off_peak = datetime(2026, 9, 24, 4, 2, tzinfo=UTC)
    (closing,) = compare([], [unsettled(1, before_end)], statement(used(off_peak, Usage(0, 100, 5)))).closings
    assert closing.price == price_at(off_peak) != price_at(before_end)
    midnight = datetime(2026, 9, 24, 23, 59, tzinfo=UTC)
    after = midnight + timedelta(minutes=2)
    found = reconcile(
        [],
        [unsettled(1, midnight)],
        statement(used(after, Usage(0, 9, 1))),
        BOOK,
        Currency.USD,
        {DAY, after.date()},
        is_alone=True,
    )
    assert [each.billed_on for each in found.closings] == [after.date()]


def test_what_was_not_billed_is_closed_by_nothing() -> None:
    known = Usage(10, 20, 5)
    found = compare([booked(NOON, known)], [unsettled(1, NOON)], statement(used(NOON, known)))
    assert [(each.amount_pico, each.tokens) for each in found.closings] == [(0, Usage(0, 0, 0))]
    assert "nothing beyond the known" in found.closings[0].evidence


KNOWN = Usage(10, 20, 5)


@pytest.mark.parametrize(
    ("theirs", "why", "status"),
    [
        (used(NOON, Usage(10, 20, 4)), "fewer tokens", Status.DIFFERS),
        (used(NOON, Usage(10, 10**6, 5)), "more of that day and price than they can have cost", Status.DIFFERS),
        ([], "fewer tokens", Status.OURS_ONLY),
        ([*used(NOON, KNOWN), *used(PEAK, KNOWN)], "differ on that day by what they cannot", Status.THEIRS_ONLY),
    ],
)
def test_a_day_that_does_not_add_up_closes_nothing_and_says_why(theirs: list[Used], why: str, status: Status) -> None:
    found = compare([booked(NOON, KNOWN)], [unsettled(1, NOON)], statement(theirs))
    assert found.closings == ()
    assert [why in told for told in found.left] == [True]
    assert status in statuses(found)
    assert not found.is_clean


def test_an_hour_that_the_export_does_not_reach_is_left_unless_its_user_knows_that_it_is_complete() -> None:
    early = Statement(tuple(used(PEAK, KNOWN)), (), ("e.zip",))
    ours, late = [booked(PEAK, KNOWN)], unsettled(1, NOON)
    assert ["may be of another hour" in why for why in compare(ours, [late], early).left] == [True]
    assert len(compare(ours, [late], early, is_complete=True).closings) == 1
    begun = statement_of(PEAK, NOON + timedelta(hours=1))
    assert len(compare(ours, [late], begun).closings) == 1
    under_way = replace(late, is_open=True)
    assert compare(ours, [under_way], early, is_complete=True).closings == ()


def statement_of(*hours: datetime) -> Statement:
    return Statement(tuple(each for hour in hours for each in used(hour, KNOWN)), (), ("e.zip",))


@pytest.mark.parametrize(
    ("rows", "crashed"),
    [
        ([PEAK, NOON], NOON + timedelta(minutes=20)),  # exported at 18:40, with the hour from 18:00 half full
        ([PEAK, NOON], NOON - timedelta(minutes=5)),  # what it was billed may be of that hour
        ([NOON, NOON + timedelta(hours=2)], PEAK),  # of a day in Beijing, which begins at 16:00 in UTC
    ],
)
def test_a_row_that_was_not_over_when_it_was_exported_proves_nothing(rows: list[datetime], crashed: datetime) -> None:
    ours, theirs = [booked(hour, KNOWN) for hour in rows], statement_of(*rows)
    found = compare(ours, [unsettled(1, crashed)], theirs)
    assert found.closings == ()
    assert ["may be of another hour" in why for why in found.left] == [True]
    assert [
        each.amount_pico for each in compare(ours, [unsettled(1, crashed)], theirs, is_complete=True).closings
    ] == [0]


def test_a_day_in_one_row_may_not_have_been_over() -> None:
    whole, second = (
        replace(used(NOON, KNOWN)[0], period=Period(DAY_START, DAY_START + timedelta(days=1))),
        used(PEAK, KNOWN),
    )
    assert Statement((whole, *second), ()).until == DAY_START


def test_what_may_be_of_the_next_month_or_is_under_way_keeps_the_rest_of_its_day_unknown() -> None:
    late = datetime(2026, 9, 24, 23, 55, tzinfo=UTC)
    theirs = statement(used(NOON, Usage(0, 50, 5)), used(NOON, Usage(0, 50, 5), PRO))
    ones = [unsettled(1, NOON), unsettled(2, late), unsettled(3, NOON, model=PRO)]
    found = reconcile([], ones, theirs, BOOK, Currency.USD, {DAY}, is_alone=True)
    assert [each.of.document_no for each in found.closings] == [3]  # another model's day is another matter
    assert {why.partition(":")[0]: [each.document_no for each in left] for why, left in found.left.items()} == {
        "they may be of the next month": [2],
        "others that stay unknown may have been billed on that day, too": [1],
    }
    both = reconcile([], ones, theirs, BOOK, Currency.USD, {DAY, DAY + timedelta(days=1)}, is_alone=True)
    assert (len(both.closings), both.left) == (3, {})


def test_others_on_the_account_are_told_apart_by_user_id_and_counted_beside() -> None:
    theirs = [*used(NOON, KNOWN, user_id="job-a"), *used(NOON, Usage(0, 7, 0), user_id="job-of-others")]
    found = compare([booked(NOON, KNOWN)], [], statement(theirs))
    assert (found.is_clean, statuses(found)) == (True, {Status.MATCHED})
    assert found.others_pico == 7 * price_at(NOON).miss_pico


def test_the_name_of_a_model_may_be_an_alias_and_an_unknown_one_is_theirs_only() -> None:
    alias = [replace(each, model="deepseek-v4-flash") for each in used(NOON, KNOWN)]
    assert statuses(compare([booked(NOON, KNOWN)], [], statement(alias))) == {Status.MATCHED}
    strange = [replace(each, model="deepseek-v9") for each in used(NOON, Usage(0, 5, 0))]
    found = compare([booked(NOON, KNOWN)], [], statement(used(NOON, KNOWN), strange))
    assert [each for each in found.matches if each.status is not Status.MATCHED] == [
        Match(found.matches[-1].key, 0, 5, Status.THEIRS_ONLY)
    ]
    assert found.matches[-1].key.day == date(2026, 9, 24)


def test_what_may_be_of_another_program_on_the_account_closes_nothing_unless_its_user_says_it_is_not() -> None:
    """Within the bound of a lost attempt, a sum over the account proves nothing of it."""
    ours, lost, theirs = [booked(NOON, KNOWN)], unsettled(1, NOON), statement(used(NOON, Usage(10, 520, 55)))
    found = compare(ours, [lost], theirs, is_alone=False)
    assert (found.closings, found.is_clean) == ((), True)
    assert [("--key NAME" in why and "--alone" in why, left) for why, left in found.left.items()] == [(True, (lost,))]
    for told, options, evidence in (
        (theirs, {"is_alone": True}, "said to be of this ledger alone"),
        (replace(theirs, key="mine"), {"is_alone": False}, "API key mine"),
        (statement(used(NOON, Usage(10, 520, 55), user_id="job-a")), {"is_alone": False}, "of job-a"),
    ):
        (closing,) = compare(ours, [lost], told, **options).closings
        assert (closing.tokens, evidence in closing.evidence) == (Usage(0, 500, 50), True)


def shared(run: int, tokens: Usage, bound: int, *, is_overridden: bool = True) -> Shared:
    return Shared(run, "job-a", DAY, price_at(NOON).name, tokens, bound, is_overridden)


def test_where_a_late_reply_overrode_a_share_all_others_of_that_day_and_price_share_anew() -> None:
    """Those closed before, of two runs, and one that is unknown still: what they share is the export's."""
    theirs = statement(used(NOON, Usage(10, 130, 65)))
    before = [shared(1, Usage(0, 30, 10), 10**9), shared(2, Usage(0, 50, 20), 3 * 10**9, is_overridden=False)]
    ours = [booked(NOON, Usage(10, 20, 5)), booked(NOON, Usage(0, 80, 30))]  # of them the shares
    found = reconcile(ours, [unsettled(1, NOON)], theirs, BOOK, Currency.USD, {DAY}, is_alone=True, shared=before)
    (closing,), corrections = found.closings, {each.run: each.tokens for each in found.corrections}
    assert closing.tokens == Usage(0, 22, 12)  # a fifth of 110 and 60
    assert corrections == {1: Usage(0, -8, 2), 2: Usage(0, 16, 16)}
    assert found.ours_pico + found.closed_pico + found.corrected_pico == found.theirs_pico
    assert found.doubtful == ()


def test_what_others_may_have_used_corrects_nothing() -> None:
    ours, theirs = [booked(NOON, KNOWN)], statement(used(NOON, Usage(10, 30, 5)))
    before = [shared(1, Usage(0, 0, 0), 10**9)]
    found = reconcile(ours, [], theirs, BOOK, Currency.USD, {DAY}, shared=before)
    assert (found.bookable, found.is_clean, found.doubtful) == ((), False, (DAY,))
    assert [("--alone" in why, attempts) for why, attempts in found.left.items()] == [(True, ())]
    assert len(reconcile(ours, [], theirs, BOOK, Currency.USD, {DAY}, is_alone=True, shared=before).bookable) == 1


def test_a_part_of_a_day_corrects_nothing_whatever_the_order_of_exports() -> None:
    """A later hour of the known day is not in the first export: each would take back what the other says."""
    evening = NOON + timedelta(hours=3)
    ours = [booked(NOON, Usage(10, 20, 5)), booked(evening, Usage(0, 40, 4))]
    whole = statement(used(NOON, Usage(10, 90, 25)), used(evening, Usage(0, 40, 4)))
    part = Statement((*used(DAY_START, Usage(0, 1, 0)), *used(NOON, Usage(10, 90, 25))), (), ("part.zip",))
    before = [shared(1, Usage(0, 0, 0), 10**9)]

    def correct(theirs: Statement, made: Sequence[Correction] = (), **options: bool) -> Reconciliation:
        told = [*before, *(shared(1, each.tokens, 0, is_overridden=False) for each in made)]
        known = [*ours, *(booked(NOON, each.tokens) for each in made)]
        return reconcile(known, [], theirs, BOOK, Currency.USD, {DAY}, is_alone=True, shared=told, **options)

    first = correct(part)
    assert first.bookable == ()
    assert [("may not have all" in why, attempts) for why, attempts in first.left.items()] == [(True, ())]
    made = correct(whole).corrections
    assert [each.tokens for each in made] == [Usage(0, 70, 20)]
    assert correct(whole, made).is_clean
    assert correct(part, made).bookable == ()
    assert len(correct(part, is_complete=True).bookable) == 1


def test_a_correction_of_one_model_leaves_no_doubt_about_another_unsaid() -> None:
    """Of the one the export has fewer tokens than the ledger, so that nothing tells what its shares are."""
    ours = [booked(NOON, KNOWN), booked(NOON, KNOWN, PRO)]
    theirs = statement(used(NOON, Usage(10, 30, 5)), used(NOON, Usage(9, 20, 5), PRO))
    one = shared(1, Usage(0, 0, 0), 10**9)
    before = [one, replace(one, price=price_at(NOON, PRO).name)]
    found = reconcile(ours, [], theirs, BOOK, Currency.USD, {DAY}, is_alone=True, shared=before)
    assert [each.price.model for each in found.corrections] == [FLASH]
    assert found.doubtful == (DAY,)


def test_where_no_reply_came_late_shares_stay_as_they_are() -> None:
    ours, theirs = [booked(NOON, KNOWN)], statement(used(NOON, Usage(10, 30, 5)))
    before = [shared(1, Usage(0, 5, 0), 10**9, is_overridden=False)]
    found = reconcile(ours, [], theirs, BOOK, Currency.USD, {DAY}, is_alone=True, shared=before)
    assert (found.bookable, found.is_clean, found.doubtful) == ((), False, ())


def test_fifty_thousand_unknown_attempts_are_shared_in_a_time_that_grows_with_them() -> None:
    """To add up all of them anew for each would take minutes."""
    lost = [unsettled(number, NOON) for number in range(50_000)]
    began = time.process_time()
    found = compare([], lost, statement(used(NOON, Usage(0, 10**6, 10**5))))
    assert (len(found.closings), found.is_clean) == (50_000, True)
    assert len(compare([], [replace(each, is_open=True) for each in lost], statement()).left) == 1
    assert time.process_time() - began < 20
