"""Public price maps against our book: what they say is read digit by digit, and told with dates."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from schemas.errors import ConfigurationError
from schemas.pricing import load_price_book
from schemas.public_prices import Amounts, Comparison, compare, read_map

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SINCE = datetime(2026, 11, 20, tzinfo=UTC)
FLASH = Amounts(Decimal(3_000), Decimal(150_000), Decimal(600_000))
#: As LiteLLM's file is written: the first entry explains the others, numbers are floats per token.
LITELLM = """{
    "sample_spec": {"litellm_provider": "one of", "mode": "one of", "input_cost_per_token": 0.0},
    "azure/deepseek-flash": {"litellm_provider": "azure", "input_cost_per_token": 1e-06},
    "deepseek/deepseek-flash": {"litellm_provider": "deepseek", "input_cost_per_token": %s,
        "cache_read_input_token_cost": 3e-09, "output_cost_per_token": 6e-07, "mode": "chat"},
    "deepseek/deepseek-v4-pro": {"litellm_provider": "deepseek", "input_cost_per_token": 1.32e-06,
        "input_cost_per_token_cache_hit": 4.4e-08, "output_cost_per_token": 3.96e-06},
    "deepseek-old": {"litellm_provider": "deepseek", "input_cost_per_token": 1e-07, "output_cost_per_token": 2e-07}
}"""


def model_prices(**rates: float) -> dict[str, Any]:
    """As the snapshot of model-prices is written: floats per million tokens, dated, with peak hours."""
    standard = [
        {"start": None, "rates": {"input": 0.22, "output": 0.66, "cache_read": 0.007, "valid_from": "…"}},
        {"start": "2026-09-10T04:00:00Z", "rates": {"input": 0.15, "output": 0.6, "cache_read": 0.003} | rates},
    ]
    schedule = {
        "provider": "deepseek",
        "valid_from": "2026-08-16T16:00:00Z",
        "peak_hours_utc": [["01:00", "04:00"], ["06:00", "10:00"]],
        "peak_multiplier": 2,
        "weekdays_only": True,
        "holidays": "cn",
    }
    return {
        "schema": 1,
        "prices": {"deepseek": {"deepseek-flash": {"standard": standard}, "deepseek-v9": {"standard": standard}}},
        "schedules": {
            "schedule": [schedule],
            "holidays": {"cn": {"dates": ["2026-10-01", "2026-10-02"], "utc_offset_hours": 8}},
        },
    }


def check(text: str, since: datetime = SINCE, at: datetime = NOW) -> Comparison:
    return compare(load_price_book(), read_map(text), since, at)


def test_a_price_that_is_the_same_is_no_difference_however_its_digits_are_written() -> None:
    """0.15 / 10**6 is no binary fraction; as decimals 1.5e-07 and 0.00000015 are one."""
    for written in ("1.5e-07", "0.00000015", "1.50e-7"):
        found = check(LITELLM % written)
        assert (found.map, found.differences) == ("LiteLLM", ())
        assert found.compared == ("deepseek-flash", "deepseek-v4-pro")  # of which one has the price of peak hours
        assert found.unknown == ("deepseek-old",)


def test_a_last_digit_that_differs_is_told_with_the_row_and_its_date() -> None:
    (found,) = check(LITELLM % "1.500001e-07").differences
    assert (found.model, found.row) == ("deepseek-flash", "deepseek-flash/USD/2026-09-10T04:00Z/off_peak")
    assert (found.since, found.until) == (datetime(2026, 9, 10, 4, tzinfo=UTC), None)
    assert (found.ours, found.theirs) == (FLASH, Amounts(Decimal(3_000), Decimal("150000.1"), Decimal(600_000)))


def test_dated_prices_agree_hour_by_hour_with_peaks_weekends_and_holidays() -> None:
    found = check(
        json.dumps(model_prices()), since=datetime(2026, 9, 28, tzinfo=UTC), at=datetime(2026, 10, 2, tzinfo=UTC)
    )
    assert (found.map, found.compared, found.unknown) == ("model-prices", ("deepseek-flash",), ("deepseek-v9",))
    assert found.differences == ()
    assert check(json.dumps(model_prices())).differences == ()


def test_a_dated_price_that_differs_is_told_for_each_time_it_does() -> None:
    at = datetime(2026, 11, 25, 3, 45, tzinfo=UTC)
    found = check(json.dumps(model_prices(output=0.61)), since=datetime(2026, 11, 25, tzinfo=UTC), at=at).differences
    assert [(each.since.hour, each.until and each.until.hour) for each in found] == [(0, 1), (1, None)]
    assert [each.theirs.output for each in found] == [Decimal(610_000), Decimal(1_220_000)]
    assert [each.row.rpartition("/")[2] for each in found] == ["off_peak", "peak"]


def test_a_holiday_that_only_one_knows_differs_in_its_peak_hours() -> None:
    written = model_prices()
    written["schedules"]["holidays"]["cn"]["dates"].append("2026-11-24")
    found = check(json.dumps(written)).differences
    assert [(f"{each.since:%d %H}", f"{each.until:%d %H}") for each in found if each.until] == [
        ("24 01", "24 04"),
        ("24 06", "24 10"),
    ]
    assert {each.theirs for each in found} == {FLASH}


def test_a_price_change_that_only_one_knows_differs_from_then_on() -> None:
    written = model_prices()
    new = {"start": "2026-11-25T11:00:00Z", "rates": {"input": 0.1, "output": 0.6, "cache_read": 0.003}}
    written["prices"]["deepseek"]["deepseek-flash"]["standard"].append(new)
    (found,) = check(json.dumps(written)).differences
    assert (found.since, found.until) == (datetime(2026, 11, 25, 11, tzinfo=UTC), None)
    assert found.theirs.miss == 100_000


@pytest.mark.parametrize("missing", [True, False])
def test_what_has_no_beginning_has_always_been_so(missing: bool) -> None:
    written = model_prices()
    (schedule,), standard = (
        written["schedules"]["schedule"],
        written["prices"]["deepseek"]["deepseek-flash"]["standard"],
    )
    del standard[0]
    for entry, name in ((schedule, "valid_from"), (standard[0], "start")):
        entry[name] = None
        if missing:
            del entry[name]
    assert check(json.dumps(written)).differences == ()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2, "schedules": {}}', '{"schema": 1, "schedules": {}, "prices": {}}', "not json"],
)
def test_what_is_no_price_map_is_refused_with_what_is_wanted(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"model_prices_and_context_window\.json"):
        read_map(text)
