"""Ceilings: how many requests of a run may be in flight, by tier, and how much of that is one lane's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Per tier. DeepSeek's largest accounts are allowed half of it.
MOST_IN_FLIGHT = 5000


def share(ceiling: int, lanes: int, rank: int | None = None) -> int:
    """What one of so many lanes may have in flight: all shares together are the ceiling.

    `rank` counts the lanes from 0; a lane that does not know its own takes what everyone may. A lane without a single
    place would keep its shards for ever, so each has one, also where there are more lanes than places.
    """
    is_odd_one = rank is not None and rank < ceiling % lanes
    return max(1, ceiling // lanes + is_odd_one)


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
