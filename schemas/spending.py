"""What attempts came to, added up: sums that add, and the sides that a report splits them by.

Money is integers of pico units of one currency. What is not known to be billed is a bound of its own (G8), so that a
spend is an interval: from `cost_pico` to `high_pico`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

MILLION = 10**6
Key = TypeVar("Key", bound=Hashable)


class Side(StrEnum):
    """What a spend can be split by. `hours` is the band of the price; `model` the one that served."""

    JOB = "job"
    RUN = "run"
    DAY = "day"
    TIER = "tier"
    MODEL = "model"
    PURPOSE = "purpose"
    HOURS = "hours"


@dataclass(frozen=True, slots=True)
class Sums:
    """What some attempts came to. The cost of hit, miss and output tokens makes up `cost_pico`.

    `priced_tokens` are those of attempts whose cost is known.
    """

    attempts: int = 0
    escalated: int = 0
    unknown_attempts: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_pico: int = 0
    unknown_pico: int = 0
    hit_pico: int = 0
    miss_pico: int = 0
    output_pico: int = 0
    priced_tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Sums)))

    @property
    def tokens(self) -> int:
        """All that were billed; reasoning is inside output."""
        return self.hit_tokens + self.miss_tokens + self.output_tokens

    @property
    def high_pico(self) -> int:
        """The most that it can be."""
        return self.cost_pico + self.unknown_pico

    @property
    def pico_per_million(self) -> int | None:
        """The effective price: the known cost of a million tokens as they were, hits among them.

        Tokens that nobody can price are not free: they do not count. None without any that have a price.
        """
        return per_million(self.cost_pico, self.priced_tokens)


@dataclass(frozen=True, slots=True)
class Cell:
    """Attempts of one tier, purpose and price band that came to the same."""

    tier: str
    purpose: str
    band: str | None
    signal: str | None
    verdict: str | None
    billing: str
    sums: Sums

    @property
    def waste(self) -> str | None:
        """Why these attempts bought no result: `failed`, `unknown`, or `unsure`, so that the document climbs."""
        if self.verdict == "accepted":
            return None
        if self.billing != "known":
            return "unknown"
        if self.signal != "answered" or self.verdict == "invalid_answer":
            return "failed"
        return "unsure" if self.verdict == "low_confidence" else None


@dataclass(frozen=True, slots=True)
class Line:
    """The sums of one part of a spend, and what names it: a value for each side that it is split by."""

    names: tuple[str, ...]
    sums: Sums

    def to_json(self, by: Sequence[Side]) -> dict[str, Any]:
        """One JSON object: a key for each side, then the sums, and the effective price."""
        price = {"pico_per_million_tokens": self.sums.pico_per_million}
        return dict(zip(map(str, by), self.names, strict=True)) | asdict(self.sums) | price


@dataclass(frozen=True, slots=True)
class Cost:
    """So many documents that cost about the same: at most `pico`."""

    pico: int
    documents: int


def at_most(costs: Sequence[Cost], percent: int) -> int:
    """What so many percent of the documents cost at most, of costs in ascending order. 0 without any."""
    due = percent * sum(cost.documents for cost in costs)
    counted = 0
    for cost in costs:
        counted += 100 * cost.documents
        if counted >= due:
            return cost.pico
    return 0


def add_up(cells: Iterable[Cell]) -> Sums:
    """All of them together."""
    return sum((cell.sums for cell in cells), Sums())


def split(cells: Iterable[Cell], key: Callable[[Cell], Key | None]) -> dict[Key, Sums]:
    """Their sums by whatever `key` says, the most attempts first; cells without a key are left out."""
    found: dict[Key, Sums] = {}
    for cell in cells:
        if (name := key(cell)) is not None:
            found[name] = found.get(name, Sums()) + cell.sums
    return dict(sorted(found.items(), key=lambda each: (-each[1].attempts, str(each[0]))))


def per_million(pico: int, tokens: int) -> int | None:
    """What a million of these tokens cost, rounded to the nearest pico unit. None where there are none."""
    return (2 * MILLION * pico + tokens) // (2 * tokens) if tokens else None
