"""Prices: every row to the pico, every edge of the clock, and refusal of whatever is not known."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.attempts import Usage
from schemas.errors import ConfigurationError, UnknownPrice
from schemas.money import Currency
from schemas.pricing import PRICES, Band, Price, PriceBook, load_price_book, read_price_book, reservation

USD, CNY = Currency.USD, Currency.CNY
FLASH, PRO = "deepseek-flash", "deepseek-v4-pro"
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return load_price_book()


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def amounts(price: Price) -> tuple[int, int, int]:
    return price.hit_pico, price.miss_pico, price.output_pico


# ---- the table of deepseek.md, written out a second time in pico units per token ----------------------------------

ROWS = [
    (FLASH, USD, "2026-04-24T00:00", Band.FLAT, (28_000, 140_000, 280_000)),
    (FLASH, USD, "2026-04-26T12:15", Band.FLAT, (2_800, 140_000, 280_000)),
    (FLASH, USD, "2026-08-16T16:00", Band.OFF_PEAK, (7_000, 220_000, 660_000)),
    (FLASH, USD, "2026-08-16T16:00", Band.PEAK, (14_000, 440_000, 1_320_000)),
    (FLASH, USD, "2026-09-10T04:00", Band.OFF_PEAK, (3_000, 150_000, 600_000)),
    (FLASH, USD, "2026-09-10T04:00", Band.PEAK, (6_000, 300_000, 1_200_000)),
    (PRO, USD, "2026-04-24T00:00", Band.FLAT, (145_000, 1_740_000, 3_480_000)),
    (PRO, USD, "2026-04-26T12:15", Band.FLAT, (3_625, 435_000, 870_000)),
    (PRO, USD, "2026-08-16T16:00", Band.OFF_PEAK, (22_000, 660_000, 1_980_000)),
    (PRO, USD, "2026-08-16T16:00", Band.PEAK, (44_000, 1_320_000, 3_960_000)),
    (FLASH, CNY, "2026-09-10T04:00", Band.OFF_PEAK, (20_000, 1_000_000, 4_000_000)),
    (FLASH, CNY, "2026-09-10T04:00", Band.PEAK, (40_000, 2_000_000, 8_000_000)),
    (PRO, CNY, "2026-08-16T16:00", Band.OFF_PEAK, (150_000, 4_500_000, 13_500_000)),
    (PRO, CNY, "2026-08-16T16:00", Band.PEAK, (300_000, 9_000_000, 27_000_000)),
]


@pytest.mark.parametrize(("model", "currency", "start", "band", "expected"), ROWS)
def test_every_published_row_is_in_the_book_to_the_pico(
    book: PriceBook, model: str, currency: Currency, start: str, band: Band, expected: tuple[int, int, int]
) -> None:
    by_name = {price.name: price for price in book.rows()}
    assert amounts(by_name[f"{model}/{currency}/{start}Z/{band}"]) == expected


def test_the_book_has_no_other_deepseek_rows(book: PriceBook) -> None:
    assert sum(price.model in {FLASH, PRO} for price in book.rows()) == len(ROWS)


@pytest.mark.parametrize(
    ("model", "start", "before", "since"),
    [
        (FLASH, "2026-04-26T12:15", (28_000, 140_000, 280_000), (2_800, 140_000, 280_000)),
        (FLASH, "2026-08-16T16:00", (2_800, 140_000, 280_000), (7_000, 220_000, 660_000)),
        (FLASH, "2026-09-10T04:00", (14_000, 440_000, 1_320_000), (3_000, 150_000, 600_000)),
        (PRO, "2026-04-26T12:15", (145_000, 1_740_000, 3_480_000), (3_625, 435_000, 870_000)),
        (PRO, "2026-08-16T16:00", (3_625, 435_000, 870_000), (22_000, 660_000, 1_980_000)),
    ],
)
def test_a_row_holds_from_its_first_instant_and_not_a_second_before(
    book: PriceBook, model: str, start: str, before: tuple[int, int, int], since: tuple[int, int, int]
) -> None:
    assert amounts(book.at(model, USD, utc(start) - SECOND)) == before
    assert amounts(book.at(model, USD, utc(start))) == since
    assert amounts(book.at(model, USD, utc(start) + SECOND)) == since


def test_uncertain_rows_say_what_is_uncertain(book: PriceBook) -> None:
    price = book.at(PRO, USD, utc("2026-05-01T00:00"))
    assert price.is_uncertain
    assert "assumed" in price.note
    assert not book.at(PRO, USD, utc("2026-11-24T00:00")).is_uncertain


# ---- peak hours ---------------------------------------------------------------------------------------------------


def band(book: PriceBook, instant: datetime, model: str = FLASH) -> Band:
    return book.at(model, USD, instant).band


@pytest.mark.parametrize("currency", list(Currency))
@pytest.mark.parametrize("model", [FLASH, PRO])
@pytest.mark.parametrize(
    ("edge", "before", "since"),
    [
        ("01:00", Band.OFF_PEAK, Band.PEAK),
        ("04:00", Band.PEAK, Band.OFF_PEAK),
        ("06:00", Band.OFF_PEAK, Band.PEAK),
        ("10:00", Band.PEAK, Band.OFF_PEAK),
    ],
)
def test_a_window_starts_and_ends_on_its_edge_to_the_second(
    book: PriceBook, model: str, currency: Currency, edge: str, before: Band, since: Band
) -> None:
    instant = utc(f"2026-11-24T{edge}")  # a Tuesday
    assert book.at(model, currency, instant - SECOND).band is before
    assert book.at(model, currency, instant - timedelta(microseconds=1)).band is before
    assert book.at(model, currency, instant).band is since
    assert book.at(model, currency, instant + SECOND).band is since


def has_peak(book: PriceBook, day: date) -> bool:
    bands = {band(book, datetime(day.year, day.month, day.day, hour, 30, tzinfo=UTC)) for hour in range(24)}
    return Band.PEAK in bands


@pytest.mark.parametrize("day", range(17, 23))
def test_in_the_first_week_every_day_has_peak_hours_even_saturday(book: PriceBook, day: int) -> None:
    assert has_peak(book, date(2026, 8, day))


def test_weekends_have_none_from_sunday_2026_08_23_on(book: PriceBook) -> None:
    assert has_peak(book, date(2026, 8, 22))
    assert not has_peak(book, date(2026, 8, 23))
    assert has_peak(book, date(2026, 8, 24))
    assert not any(has_peak(book, date(2026, 8, day)) for day in (29, 30))


@pytest.mark.parametrize("day", [date(2026, 9, 25), *(date(2026, 10, day) for day in range(1, 8))])
def test_public_holidays_are_off_peak_all_day(book: PriceBook, day: date) -> None:
    assert not has_peak(book, day)


@pytest.mark.parametrize("day", [date(2026, 9, 24), date(2026, 9, 28), date(2026, 9, 30), date(2026, 10, 8)])
def test_the_working_days_around_a_holiday_have_peak_hours(book: PriceBook, day: date) -> None:
    """2026's National Day holiday is 1 to 7 October; Thursday the 8th is a working day."""
    assert has_peak(book, day)


