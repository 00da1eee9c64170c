"""The console's export: a month of the bill as the two CSV files that DeepSeek zips for its customers.

Column sets, byte-order mark and hourly rows are as third-party parsers of the real export expect them. They do not
say whether `user_id` is the account's or the one that a request named, so it can be either; the account's is usual.
Peak and off-peak prices are separate rows.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from sandbox.bill import read_lines
from sandbox.errors import SandboxError

ACCOUNT = "00000000-0000-4000-8000-0000000005b0"
_PERIOD = ("user_id", "start_time_iso", "end_time_iso", "model")
AMOUNT = (*_PERIOD, "api_key_name", "api_key", "type", "price", "amount")
COST = (*_PERIOD, "wallet_type", "cost", "currency")
BUCKETS = (
    ("input_cache_hit_tokens", "hit", "hit_pico"),
    ("input_cache_miss_tokens", "miss", "miss_pico"),
    ("output_tokens", "output", "output_pico"),
)


@dataclass(frozen=True, slots=True, order=True)
class _Group:
    """One row of amounts: an hour, a model, a bucket and its price in pico units per token (-1 for requests)."""

    user_id: str
    hour: str
    model: str
    type: str
    price: int


def export_month(path: Path, month: str, *, by_request: bool = False) -> bytes:
    """`usage_data_YYYY-MM.zip` of the bill file's lines in that month (UTC).

    With `by_request` rows are split by the `user_id` that requests named.
    """
    amounts: Counter[_Group] = Counter()
    costs: Counter[tuple[str, str, str, str]] = Counter()
    for line in read_lines(path):
        if line["at"].startswith(month):
            _add(amounts, costs, line, line["user_id"] if by_request else ACCOUNT)
    return _zip(month, _amount_rows(amounts), _cost_rows(costs))


def newest_month(path: Path) -> str:
    """The last month that the bill has a line of. Raises SandboxError where it has none."""
    months = {str(line["at"])[:7] for line in read_lines(path)}
    if not months:
        raise SandboxError("the sandbox has billed nothing yet, so there is nothing to export: `farthing demo` first")
    return max(months)


def _add(
    amounts: Counter[_Group], costs: Counter[tuple[str, str, str, str]], line: dict[str, Any], user_id: str
) -> None:
    hour, model = line["at"][:13], line["served_model"]
    for kind, tokens, price in BUCKETS:
        amounts[_Group(user_id, hour, model, kind, line[price])] += line[tokens]
    amounts[_Group(user_id, hour, model, "request_count", -1)] += 1
    costs[user_id, hour, model, line["currency"]] += line["cost_pico"]


def _amount_rows(amounts: Counter[_Group]) -> Iterable[list[object]]:
    for group, amount in sorted(amounts.items()):
        price = "" if group.price < 0 else _units(group.price)
        key = ["sandbox", "sk-sandbox***"]
        yield [group.user_id, *_hour(group.hour), group.model, *key, group.type, price, amount]


def _cost_rows(costs: Counter[tuple[str, str, str, str]]) -> Iterable[list[object]]:
    for (user_id, hour, model, currency), cost in sorted(costs.items()):
        yield [user_id, *_hour(hour), model, "paid", _units(cost), currency]


def _hour(hour: str) -> tuple[str, str]:
    start = datetime.fromisoformat(f"{hour}:00:00+00:00")
    return start.isoformat(), (start + timedelta(hours=1)).isoformat()


def _units(pico: int) -> str:
    """Whole units, exact, never in scientific notation."""
    return format(Decimal(pico).scaleb(-12), "f")


def _zip(month: str, amounts: Iterable[list[object]], costs: Iterable[list[object]]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"amount-{month}.csv", _csv(AMOUNT, amounts))
        archive.writestr(f"cost-{month}.csv", _csv(COST, costs))
    return raw.getvalue()


def _csv(header: tuple[str, ...], rows: Iterable[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return "\ufeff" + text.getvalue()
