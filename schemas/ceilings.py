"""Ceilings: how many requests of a run may be in flight, by tier, and how much of that is one lane's.

A lane's share says how many it is to have; what it holds, by the ledger, how many it may. It takes only what nobody
else holds, and holds what it uses until that has ended, so that all together never have more than the ceiling: not
while lanes come and go, however long a reply takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Per tier. DeepSeek's largest accounts are allowed half of it.
MOST_IN_FLIGHT = 5000
#: Where there are more lanes than places, others have them after so many seconds.
TURN_S = 30


def share(ceiling: int, lanes: int, rank: int, turn: int = 0) -> int:
    """What the lane of that rank, from 0, is to have in flight: the shares of so many lanes are the ceiling.

    A lane without a single place would keep its shards for ever. So where there are more lanes than places, they have
    turns; the number of the `turn` is the same for all of them. Only lanes count then that have something to send.
    """
    place = (rank + turn) % lanes if ceiling < lanes else rank
    return ceiling // lanes + (place < ceiling % lanes)


def take(
    shares: Mapping[str, int],
    held: Mapping[str, int],
    others: Sequence[Mapping[str, int]],
    ceilings: Mapping[str, int],
) -> dict[str, int]:
    """What a lane holds from now on, by tier: what the others leave of its share, and all that it held before."""
    free = {tier: ceilings[tier] - sum(other.get(tier, 0) for other in others) for tier in shares}
    return {tier: max(held.get(tier, 0), min(mine, free[tier])) for tier, mine in shares.items()}


def let_go(held: Mapping[str, int], allowed: Mapping[str, int], in_flight: Mapping[str, int]) -> dict[str, int]:
    """What a lane still holds once it may begin no more than is `allowed`: of the rest what is `in_flight` yet."""
    return {tier: min(places, max(allowed[tier], in_flight[tier])) for tier, places in held.items()}


def parse_limits(given: Sequence[str], tiers: Sequence[str]) -> dict[str, int]:
    """`16` is that for each of the tiers, as in a job file; `pro=4` for one. Raises ValueError with what to write."""
    if len(given) == 1 and "=" not in given[0]:
        return dict.fromkeys(tiers, _parse_ceiling(given[0]))
    limits: dict[str, int] = {}
    for each in given:
        name, equals, ceiling = each.partition("=")
        if not equals:
            raise ValueError(f"{each!r} says for no tier: write one number for all of them, or {tiers[0]}={each}")
        if name not in tiers:
            raise ValueError(f"{name!r} is not in the run's ladder, which is {', '.join(tiers)}")
        if name in limits:
            raise ValueError(f"{name} is given twice; keep one")
        limits[name] = _parse_ceiling(ceiling)
    return limits


def _parse_ceiling(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_IN_FLIGHT))):
        raise ValueError(f"{text[:20]!r} is not how many requests may be in flight; write 1 to {MOST_IN_FLIGHT}")
    if not 1 <= (ceiling := int(text)) <= MOST_IN_FLIGHT:
        raise ValueError(
            f"{ceiling} requests in flight are too {'many' if ceiling else 'few'}; write 1 to {MOST_IN_FLIGHT}"
        )
    return ceiling


def spell_ceilings(ceilings: Mapping[str, int]) -> str:
    """`16 flash, 4 pro`."""
    return ", ".join(f"{ceiling} {tier}" for tier, ceiling in ceilings.items())
