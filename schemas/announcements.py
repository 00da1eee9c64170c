"""What is worth telling whoever automates runs, decided from a run's events on the ledger. Names and numbers only.

paused                                → farthing.run.paused, and farthing.budget.reached where that is why
cache_lost                            → farthing.cache.lost
primed, cold, served_model_changed    → farthing.model.changed, where a tier is not served as when the run began
dead_letters_above_tolerance          → farthing.dead_letters.above_tolerance
done                                  → farthing.run.done
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid5

from schemas.inert import plain

#: The event of a run that more documents ended without a result than the job tolerates.
TOO_MANY_DEAD_LETTERS = "dead_letters_above_tolerance"
#: Events of a run that something is told of, or that say with which model it began.
KINDS = ("paused", "cache_lost", "primed", "cache_cold", "served_model_changed", TOO_MANY_DEAD_LETTERS, "done")
#: Events of a run that say that a process has begun to work on it.
BEGINNINGS = ("opened", "resumed")
_SPACE = UUID("7a3f4c0e-5f0b-4b8e-9c55-0d3c1f6f2a77")


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event of a run. `event_id` is its place in the ledger's order."""

    event_id: int
    happened_at: datetime
    kind: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One thing to tell. `because` is a word to choose by, such as why a run is paused; `numbers` say the rest."""

    name: str
    event: RunEvent
    because: str | None = None
    numbers: Mapping[str, str | int] = field(default_factory=dict)

    def identity(self, run_id: int) -> UUID:
        """The same for the same announcement, whichever process tells it, and for no other of any ledger."""
        event = f"{run_id} {self.event.event_id} {self.event.happened_at.isoformat()}"
        return uuid5(_SPACE, f"{event} {self.name} {self.numbers.get('to', '')}")


def announcements(events: Sequence[RunEvent]) -> list[Announcement]:
    """What all of a run's events so far, oldest first, are worth telling of."""
    models: dict[str, list[str]] = {}
    return [told for event in events for told in (*_of_state(event), *_of_model(event, models))]


def exceeds(dead_letters: int, documents: int, tolerance: Decimal) -> bool:
    """Whether more of the documents ended without a result than is tolerated. Once it is so, it stays so."""
    return dead_letters > tolerance * documents


def spell_dead_letters(dead_letters: int, documents: int, tolerance: Decimal) -> str:
    """What is wrong with a run that `exceeds`, in words for people."""
    return f"{dead_letters:,} of {documents:,} documents are dead letters, and the job tolerates {tolerance:.2%}"


def _of_state(event: RunEvent) -> Iterator[Announcement]:
    detail = event.detail
    match event.kind:
        case "paused":
            reason = plain(str(detail.get("reason", "unfinished")))
            yield Announcement("farthing.run.paused", event, reason)
            if reason == "budget":
                yield Announcement("farthing.budget.reached", event)
        case "cache_lost":
            lost: dict[str, str | int] = {
                "tier": plain(str(detail["tier"])),
                "replies": int(detail["replies"]),
                "lost": str(detail["lost"]),
            }
            yield Announcement("farthing.cache.lost", event, numbers=lost)
        case "dead_letters_above_tolerance":
            yield Announcement(
                "farthing.dead_letters.above_tolerance", event, numbers={"tolerance": str(detail["tolerance"])}
            )
        case "done":
            yield Announcement("farthing.run.done", event)


def _of_model(event: RunEvent, models: dict[str, list[str]]) -> Iterator[Announcement]:
    """Each model that serves a tier besides the one that did when the run began, over all lanes and pauses."""
    tier = str(event.detail.get("tier", ""))
    known = models.setdefault(tier, [])
    for model in _served(event):
        if model not in known:
            known.append(model)
            if model != known[0]:
                names = {"tier": plain(tier), "from": plain(known[0]), "to": plain(model)}
                yield Announcement("farthing.model.changed", event, numbers=names)


def _served(event: RunEvent) -> Iterator[str]:
    """The models that an event says served its tier, in order."""
    detail = event.detail
    match event.kind:
        case "primed" | "cache_cold" if detail.get("served_model"):
            yield str(detail["served_model"])
        case "served_model_changed" if "from" in detail:
            yield str(detail["from"][0])
            yield str(detail["to"][0])