@pytest.mark.parametrize("day", [date(2026, 9, 20), date(2026, 10, 10)])
def test_a_working_day_moved_onto_a_weekend_stays_off_peak(book: PriceBook, day: date) -> None:
    assert day.weekday() >= 5
    assert not has_peak(book, day)


def test_holidays_were_not_exempt_before_2026_09_18(tmp_path: Path) -> None:
    """No 2026 holiday fell between the two exemptions, so move the exemption past one and see it become peak."""
    text = (PRICES / "deepseek.toml").read_text("utf-8")
    later = text.replace("holidays_exempt_from = 2026-09-18", "holidays_exempt_from = 2026-09-26")
    (tmp_path / "deepseek.toml").write_text(later, "utf-8")
    assert has_peak(read_price_book(tmp_path), date(2026, 9, 25))


def test_the_zone_of_the_asker_does_not_matter(book: PriceBook) -> None:
    beijing = datetime(2026, 11, 24, 9, tzinfo=timezone(timedelta(hours=8)))
    assert band(book, beijing) is Band.PEAK
    assert band(book, beijing - SECOND) is Band.OFF_PEAK


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_what_is_known(book: PriceBook) -> None:
    with pytest.raises(UnknownPrice, match=r"(?s)'deepseek-v5'.*deepseek-flash.*\[\[row\]\] or an \[\[alias\]\]"):
        book.at("deepseek-v5", USD, utc("2026-11-24T00:00"))


