"""The customer's account: key, balance, and the concurrency it buys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal

from sandbox.bill import Bill
from sandbox.tariff import FLASH, PRO
from sandbox.wire import Refusal

KEY_PREFIX = "sk-sandbox"


@dataclass
class Account:
    """One account. `funded_pico` was paid in; what the bill says has been spent of it.

    `peak` is the most requests that ran at once since the limits were last set.
    Below `full_pico` of balance the ceilings shrink in proportion, as DeepSeek's do; the law is this emulator's.
    """

    bill: Bill
    funded_pico: int
    api_key: str | None = None
    full_pico: int = 10 * 10**12
    limits: dict[str, int] = field(default_factory=lambda: {FLASH: 2_500, PRO: 500})
    in_flight: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)

    @property
    def balance_pico(self) -> int:
        return self.funded_pico - self.bill.cost_pico

    def check_key(self, header: str | None) -> None:
        """Raises Refusal 401 unless the bearer token is the account's."""
        key = (header or "").removeprefix("Bearer ").strip()
        is_ours = key == self.api_key if self.api_key else key.startswith(KEY_PREFIX)
        if not is_ours or not (header or "").startswith("Bearer "):
            shown = f"****{key[-4:]}" if len(key) > 8 else "****"
            raise Refusal(401, f"Authentication Fails, Your api key: {shown} is invalid", "authentication_error")

    def check_balance(self) -> None:
        if self.balance_pico <= 0:
            raise Refusal(402, "Insufficient Balance", "unknown_error")

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Other limits for these models, or the same: the peaks are counted anew."""
        self.limits.update(limits)
        self.peak = self.in_flight.copy()

    def ceiling(self, model: str) -> int:
        """Requests of one model that may run at once."""
        limit = self.limits[model]
        return min(limit, max(1, limit * self.balance_pico // self.full_pico))

    @contextmanager
    def slot(self, model: str) -> Iterator[None]:
        """One place among the running requests. Raises Refusal 429 over the ceiling."""
        ceiling = self.ceiling(model)
        if self.in_flight[model] >= ceiling:
            raise over_ceiling(ceiling, self.in_flight[model] + 1, ceiling < self.limits[model])
        self.in_flight[model] += 1
        self.peak[model] = max(self.peak[model], self.in_flight[model])
        try:
            yield
        finally:
            self.in_flight[model] -= 1

    def on_wire(self) -> dict[str, object]:
        """`GET /user/balance`: both currencies, as strings; only one is funded."""
        funded = format(max(Decimal(self.balance_pico).scaleb(-12), Decimal(0)), ".2f")
        rows = [
            {"currency": currency, "total_balance": total, "granted_balance": "0.00", "topped_up_balance": total}
            for currency, total in (
                (currency, funded if currency == self.bill.currency else "0.00") for currency in ("CNY", "USD")
            )
        ]
        return {"is_available": self.balance_pico > 0, "balance_infos": rows}


def over_ceiling(ceiling: int, current: int, is_by_balance: bool = True) -> Refusal:
    """The 429 that tells the ceiling in its text, which is the only place where it is told."""
    why = " based on your remaining balance. Please top up your balance to restore your concurrency."
    return Refusal(
        429,
        f"Too many requests. Your current concurrency is {current}, which exceeds your concurrency limit of "
        f"{ceiling}{why if is_by_balance else '.'}",
        "rate_limit_error",
    )
