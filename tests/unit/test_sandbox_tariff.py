"""The emulated provider's prices, against integers worked out by hand."""

from __future__ import annotations

import ast
from datetime import datetime
from pathlib import Path

import pytest

import sandbox
from sandbox.clock import parse_instant
from sandbox.errors import SandboxError
from sandbox.tariff import FLASH, PRO, charge_at


def at(text: str) -> datetime:
    return parse_instant(text)


@pytest.mark.parametrize(
    ("instant", "band"),
    [
        ("2026-11-25T00:59:59Z", "off-peak"),
        ("2026-11-25T01:00:00Z", "peak"),
        ("2026-11-25T03:59:59Z", "peak"),
        ("2026-11-25T04:00:00Z", "off-peak"),
        ("2026-11-25T05:59:59Z", "off-peak"),
        ("2026-11-25T06:00:00Z", "peak"),
        ("2026-11-25T09:59:59Z", "peak"),
        ("2026-11-25T10:00:00Z", "off-peak"),
        ("2026-11-28T02:00:00Z", "off-peak"),  # Saturday
        ("2026-10-01T02:00:00Z", "off-peak"),  # National Day, a Thursday
        ("2026-10-08T02:00:00Z", "peak"),  # the first working day after it
        ("2026-10-10T02:00:00Z", "off-peak"),  # a working Saturday stays off-peak
        ("2026-08-22T02:00:00Z", "peak"),  # a Saturday before weekends were exempt
        ("2026-08-23T02:00:00Z", "off-peak"),
        ("2026-08-16T15:59:59Z", "flat"),
        ("2026-11-25T10:00:00+08:00", "peak"),
    ],
)
def test_bands_change_at_the_edges_of_windows_weekends_and_holidays(instant: str, band: str) -> None:
    assert charge_at(FLASH, "USD", at(instant)).band == band


@pytest.mark.parametrize(
    ("model", "currency", "instant", "pico"),
    [
        (FLASH, "USD", "2026-04-24T00:00:00Z", (28_000, 140_000, 280_000)),
        (FLASH, "USD", "2026-04-26T12:14:59Z", (28_000, 140_000, 280_000)),
        (FLASH, "USD", "2026-04-26T12:15:00Z", (2_800, 140_000, 280_000)),
        (FLASH, "USD", "2026-08-16T16:00:00Z", (7_000, 220_000, 660_000)),
        (FLASH, "USD", "2026-09-10T03:59:59Z", (14_000, 440_000, 1_320_000)),
        (FLASH, "USD", "2026-09-10T04:00:00Z", (3_000, 150_000, 600_000)),
        (FLASH, "USD", "2026-11-25T02:00:00Z", (6_000, 300_000, 1_200_000)),
        (PRO, "USD", "2026-04-25T00:00:00Z", (145_000, 1_740_000, 3_480_000)),
        (PRO, "USD", "2026-05-01T00:00:00Z", (3_625, 435_000, 870_000)),
        (PRO, "USD", "2026-11-25T00:00:00Z", (22_000, 660_000, 1_980_000)),
        (PRO, "USD", "2026-11-25T02:00:00Z", (44_000, 1_320_000, 3_960_000)),
        (FLASH, "CNY", "2026-11-25T02:00:00Z", (40_000, 2_000_000, 8_000_000)),
        (PRO, "CNY", "2026-11-25T00:00:00Z", (150_000, 4_500_000, 13_500_000)),
    ],
)
def test_prices_are_whole_pico_units_per_token(
    model: str, currency: str, instant: str, pico: tuple[int, int, int]
) -> None:
    price = charge_at(model, currency, at(instant)).price
    assert (price.hit, price.miss, price.output) == pico


@pytest.mark.parametrize(
    ("currency", "instant"),
    [
        ("USD", "2026-04-23T23:59:59Z"),
        ("CNY", "2026-09-01T00:00:00Z"),
        ("USD", "2031-01-02T02:00:00Z"),
        ("USD", "2031-01-02T12:00:00Z"),  # an evening
        ("USD", "2031-01-04T02:00:00Z"),  # a Saturday
    ],
)
def test_an_instant_without_a_row_or_a_calendar_has_no_price(currency: str, instant: str) -> None:
    with pytest.raises(SandboxError):
        charge_at(FLASH, currency, at(instant))


def test_the_emulator_imports_nothing_of_the_product() -> None:
    forbidden = {"schemas", "tasks", "flows", "farthing", "migrations"}
    for path in Path(sandbox.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, path