def test_a_dearer_sibling_is_not_priced_by_a_pattern(book: PriceBook) -> None:
    for name in ("deepseek-flash-max", "deepseek-v4-pro-plus", "deepseek-flash-10170", ""):
        with pytest.raises(UnknownPrice):
            book.canonical(name)


def test_a_date_before_the_first_row_is_refused(book: PriceBook) -> None:
    assert book.at(FLASH, USD, utc("2026-04-24T00:00"))
    with pytest.raises(UnknownPrice, match=r"first row is from 2026-04-24 00:00.*add its row"):
        book.at(FLASH, USD, utc("2026-04-24T00:00") - SECOND)


def test_cny_before_the_present_card_is_refused(book: PriceBook) -> None:
    with pytest.raises(UnknownPrice, match="deepseek-flash in CNY"):
        book.at(FLASH, CNY, utc("2026-09-10T04:00") - SECOND)


def test_a_card_is_never_converted_to_another_currency(book: PriceBook) -> None:
    with pytest.raises(UnknownPrice, match="never converted"):
        book.at("gpt-5.5", CNY, utc("2026-11-24T00:00"))


def test_a_naive_instant_is_a_programming_error(book: PriceBook) -> None:
    naive = datetime(2026, 11, 24)  # the test is about a missing time zone
    aware = utc("2026-11-24T00:00")
    for ask in (
        lambda: book.at(FLASH, USD, naive),
        lambda: book.dearest(FLASH, USD, naive, aware),
        lambda: book.dearest(FLASH, USD, aware, naive),
        lambda: book.next_change(FLASH, USD, naive),
    ):
        with pytest.raises(ValueError, match="time zone"):
            ask()


def test_where_the_holiday_calendar_ends_the_price_is_refused_with_what_to_update(book: PriceBook) -> None:
    """New Year in China is 16:00 UTC. If chinesecalendar has been updated, move this test on by a year."""
    end = utc("2026-12-31T16:00")
    assert band(book, end - SECOND) is Band.OFF_PEAK
    for instant in (end, utc("2027-01-02T12:00"), utc("2031-06-01T02:00")):
        with pytest.raises(UnknownPrice, match="pip install --upgrade chinesecalendar"):
            book.at(FLASH, USD, instant)
    with pytest.raises(UnknownPrice, match="chinesecalendar"):
        book.dearest(FLASH, USD, utc("2026-12-31T00:00"), end)
    assert book.at("self-hosted-flash-2xh100", USD, utc("2031-06-01T02:00"))


NEXT_YEAR = """
[[calendar]]
year = 2027
days_off = [2027-01-01, 2027-02-08]
source = "a test"
"""


