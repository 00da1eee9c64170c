"""What a seed draws before anything begins: how much there is to do, and what goes wrong how often and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

#: Instants to begin at: off-peak for hours, a little before a peak begins or ends, in mid-peak.
BEGINNINGS = tuple(
    datetime.fromisoformat(instant).replace(tzinfo=UTC)
    for instant in ("2026-09-26 00:10", "2026-09-24 00:59", "2026-09-24 03:59", "2026-09-24 02:00")
)
#: What a tier may answer, besides well, with the share of seeds in which it does.
REPLIES = {
    "unsure": 0.7,
    "invalid": 0.4,
    "blank": 0.3,
    "truncated": 0.3,
    "interrupted": 0.3,
    "interrupted_unbilled": 0.2,
    "refused": 0.2,
    "refused_unread": 0.2,
    "rate_limited": 0.4,
    "unavailable": 0.4,
    "failed": 0.3,
    "not_sent": 0.3,
    "lost": 0.4,
    "slow": 0.2,
    "malformed": 0.2,
    "rejected": 0.15,
    "unauthorised": 0.04,
    "no_balance": 0.08,
    "other_model": 0.15,
    "foreign_model": 0.04,
    "unmetered": 0.1,
    "impossible_usage": 0.05,
    "too_much_output": 0.05,
    "poisonous": 0.1,
}
#: How a seed's share of an ill is drawn: mostly little, sometimes nearly always.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Plan:
    """All that a seed has drawn before anything begins. Shares are of replies, or of calls to the ledger."""

    documents: int
    shard_rows: int
    lanes: int
    concurrency: int
    cap: int
    is_long_prefix: bool
    begins_at: datetime
    calm_after_s: float
    replies: dict[str, float]
    refused: float
    forgotten: float
    slow: float
    outages: tuple[tuple[float, float], ...]
    is_full: bool
    mishaps: tuple[tuple[float, str], ...]
    doomed: float
    fences_itself: bool
    unfit: frozenset[int]
    twins: frozenset[int]
    damaged: float
    #: Lanes that do not know of one another, as of several starts: each is to have all, until it hears of the others.
    are_strangers: bool

    @classmethod
    def draw(cls, chance: Random) -> Plan:
        documents = chance.choice((1, 4, 8, 12, 25))
        calm_after_s = chance.uniform(5, 60)
        kinds = ("kill", "cut", "interrupt", "interrupt_twice", "pause", "bury", "storm", "limit", "cap")
        mishaps = (
            (chance.uniform(0, calm_after_s), chance.choice(kinds)) for _ in range(chance.choice((0, 1, 2, 4)))
        )
        outages = (
            (at := chance.uniform(0, calm_after_s), at + chance.uniform(1, 25))
            for _ in range(chance.choice((0, 0, 1, 2)))
        )
        return cls(
            documents=documents,
            shard_rows=chance.choice((3, 7, 30)),
            lanes=chance.choice((1, 1, 2, 3)),
            concurrency=chance.choice((1, 3, 8, 20)),
            cap=int(10 ** chance.uniform(8.5, 10.5)) if chance.random() < 0.3 else 10**12,
            is_long_prefix=chance.random() < 0.5,
            begins_at=chance.choice(BEGINNINGS),
            calm_after_s=calm_after_s,
            replies={name: chance.choice(SHARES) for name, often in REPLIES.items() if chance.random() < often},
            refused=chance.choice((0, 0, 0.02, 0.1, 0.3)),
            forgotten=chance.choice((0, 0, 0.02, 0.1, 0.3)),
            slow=chance.choice((0, 0, 0.05, 0.2)),
            outages=tuple(outages),
            is_full=chance.random() < 0.3,
            mishaps=tuple(sorted(mishaps)),
            doomed=chance.choice((0, 0, 0.3, 0.8)),
            fences_itself=chance.random() < 0.7,
            unfit=frozenset(n for n in range(documents) if chance.random() < 0.05),
            twins=frozenset(n for n in range(1, documents) if chance.random() < 0.05),
            damaged=chance.choice((0, 0, 0, 0, 0.1)),
            are_strangers=chance.random() < 0.3,
        )
