"""Booking a reply: what it cost, exactly, or the most it can have cost, and whether the provider's word is odd.

Known cost is tokens × one price row, in integers (G7). Where no usage came back and the request may have been
billed, the reservation stays as the bound (G8): unknown is a state, never zero. A provider whose usage cannot be
true is trusted with no further attempt (design: ledger.md, "Hard budget", 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.attempts import NOT_BILLED, Reply, Signal
from schemas.errors import UnknownPrice
from schemas.money import Currency
from schemas.pricing import Price, PriceBook


@dataclass(frozen=True, slots=True)
class Booking:
    """`cost` in pico units, or None with the `bound`. `alarm` says why the run must stop, where it must."""

    price: Price | None
    cost: int | None
    bound: int | None
    alarm: str | None = None

    @property
    def used(self) -> int:
        """What this takes out of the budget: the cost, or its bound while unknown."""
        return self.cost if self.cost is not None else self.bound or 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """What was set aside for an attempt: its worst case in pico units, and the output bound behind it in tokens."""

    worst: int
    max_tokens: int


def book_reply(reply: Reply, model: str, currency: Currency, reserved: Reserved, book: PriceBook) -> Booking:
    """Book a reply to a request for `model`, by the model that served it at the provider's completion instant."""
    if reply.usage is None:
        return _book_without_usage(reply, reserved)
    try:
        served = book.canonical(reply.served_model or model)
        tokens = reply.usage.hit + reply.usage.miss
        price = book.at(served, currency, reply.completed_at, prompt_tokens=tokens)
        if price.is_what_if_only:
            raise UnknownPrice(f"{served} served, and its price is for what-if comparisons only: look at the ladder")
    except UnknownPrice as error:
        return Booking(None, None, reserved.worst, alarm=str(error))
    cost = price.cost(reply.usage)
    if cost > reserved.worst:
        return Booking(
            price, cost, None, alarm=f"an attempt cost {cost} pico, more than the {reserved.worst} reserved"
        )
    if reply.usage.output > reserved.max_tokens:
        return Booking(
            price, cost, None, alarm=f"{reply.usage.output} output tokens came back of {reserved.max_tokens} allowed"
        )
    return Booking(price, cost, None)


def _book_without_usage(reply: Reply, reserved: Reserved) -> Booking:
    is_refusal_without_work = reply.signal is Signal.REFUSED and reply.http_status != 200
    if reply.signal in NOT_BILLED or is_refusal_without_work:
        return Booking(None, 0, None)
    return Booking(None, None, reserved.worst, alarm=reply.usage_fault)