def test_a_calendar_of_ones_own_goes_on_where_the_package_s_ends(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(NEXT_YEAR, "utf-8")
    book = load_price_book(tmp_path)
    assert [has_peak(book, date(2027, month, day)) for month, day in ((1, 1), (1, 4), (2, 7), (2, 8), (2, 9))] == [
        False, True, False, False, True,
    ]  # fmt: skip
    assert not has_peak(book, date(2026, 10, 1)), "the years before are still the package's"
    assert book.next_change(FLASH, USD, utc("2026-12-31T10:00")) == utc("2027-01-04T01:00")
    with pytest.raises(UnknownPrice, match="2028"):
        book.at(FLASH, USD, utc("2027-12-31T16:00"))


def test_the_end_of_the_calendar_is_foreseen(book: PriceBook) -> None:
    end, soon = utc("2026-12-31T16:00"), timedelta(days=60)
    assert book.known_until(FLASH, USD, end - soon, soon) is None
    assert book.known_until(FLASH, USD, end - soon + SECOND, soon) == end
    assert book.known_until(FLASH, USD, end - SECOND, soon) == end
    assert book.known_until("self-hosted-flash-2xh100", USD, end, soon) is None


def test_a_calendar_of_ones_own_is_believed_before_the_package_s(tmp_path: Path) -> None:
    """The State Council has changed a year's holidays in mid-year before, as in 2020."""
    (tmp_path / "mine.toml").write_text(NEXT_YEAR.replace("2027", "2026"), "utf-8")
    book = load_price_book(tmp_path)
    assert has_peak(book, date(2026, 10, 1))


def test_books_that_price_alike_have_one_digest_and_others_another(tmp_path: Path) -> None:
    (tmp_path / "row").mkdir()
    (tmp_path / "year").mkdir()
    (tmp_path / "row" / "mine.toml").write_text(ROW, "utf-8")
    (tmp_path / "year" / "mine.toml").write_text(NEXT_YEAR, "utf-8")
    books = [read_price_book(PRICES), *(read_price_book(PRICES, tmp_path / each) for each in ("row", "year"))]
    assert len({book.digest for book in books}) == 3
    assert books[0].digest == load_price_book().digest


def test_rows_of_ones_own_come_on_top_of_those_that_ship(tmp_path: Path, book: PriceBook) -> None:
    later = ROW.replace('"m"', f'"{FLASH}"').replace("2026-01-01", "2026-12-01")
    (tmp_path / "mine.toml").write_text(later, "utf-8")
    own = load_price_book(tmp_path)
    assert own.at(FLASH, USD, utc("2026-12-01T00:00")).miss_pico == 10**6
    assert own.at(FLASH, USD, utc("2026-11-30T23:59")) == book.at(FLASH, USD, utc("2026-11-30T23:59"))


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("deepseek-flash", FLASH),
        ("deepseek-v4-flash", FLASH),
        ("deepseek-v4-flash-vision-exp", FLASH),
        ("deepseek-flash-1017", FLASH),
        ("DeepSeek-V4.1-Flash-1017", FLASH),
        ("DeepSeek-V4.1-Flash", FLASH),
        ("DeepSeek-V4-Flash-0731", FLASH),
        ("DeepSeek-V4-Pro-0813", PRO),
        ("deepseek-v4-pro", PRO),
        ("claude-opus-4-7", "claude-opus-4.7"),
    ],
)
def test_a_served_name_leads_to_the_model_it_is_billed_as(book: PriceBook, name: str, model: str) -> None:
    for _ in range(2):  # the second answer comes from the cache
        assert book.canonical(name) == model
    assert book.at(name, USD, utc("2026-11-24T00:00")).model == model


# ---- other models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prompt", "expected"),
    [
        ("gpt-5.5", 272_000, (500_000, 5_000_000, 30_000_000)),
        ("gpt-5.5", 272_001, (1_000_000, 10_000_000, 45_000_000)),
        ("gpt-5.4-mini", 0, (75_000, 750_000, 4_500_000)),
        ("claude-opus-4.7", 0, (500_000, 5_000_000, 25_000_000)),
        ("claude-haiku-4.5", 0, (100_000, 1_000_000, 5_000_000)),
        ("kimi-k2.6", 0, (160_000, 950_000, 4_000_000)),
        ("glm-5.1", 0, (260_000, 1_400_000, 4_400_000)),
        ("step-3.5-flash", 0, (20_000, 100_000, 300_000)),
        ("qwen3.6-plus", 256_000, (50_000, 500_000, 3_000_000)),
        ("qwen3.6-plus", 256_001, (200_000, 2_000_000, 6_000_000)),
        ("qwen3.6-27b", 0, (600_000, 600_000, 3_600_000)),
        ("deepseek-v3.2", 0, (140_000, 140_000, 280_000)),
    ],
)
def test_comparison_models_have_their_launch_price_and_length_steps(
    book: PriceBook, model: str, prompt: int, expected: tuple[int, int, int]
) -> None:
    price = book.at(model, USD, utc("2026-11-24T02:00"), prompt_tokens=prompt)
    assert amounts(price) == expected
    assert price.is_what_if_only


def test_no_attempt_can_be_reserved_at_a_comparison_price(book: PriceBook) -> None:
    instant = utc("2026-11-24T02:00")
    with pytest.raises(UnknownPrice, match="what-if"):
        book.dearest("gpt-5.5", USD, instant, instant)


@pytest.mark.parametrize(
    ("model", "hourly_pico", "tokens"),
    [
        ("self-hosted-flash-2xh100", 5 * 10**12, 36_000_000),
        ("self-hosted-flash-4xh200", 14 * 10**12, 90_000_000),
        ("self-hosted-pro-8xh200", 28 * 10**12, 36_000_000),
        ("self-hosted-pro-16xh100", 40 * 10**12, 60_000_000),
    ],
)
def test_a_machine_costs_its_hour_over_its_tokens_rounded_up(
    book: PriceBook, model: str, hourly_pico: int, tokens: int
) -> None:
    price = book.at(model, USD, utc("2026-11-24T02:00"))
    assert price.hit_pico == price.miss_pico == price.output_pico
    assert (price.miss_pico - 1) * tokens < hourly_pico <= price.miss_pico * tokens
    assert price.is_uncertain
    assert "assumption" in price.note


# ---- dearest ------------------------------------------------------------------------------------------------------


def test_a_deadline_past_the_start_of_peak_reserves_at_peak(book: PriceBook) -> None:
    start = utc("2026-11-24T00:50")
    assert book.dearest(FLASH, USD, start, utc("2026-11-24T01:00") - SECOND).band is Band.OFF_PEAK
    assert book.dearest(FLASH, USD, start, utc("2026-11-24T01:00")).band is Band.PEAK


def test_a_peak_window_inside_the_interval_is_seen(book: PriceBook) -> None:
    assert book.dearest(FLASH, USD, utc("2026-11-24T00:00"), utc("2026-11-24T05:00")).band is Band.PEAK
    assert book.dearest(FLASH, USD, utc("2026-11-20T10:00"), utc("2026-11-23T01:00") - SECOND).band is Band.OFF_PEAK
    assert book.dearest(FLASH, USD, utc("2026-11-20T10:00"), utc("2026-11-23T01:00")).band is Band.PEAK


def test_a_price_cut_at_the_end_of_peak_reserves_at_the_old_peak(book: PriceBook) -> None:
    cut = utc("2026-09-10T04:00")
    dearest = book.dearest(FLASH, USD, cut - SECOND, cut + SECOND)
    assert dearest.name == "deepseek-flash/USD/2026-08-16T16:00Z/peak"
    assert book.dearest(FLASH, USD, cut, cut + SECOND).name == "deepseek-flash/USD/2026-09-10T04:00Z/off_peak"


def test_an_interval_that_ends_before_it_starts_is_a_programming_error(book: PriceBook) -> None:
    instant = utc("2026-11-24T00:50")
    with pytest.raises(ValueError, match="ends before it starts"):
        book.dearest(FLASH, USD, instant, instant - SECOND)


TWO_ROWS = """
[[row]]
model = "m"
currency = "USD"
valid_from = 2026-01-01T00:00:00Z
flat = { hit = "0", miss = "1", output = "5" }
source = "a test"
[[row]]
model = "m"
currency = "USD"
valid_from = 2026-02-01T00:00:00Z
flat = { hit = "0", miss = "2", output = "3" }
source = "a test"
[[row]]
model = "m"
currency = "USD"
valid_from = 2026-02-01T00:00:00Z
above_tokens = 1000
flat = { hit = "0", miss = "4", output = "4" }
source = "a test"
"""


def test_which_row_is_dearest_depends_on_the_bounds_of_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(TWO_ROWS, "utf-8")
    book = read_price_book(tmp_path)
    start, end = utc("2026-01-31T23:59"), utc("2026-02-01T00:01")
    assert book.dearest("m", USD, start, end, input_bound=10, max_tokens=100).output_pico == 5_000_000
    assert book.dearest("m", USD, start, end, input_bound=1000, max_tokens=100).miss_pico == 2_000_000
    assert book.dearest("m", USD, start, end, input_bound=1001, max_tokens=100).miss_pico == 4_000_000


def banded(start: str, off_peak: int, peak: int) -> str:
    return f"""
[[row]]
model = "m"
currency = "USD"
valid_from = {start}:00Z
off_peak = {{ miss = "{off_peak}", output = "1" }}
peak = {{ miss = "{peak}", output = "1" }}
source = "a test"
"""


@pytest.mark.parametrize(
    ("edge", "old", "new", "dearest"),
    [
        ("01:00", (5, 10), (1, 3), 5),  # the old row ends as peak begins: its peak price never holds
        ("04:00", (1, 2), (1, 10), 2),  # the new row begins as peak ends: its peak price does not hold yet
        ("12:00", (1, 10), (2, 20), 2),
    ],
)
def test_a_row_that_changes_on_a_band_edge_lends_no_price_it_did_not_hold(
    tmp_path: Path, edge: str, old: tuple[int, int], new: tuple[int, int], dearest: int
) -> None:
    text = PEAK + banded("2026-01-01T00:00", *old) + banded(f"2026-11-24T{edge}", *new)
    (tmp_path / "m.toml").write_text(text, "utf-8")
    instant = utc(f"2026-11-24T{edge}")
    book = read_price_book(tmp_path)
    assert book.dearest("m", USD, instant - SECOND, instant + SECOND).miss_pico == dearest * 10**6
    assert book.next_change("m", USD, instant - SECOND) == instant


INSTANTS = st.datetimes(datetime(2026, 4, 24), datetime(2026, 12, 30)).map(lambda naive: naive.replace(tzinfo=UTC))
MINUTE = timedelta(minutes=1)


@settings(deadline=None, max_examples=60)
@given(
    start=INSTANTS,
    minutes=st.integers(0, 240),
    model=st.sampled_from([FLASH, PRO]),
    bounds=st.tuples(st.integers(0, 10**6), st.integers(1, 400_000)),
)
def test_dearest_is_exactly_the_dearest_minute_of_the_interval(
    start: datetime, minutes: int, model: str, bounds: tuple[int, int]
) -> None:
    """Every edge is a whole minute, so the ends and the whole minutes between them see every price there is."""
    book = load_price_book()
    end = start + minutes * MINUTE
    whole = start.replace(second=0, microsecond=0)
    inside = [whole + n * MINUTE for n in range(1, minutes + 1) if whole + n * MINUTE <= end]
    worst = max(reservation(book.at(model, USD, instant), *bounds) for instant in (start, *inside, end))
    dearest = book.dearest(model, USD, start, end, input_bound=bounds[0], max_tokens=bounds[1])
    assert reservation(dearest, *bounds) == worst


@settings(deadline=None, max_examples=60)
@given(
    start=INSTANTS,
    length=st.timedeltas(timedelta(0), timedelta(days=20)),
    share=st.floats(0, 1),
    hit=st.integers(0, 10**6),
    miss=st.integers(0, 10**6),
    output=st.integers(0, 10**6),
)
def test_no_attempt_within_its_bounds_costs_more_than_its_reservation(
    start: datetime, length: timedelta, share: float, hit: int, miss: int, output: int
) -> None:
    book = load_price_book()
    end = min(start + length, utc("2026-12-31T00:00"))
    billed = start + (end - start) * share
    dearest = book.dearest(FLASH, USD, start, end, input_bound=hit + miss, max_tokens=output)
    cost = book.at(FLASH, USD, billed, hit + miss).cost(Usage(hit, miss, output))
    assert cost <= reservation(dearest, hit + miss, output)


# ---- when the price changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instant", "expected"),
    [
        ("2026-04-20T00:00", "2026-04-24T00:00"),  # before the first row
        ("2026-04-24T00:00", "2026-04-26T12:15"),
        ("2026-05-01T00:00", "2026-08-16T16:00"),
        ("2026-08-16T16:00", "2026-08-17T01:00"),
        ("2026-09-10T03:00", "2026-09-10T04:00"),
        ("2026-11-24T04:00", "2026-11-24T06:00"),
        ("2026-11-20T10:00", "2026-11-23T01:00"),  # over a weekend
        ("2026-09-30T10:00", "2026-10-08T01:00"),  # over the National Day holiday
        ("2026-12-31T10:00", "2026-12-31T16:00"),  # here the calendar ends
    ],
)
def test_the_next_change_is_the_next_row_or_band(book: PriceBook, instant: str, expected: str) -> None:
    assert book.next_change(FLASH, USD, utc(instant)) == utc(expected)


def test_a_flat_price_without_a_later_row_never_changes(book: PriceBook) -> None:
    assert book.next_change("glm-5.1", USD, utc("2026-11-24T00:00")) is None


@settings(deadline=None, max_examples=60)
@given(instant=INSTANTS.filter(lambda instant: instant < utc("2026-12-20T00:00")))
def test_the_price_is_the_same_until_the_next_change_and_different_at_it(instant: datetime) -> None:
    book = load_price_book()
    change = book.next_change(FLASH, USD, instant)
    assert change is not None
    now = book.at(FLASH, USD, instant)
    assert book.at(FLASH, USD, change - timedelta(microseconds=1)) == now
    assert book.at(FLASH, USD, instant + (change - instant) / 2) == now
    assert book.at(FLASH, USD, change) != now


# ---- cost ---------------------------------------------------------------------------------------------------------

TOKENS = st.integers(0, 10**7)
USAGES = st.builds(Usage, TOKENS, TOKENS, TOKENS)


@given(a=USAGES, b=USAGES, row=st.integers(0, len(load_price_book().rows()) - 1))
def test_cost_is_an_exact_integer_and_adds_up(a: Usage, b: Usage, row: int) -> None:
    price = load_price_book().rows()[row]
    both = Usage(a.hit + b.hit, a.miss + b.miss, a.output + b.output)
    assert price.cost(a) + price.cost(b) == price.cost(both)
    assert type(price.cost(a)) is int


def test_reasoning_is_inside_output_and_costs_nothing_more(book: PriceBook) -> None:
    price = book.at(FLASH, USD, utc("2026-11-24T00:00"))
    assert price.cost(Usage(1, 1, 10, reasoning=9)) == price.cost(Usage(1, 1, 10)) == 3_000 + 150_000 + 6_000_000


def test_ten_million_cold_documents_cost_what_the_design_says(book: PriceBook) -> None:
    """deepseek.md: 10M documents on a 1,500-token prefix cost $2,250 as misses and $45 as hits, off-peak."""
    price = book.at(FLASH, USD, utc("2026-11-24T00:00"))
    assert price.cost(Usage(0, 15 * 10**9, 0)) == 2_250 * 10**12
    assert price.cost(Usage(15 * 10**9, 0, 0)) == 45 * 10**12
    assert reservation(price, 1000, 10) == 1000 * 150_000 + 10 * 600_000


# ---- the files ----------------------------------------------------------------------------------------------------

ROW = """
[[row]]
model = "m"
currency = "USD"
valid_from = 2026-01-01T00:00:00Z
flat = { hit = "0.1", miss = "1", output = "2" }
source = "a test"
"""
PEAK = """
[peak]
since = 2026-01-01T00:00:00Z
windows_utc = [[01:00:00, 04:00:00]]
utc_offset_hours = 8
weekends_exempt_from = 2026-01-01
holidays_exempt_from = 2026-01-01
"""
BANDED = ROW.replace("flat", "off_peak") + 'peak = { miss = "2", output = "4" }\n'


def test_the_smallest_file_loads(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(PEAK + BANDED, "utf-8")
    assert [price.band for price in read_price_book(tmp_path).rows()] == [Band.OFF_PEAK, Band.PEAK]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW.replace('"0.1"', "0.1"), r"row\.1\.flat\.hit: 0\.1 is not exact; write the amount in quotes"),
        (ROW.replace('"0.1"', '"0.0000001"'), "not a whole number of pico units per token"),
        (ROW.replace('"0.1"', '"nan"'), "is not an amount"),
        (ROW.replace('"0.1"', '"inf"'), "is not an amount"),
        (ROW.replace('"0.1"', '"-1"'), "is not an amount"),
        (ROW.replace('"0.1"', '"free"'), "is not an amount"),
        (ROW.replace('"0.1"', '"1e-999999999"'), "is not an amount"),
        (ROW.replace('"0.1"', '"1.1"'), "hit is dearer than miss"),
        (ROW.replace("USD", "EUR"), r"row\.1\.currency"),
        (ROW.replace("00:00:00Z", "00:00:00"), r"row\.1\.valid_from"),
        (ROW.replace("00:00:00Z", "00:00:01Z"), "whole minute"),
        (ROW.replace("source", "sauce"), r"row\.1\.sauce"),
        (ROW.replace("flat", "peak"), "both off_peak"),
        (ROW + "uncertain = true", "needs a note"),
        (BANDED, r"\[peak\] does not cover it"),
        (PEAK.replace("04:00:00", "00:30:00") + BANDED, "must end after it starts"),
        (ROW + ROW, "two rows are called m/USD/2026-01-01T00:00Z/flat"),
        (ROW + "above_tokens = 5", "needs a row without above_tokens"),
        (PEAK + BANDED + ROW + "above_tokens = 5", "both flat and banded"),
        ('[[alias]]\npattern = "a"\nmodel = "b"\n' + ROW, "alias a leads to b"),
        ('[[alias]]\npattern = "m*"\nmodel = "n"\n' + ROW + ROW.replace('"m"', '"n"'), "also covers m"),
        (NEXT_YEAR.replace("2027-02-08", "2028-02-08") + ROW, r"calendar\.1: 2028-02-08: not in 2027"),
        (NEXT_YEAR + NEXT_YEAR + ROW, r"two \[\[calendar\]\] tables are of 2027"),
        ("[[row]", "m.toml: "),
        ("", ""),
    ],
)
def test_a_wrong_price_file_is_refused_with_what_to_write(tmp_path: Path, text: str, message: str) -> None:
    if text:
        (tmp_path / "m.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=message or "no price files"):
        read_price_book(tmp_path)


def test_two_files_with_peak_hours_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(PEAK + BANDED.replace('"m"', f'"{name}"'), "utf-8")
    with pytest.raises(ConfigurationError, match="only one provider"):
        read_price_book(tmp_path)


def test_the_book_is_read_once() -> None:
    assert load_price_book() is load_price_book()


def test_row_names_are_unique_and_end_in_their_band(book: PriceBook) -> None:
    names = [price.name for price in book.rows()]
    assert len(set(names)) == len(names)
    assert all(f"Z/{price.band}" in price.name for price in book.rows())


def test_a_model_lists_the_currencies_of_its_cards(book: PriceBook) -> None:
    assert book.currencies("deepseek-v4-flash") == (USD, CNY)
    assert book.currencies("gpt-5.5") == (USD,)
    assert FLASH in book.models
